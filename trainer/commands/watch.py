"""`trainer watch RUN`: the terminal view of a run that goes on in another process."""

from __future__ import annotations

import argparse
import sys
import time

from trainer.commands.arguments import parse, run_folder
from trainer.errors import EXIT_COMPLETED, OutputError
from trainer.views.run_reader import RunReader
from trainer.views.running_headline import RunningHeadline
from trainer.views.terminal import create_display
from trainer.views.watch import NUM_PREVIEWS_BEFORE, watch_run


def run(argv: list[str]) -> int:
    """Attach, and show the run until it ends or Ctrl-C."""
    words = parse(_parser(), argv)
    folder = run_folder(words.run)
    reader = RunReader(folder)
    reader.poll()
    if reader.status is None:
        raise OutputError(reader.words())
    is_live = words.display == "rich" or (words.display == "auto" and sys.stdout.isatty())
    ended_at = reader.status.updated_at if reader.is_over else time.time()
    elapsed_s = max(0.0, ended_at - reader.status.started_at)
    verdict = RunningHeadline(reader.previews, reader.metrics.evaluations, reader.final_evaluation)
    display = create_display(words.display, elapsed_s=elapsed_s, verdict=verdict)
    print(f"{reader.name}: {reader.words()}", flush=True)
    if verdict.sentence() and not (is_live or reader.is_over):  # those views say it themselves
        print(verdict.sentence(), flush=True)
    try:
        return watch_run(
            folder,
            display,
            num_before=NUM_PREVIEWS_BEFORE if is_live else 1,
            is_once=words.once,
        )
    except KeyboardInterrupt:
        print("detached; the run continues")
        return EXIT_COMPLETED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer watch",
        description="Show a run that goes on in another process; Ctrl-C leaves it alone.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--display",
        choices=("auto", "rich", "plain", "json", "quiet"),
        default="auto",
        help="the terminal view [auto]",
    )
    parser.add_argument("--once", action="store_true", help="print the current state and exit")
    return parser
