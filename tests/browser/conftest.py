"""Chromium, driven by Playwright; a monitor and other programs in processes of their own.

Skipped, loudly, where there is no Chromium; REQUIRE_BROWSER=1 makes that an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]


def find_chromium() -> str | None:
    """The system's, or the one that `playwright install chromium` has fetched."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    home = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright"
    fetched = sorted(Path(home).glob("chromium-*/chrome-linux*/chrome"))
    return found or (str(fetched[-1]) if fetched else None)


CHROMIUM = find_chromium()
LOOPBACK = ("127.0.0.1", "localhost", "")
PATIENCE_MS = 60_000
"""How long a page is waited for: a loose limit, nothing is timed by it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a browser."""
    if CHROMIUM is not None or os.environ.get("REQUIRE_BROWSER") == "1":
        return
    why = "NO BROWSER TEST WAS RUN: there is no `chromium` here (make browser)"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    assert CHROMIUM is not None, "REQUIRE_BROWSER=1, and there is no chromium on PATH"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a URL; afterwards: no script error, no alert, nothing off loopback.

    `at_start` is JavaScript that runs before any of the page's own.
    """
    contexts, wrong = [], []

    def open_url(url: str, *, wait_for: str = "body", at_start: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        if at_start:
            context.add_init_script(at_start)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on(
            "dialog", lambda dialog: (wrong.append(f"alert: {dialog.message}"), dialog.dismiss())
        )
        page.on("request", lambda request: _check_place(request.url, wrong))
        page.on("websocket", lambda socket: _check_place(socket.url, wrong))
        page.goto(url, wait_until="commit")
        page.wait_for_selector(wait_for)
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert wrong == []


def _check_place(url: str, wrong: list[str]) -> None:
    parts = urlsplit(url)
    is_local = parts.scheme in ("data", "blob", "file", "about") or parts.hostname in LOOPBACK
    if not is_local:
        wrong.append(f"request to {url}")


@contextlib.contextmanager
def program(*words: str, ready: str = "", **environment: str) -> Iterator[tuple[Any, str]]:
    """A `trainer` command in a process of its own, ended with the block.

    Args:
        ready: what the line begins with that says it is up; "" waits for none.
    Returns:
        The process, and that line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *words],
        stdout=subprocess.PIPE if ready else subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        line = ""
        while ready and not line.startswith(ready):
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"{words} ended without saying {ready!r}"
        yield process, line
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def monitor() -> Iterator[Callable[..., str]]:
    """A function that starts `trainer monitor FOLDER ...` and gives its URL."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, *words: str) -> str:
            _, line = stack.enter_context(
                program("monitor", str(folder), "--port", "0", *words, ready="monitor:")
            )
            return line.split()[1]

        yield start


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def status_of(**changes: Any) -> dict[str, Any]:
    """A status.json of a run that is over."""
    values = {
        "schema_version": 1,
        "state": "completed",
        "phase": "completed",
        "started_at": 1.7e9,
        "updated_at": 1.7e9 + 60,
        "pid": 1,
    }
    return {**values, **changes}


def preview_of(step: int, number: int, **changes: Any) -> dict[str, Any]:
    """A line of previews.jsonl."""
    values = {
        "step": step,
        "prompt": f"prompt number {number}?",
        "text": f"answer {step}",
        "golden_answer": "answer 100",
        "matches": step >= 100,
        "prompt_id": f"validation-{number}",
        "created_at": 1.7e9,
    }
    return {**values, **changes}


@pytest.fixture(scope="session")
def helpers() -> Any:
    """What tests share: the functions of this file."""
    return sys.modules[__name__]
