"""The page's data card is the one that the run recorded and its terminal printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_page_shows_the_card_lines_of_a_run_with_weights_and_dropped_rows(
    open_page: Callable[..., Any], monitor: Callable[..., str], helpers: Any, tmp_path: Path
) -> None:
    rows = [{"question": f"max of {n} and 7?", "answer": str(max(n, 7))} for n in range(40)]
    long = {"question": "all numbers?", "answer": " ".join(map(str, range(200)))}
    helpers.write_lines(tmp_path / "one.jsonl", rows)
    helpers.write_lines(tmp_path / "two.jsonl", [{**row, "answer": "7"} for row in rows] + [long])
    run = tmp_path / "run"
    train = [
        *("train", "--dataset", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"),
        *("--data.weights", "2", "--data.weights", "1", "--data.truncation", "drop"),
        *("--model", "tiny", "--output", str(run), "--fp32", "--hyperparams.max_steps", "1"),
        *("--hyperparams.max_length", "64", "--monitoring.inference_interval", "0"),
    ]
    with helpers.program(*train) as (process, _):
        assert process.wait(120) == 0
    lines = json.loads((run / "run.json").read_text())["data_card_lines"]
    assert dict(lines)["too long"].startswith("1 row of more than 64 tokens left out")
    page = open_page(monitor(run), wait_for="#about")
    page.get_by_text("before training: data card").first.click()
    page.wait_for_selector("#about td:has-text('left out')")
    shown = page.locator("#about tr").all()
    cells = [[cell.inner_text() for cell in row.locator("th, td").all()] for row in shown]
    assert cells[: len(lines)] == lines
    assert [name for name, _ in lines if name.startswith("source ")] == ["source one", "source two"]
    page.get_by_text("all curves").first.click()
    page.wait_for_selector("#source-losses canvas")
    assert page.locator("#source-losses").is_visible()
