"""The report and the terminal view in docs/img, of a real demo run; the page: case_pictures.py.

    python benchmarks/screenshots.py [--run FOLDER] [--out docs/img]

Without --run the demo is trained first, and the terminal is taken while it trains. Needs Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console

from trainer.monitoring.events import (
    EvaluationDone,
    PreviewsDone,
    RunEnded,
    RunStarted,
    ScoresDone,
    StepDone,
)
from trainer.views.report import write_report
from trainer.views.run_reader import RunReader
from trainer.views.running_headline import RunningHeadline
from trainer.views.terminal_rich import LiveView
from trainer.views.watch import Follower

ROOT = Path(__file__).parents[1]
ENOUGH_STEPS = 50
"""The terminal is taken then: right and wrong answers stand side by side."""
TERMINAL_WIDTH = 80


def main() -> int:
    """Train, or take a run; then take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run; default: train the demo")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        run = words.run or Path(scratch) / "demo_run"
        training = None
        if words.run is None:
            # From within: the pictures name the folder as a user would.
            demo = command("demo", "--output", run.name, cwd=Path(scratch))
            training = stack.enter_context(demo)
        if training is not None:
            wait_for_step(run, ENOUGH_STEPS)
        browser = stack.enter_context(chromium())
        terminal = Path(scratch) / "terminal.svg"
        terminal.write_text(terminal_svg(run), encoding="utf-8")
        take_terminal(browser, terminal, words.out)
        if training is not None:
            training.wait()
        report = Path(scratch) / "report.html"
        reader = RunReader(run)
        reader.poll()
        write_report(reader, report)
        take_report(browser, report, words.out)
    for path in sorted(words.out.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


@contextlib.contextmanager
def command(*arguments: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A `trainer` command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "trainer", *arguments]
    process = subprocess.Popen(words, env=environment, cwd=cwd)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run in another process has made this many steps."""
    reader = RunReader(run)
    while reader.step < step:
        time.sleep(0.5)
        reader.poll()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise SystemExit("there is no chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def take_report(browser: Any, report: Path, out: Path) -> None:
    """The top of the report; the newest wrong answers are open."""
    page = browser.new_page(viewport={"width": 1100, "height": 1300})
    page.goto(report.as_uri())
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=out / "report.png")
    page.close()


def terminal_svg(run: Path) -> str:
    """What `trainer watch` shows at 80 columns, as rich draws it."""
    reader = RunReader(run)
    reader.poll()
    verdict = RunningHeadline(reader.previews, reader.metrics.evaluations, reader.final_evaluation)
    view = LiveView(time.monotonic, verdict)
    for event in Follower(run, num_before=10).poll():
        match event:
            case RunStarted():
                view.started = event
            case StepDone():
                view.set_step(event)
            case EvaluationDone():
                view.evaluation = event
            case PreviewsDone():
                view.set_previews(event)
            case ScoresDone():
                view.set_scores(event)
            case RunEnded():
                view.set_end(event)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, width=TERMINAL_WIDTH, height=28, file=nowhere, force_terminal=True
        )
        console.print(view)
        return console.export_svg(title=f"trainer watch {run.name}")


def take_terminal(browser: Any, svg: Path, out: Path) -> None:
    """The terminal picture; offline, as rich names a font on the internet."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, offline=True)
    page = context.new_page()
    page.set_content(f"<body style='margin:0'>{svg.read_text(encoding='utf-8')}</body>")
    page.locator("svg").first.screenshot(path=out / "terminal.png")
    context.close()


if __name__ == "__main__":
    raise SystemExit(main())
