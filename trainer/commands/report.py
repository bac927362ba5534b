"""`trainer report RUN`: a run as one HTML file that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.commands.arguments import parse, run_folder
from trainer.errors import OutputError
from trainer.files import read_json_object
from trainer.views.report import REPORT_NAME, write_report
from trainer.views.run_reader import MANIFEST_NAME, RunReader


def run(argv: list[str]) -> int:
    """Read the run folder and write the report."""
    words = parse(_parser(), argv)
    folder = run_folder(words.run)
    reader = RunReader(folder)
    reader.poll()
    if reader.status is None and read_json_object(folder / MANIFEST_NAME) is None:
        raise OutputError(reader.words())
    path = Path(words.output) if words.output else folder / REPORT_NAME
    try:
        write_report(reader, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); give another --output FILE."
        ) from error
    print(f"{path}: {reader.words()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer report",
        description="Write a run, also a crashed or running one, as one HTML file.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--output", metavar="FILE", help="where to write [RUN/report.html]")
    return parser
