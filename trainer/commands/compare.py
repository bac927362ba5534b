"""`trainer compare RUN RUN`: how their configs differ, and scores over the same prompts."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from trainer.commands.arguments import parse, print_table, run_folder
from trainer.counts import counted
from trainer.errors import ConfigError, OutputError
from trainer.files import read_json_object
from trainer.monitoring.events import printable
from trainer.scores.statistics import MIN_PROMPTS
from trainer.views.comparing import (
    LETTERS,
    ScoreComparison,
    compared_scores,
    config_differences,
    newest_val_loss,
    value_text,
)
from trainer.views.run_reader import MANIFEST_NAME, RunReader
from trainer.views.score_words import TOO_FEW, label_of, value_words

VALUE_CHARS = 60
"""Of a config value in a table; all of it is in --json."""


def run(argv: list[str]) -> int:
    """Read the runs and print what differs."""
    words = parse(_parser(), argv)
    readers = _readers(words.runs)
    scores = compared_scores(readers)
    if words.json:
        print(json.dumps(_as_json(readers, scores), indent=1, allow_nan=False))
    elif words.csv:
        names = [one.name for one in dataclasses.fields(ScoreComparison)]
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(one) for one in scores)
    else:
        _print(readers, scores)
    return 0


def _readers(names: Sequence[str]) -> list[RunReader]:
    if not 2 <= len(names) <= len(LETTERS):
        raise ConfigError(
            f"trainer compare: got {counted(len(names), 'run')}; give the folders of two to "
            f"{len(LETTERS)}."
        )
    folders = [run_folder(name) for name in names]
    twice = [one for one in folders if [x.resolve() for x in folders].count(one.resolve()) > 1]
    if twice:
        raise ConfigError(f"trainer compare: {twice[0]} is given twice; give other runs.")
    readers = [RunReader(folder) for folder in folders]
    for reader in readers:
        reader.poll()
        if reader.status is None and read_json_object(reader.folder / MANIFEST_NAME) is None:
            raise OutputError(reader.words())
    return readers


def _as_json(readers: Sequence[RunReader], scores: Sequence[ScoreComparison]) -> dict[str, object]:
    return {
        "runs": [
            {
                "run": letter,
                "folder": str(reader.folder),
                "state": reader.words(),
                "val_loss": newest_val_loss(reader),
            }
            for letter, reader in zip(LETTERS, readers, strict=False)
        ],
        "config": {
            key: dict(zip(LETTERS, values, strict=False))
            for key, values in config_differences(readers)
        },
        "scores": [dataclasses.asdict(one) for one in scores],
    }


def _print(readers: Sequence[RunReader], scores: Sequence[ScoreComparison]) -> None:
    for letter, reader in zip(LETTERS, readers, strict=False):
        loss = newest_val_loss(reader)
        told = "" if loss is None else f", validation loss {loss:.4f}"
        print(f"{letter}: {printable(str(reader.folder), 200)}: {reader.words()}{told}")
    letters = LETTERS[: len(readers)]
    changed = config_differences(readers)
    if changed:
        rows = [[key, *map(value_text, values)] for key, values in changed]
        _table("config values that differ, set or chosen", ["", *letters], rows)
    else:
        print("all config values are the same")
    if not scores:
        print("no prompt has a score in both A and another run")
        return
    columns = ["prompts", "score", "run", "A", "run's", "difference", "at 95 %", ""]
    _table("over the same prompts", columns, [_row(one) for one in scores])


def _row(one: ScoreComparison) -> list[str]:
    def said(value: float) -> str:
        return value_words(value, is_share=one.is_share)

    sign = "+" if one.difference > 0 else ""
    between = "" if one.low is None or one.high is None else f"{said(one.low)} to {said(one.high)}"
    if one.num_prompts < MIN_PROMPTS:
        verdict = TOO_FEW
    elif one.is_clear:
        verdict = "clearly above A" if one.difference > 0 else "clearly below A"
    else:
        verdict = "no clear difference"
    means = [said(one.mean_of_a), said(one.mean), f"{sign}{said(one.difference)}"]
    where = f"{one.num_prompts:,} of {one.source}"
    return [where, label_of(one.score), one.run, *means, between, verdict]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell, VALUE_CHARS)) for cell in row))
    print_table(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer compare",
        description="Compare runs with the first one: config, and scores over the same prompts.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="all of it as one JSON object")
    kinds.add_argument("--csv", action="store_true", help="the scores as CSV")
    return parser
