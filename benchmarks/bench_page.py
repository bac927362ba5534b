"""What the live page costs: the first screen of large runs, and watching runs that grow.

    python benchmarks/bench_page.py [--repeats 3] [--seconds 20]

The first screen: `long` (2,000 steps, 501 previews of 8 prompts) and `hundred_prompts` (41 previews
of 100 prompts) of `made_up_runs.py`, a fresh monitor each. Watching: a run of 5 steps/s with
previews every 5 s, by one and by three pages: the CPU time of the monitor as a share of one core,
what the pages are sent, and how long a click on a prompt takes until its answer is there. Pages run
in Chromium on the same machine; its time is in no figure but those of the first screen and clicks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
MADE_UP = Path(__file__).with_name("made_up_runs.py")
VIEWPORT = {"width": 1440, "height": 900}
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
IS_PAINTED = "performance.getEntriesByName('first-contentful-paint').length > 0"
HTML_SIZE = "performance.getEntriesByType('navigation')[0].decodedBodySize"
WARM_UP_S = 5.0
CLICKS = 7


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def monitor(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The URL of a monitor, and its process."""
    with running("-m", "trainer", "monitor", str(folder), "--port", "0") as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1], psutil.Process(process.pid)


def opened(browser: Any, url: str) -> Any:
    """A page with its first rows."""
    page = browser.new_page(viewport=VIEWPORT)
    page.goto(url, wait_until="commit")
    page.wait_for_selector(".row-line")
    page.wait_for_function(IS_PAINTED)  # rows may be there before the frame that shows them
    return page


def first_screen(browser: Any, folder: Path, repeats: int) -> None:
    """Print what opening a run takes: the first time, and the median of the others."""
    with monitor(folder) as (url, _):
        rows = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            page = opened(browser, url)
            rows.append((time.perf_counter() - started, page.evaluate(PAINT)))
            size = page.evaluate(HTML_SIZE) / 1000
            page.close()
    (cold_rows, cold_paint), *warm = rows
    median_rows, median_paint = (statistics.median(column) for column in zip(*warm, strict=True))
    print(
        f"{folder.name:<16} first paint {cold_paint:.2f} s, then {median_paint:.2f} s; rows after "
        f"{cold_rows:.2f} s, then {median_rows:.2f} s; {size:.0f} kB of HTML"
    )


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds so far."""
    found = process.cpu_times()
    return float(found.user + found.system)


def watched(browser: Any, root: Path, *, prompts: int, pages: int, seconds: float) -> None:
    """Print what it costs that so many pages watch a run that grows."""
    run = root / f"live-{prompts}-{pages}"
    lasts = str(seconds + 40)
    grow = [str(MADE_UP), str(run), "--live", str(prompts), "--seconds", lasts]
    sent: list[int] = []
    with running(*grow):
        while not (run / "status.json").exists():
            time.sleep(0.1)
        with monitor(run) as (url, process):
            shown = [opened(browser, url) for _ in range(pages)]
            for page in shown:
                session = page.context.new_cdp_session(page)
                session.send("Network.enable")
                session.on(
                    "Network.webSocketFrameReceived",
                    lambda event: sent.append(len(event["response"]["payloadData"])),
                )
            shown[0].wait_for_timeout(1000 * WARM_UP_S)
            sent.clear()
            before, started = cpu_s(process), time.perf_counter()
            shown[0].wait_for_timeout(1000 * seconds)
            took = time.perf_counter() - started
            share, rate = (cpu_s(process) - before) / took, sum(sent) / 1000 / took / pages
            clicks = [click_s(shown[0], n) for n in range(CLICKS)]
            for page in shown:
                page.close()
    print(
        f"{prompts:>3} prompts, {pages} page{'s' if pages > 1 else ''}: {100 * share:.1f} % of a "
        f"core, {rate:.1f} kB/s a page; click to answer {statistics.median(clicks):.3f} s "
        f"({min(clicks):.3f}-{max(clicks):.3f})"
    )


def click_s(page: Any, number: int) -> float:
    """Seconds from a click on a prompt until its answer is there."""
    old = page.inner_text(".question")
    row = page.locator(".row-line[aria-selected=false]").nth(number % 5)
    started = time.perf_counter()
    row.click(position={"x": 60, "y": 12})
    page.wait_for_function("old => document.querySelector('.question').innerText !== old", arg=old)
    return time.perf_counter() - started


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a run is watched")
    words = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("there is no chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        subprocess.run([sys.executable, str(MADE_UP), folder], check=True)
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
        for name in ("long", "hundred_prompts"):
            first_screen(browser, root / name, words.repeats)
        for prompts, pages in ((8, 1), (100, 1), (100, 3)):
            watched(browser, root, prompts=prompts, pages=pages, seconds=words.seconds)
        print(f"load {os.getloadavg()[0]:.1f} at the end")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
