"""One data card: the terminal, run.json, the report and the page say the same of a real run."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
Lines = list[tuple[str, str]]


class CardTable(HTMLParser):
    """The (label, value) rows under the heading with id="card"."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: Lines = []
        self._cells: list[str] = []
        self._is_card = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "h2":
            self._is_card = ("id", "card") in attrs
        elif tag == "tr":
            self._cells = []
        elif tag in ("th", "td"):
            self._cells.append("")

    def handle_data(self, data: str) -> None:
        if self._cells:
            self._cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._is_card and len(self._cells) == 2:
            self.rows.append((self._cells[0], self._cells[1]))
        elif tag == "table":
            self._is_card = False


def lines_of_terminal(text: str) -> Lines:
    """The (label, value) lines of the data card, its sample row left out."""
    _, _, rest = text.partition("data card\n")
    found = re.findall(r"^  (\S.*?)  +(.*)$", rest, re.MULTILINE)
    labels = [label for label, _ in found]
    return found[: labels.index("first row")]


@pytest.fixture
def mixed(write_rows: Callable[..., Path], cli: Cli, tmp_path: Path) -> tuple[str, Path]:
    """Two files with weights 2 and 1, of whose 100 rows 5 are longer than max_length: dropped."""
    short = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(95)]
    long = [{"question": f"long {n}?", "answer": "two plus two " * 60} for n in range(5)]
    one, two = write_rows(short[:35], "one.jsonl"), write_rows([*short[35:], *long], "two.jsonl")
    done = cli(
        *("train", "--dataset", f"{one},{two}", "--model", "tiny", "--output", tmp_path / "out"),
        *("--data.weights", "2", "--data.weights", "1", "--data.truncation", "drop"),
        *("--hyperparams.max_length", "96", "--hyperparams.max_steps", "1", "--fp32"),
        *("--monitoring.inference_interval", "0", "--monitoring.display", "plain"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, tmp_path / "out"


def test_the_report_and_run_json_say_of_weighted_and_dropped_rows_what_the_terminal_says(
    mixed: tuple[str, Path],
) -> None:
    said, run = mixed
    lines = lines_of_terminal(said)
    report = CardTable((run / "report.html").read_text()).rows
    assert report == lines
    recorded = json.loads((run / "run.json").read_text())["data_card_lines"]
    assert [tuple(line) for line in recorded] == lines


def test_the_card_tells_the_rows_of_the_files_from_those_that_weights_repeat(
    mixed: tuple[str, Path],
) -> None:
    said, run = mixed
    card = json.loads((run / "run.json").read_text())["data_card"]
    held_out, trained = card["num_validation_rows"], card["num_train_rows"]
    unique = 100 - 5 - held_out
    assert trained > unique
    lines = dict(lines_of_terminal(said))
    assert lines["rows"] == (
        f"{unique} training ({trained} per epoch with data.weights), {held_out} validation, "
        "of 100 read"
    )
    assert lines["too long"].startswith("5 rows of more than 96 tokens left out")
