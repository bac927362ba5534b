"""Runs compared: how their configs differ, and their scores prompt by prompt; page and command."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.preview.base import PreviewResult
from trainer.scores.figures import MATCH, values_of
from trainer.scores.statistics import difference_of
from trainer.views.run_reader import RunReader, config_values

LETTERS = "ABCDEF"
"""So many runs at most: more curves could not be told apart."""

DATA_FILES = "data_files_sha256"
"""In run.json."""

NOT_COMPARED = ("output.", "data_card")
"""Config keys that always differ and tell nothing."""

PROCESSES = "(processes)"
"""How many trained a run, where it says so."""


def config_differences(readers: Sequence[RunReader]) -> list[tuple[str, list[Any]]]:
    """(key, its JSON value in each run) of those that differ; None where a run has none.

    Values that a run chose by itself are among them, and the number of its processes.
    """
    columns = []
    for reader in readers:
        with reader.lock:
            processes = reader.manifest.get("processes")
            world = processes.get("world_size") if isinstance(processes, dict) else None
            columns.append({PROCESSES: world, **config_values(reader)})
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [
        (name, values)
        for name, values in rows
        if any(value != values[0] for value in values) and not name.startswith(NOT_COMPARED)
    ]


def value_text(value: Any) -> str:
    """A value of `config_differences` as a table shows it."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- the prompts that runs have in common


def _newest_previews(reader: RunReader) -> list[PreviewResult]:
    return reader.previews.newest()


def _newest_evaluation(reader: RunReader) -> list[PreviewResult]:
    by_step: dict[int, list[PreviewResult]] = {}
    for one in TrainingStatusReader(reader.folder).evaluations():
        by_step.setdefault(one.step, []).append(one)
    return by_step[max(by_step)] if by_step else []


def _final_answers(reader: RunReader) -> list[PreviewResult]:
    return list(reader.final_evaluation.answers) if reader.final_evaluation is not None else []


SOURCES: dict[str, Callable[[RunReader], list[PreviewResult]]] = {
    "final evaluation": _final_answers,
    "evaluation prompts": _newest_evaluation,
    "previews": _newest_previews,
}
"""Where a run has answers -> the newest of them."""


def common_answers(
    readers: Sequence[RunReader],
    newest_of: Callable[[RunReader], list[PreviewResult]] = _newest_previews,
) -> list[list[PreviewResult]]:
    """The newest answers to each prompt that all runs have, in the order of the runs.

    A profile may rewrite a prompt. Its id names the row of a data file, and so the same prompt
    only in runs of the same files.

    Args:
        newest_of: the answers of a run, one of SOURCES.
    """
    newest, files = [], []
    for reader in readers:
        with reader.lock:
            newest.append(newest_of(reader))
            files.append(_data_files(reader))
    is_same_data = files[0] is not None and all(one == files[0] for one in files)
    keyed = [
        {(is_same_data and _row_of(one)) or one.prompt: one for one in results}
        for results in newest
    ]
    return [
        [answers[key] for answers in keyed]
        for key in keyed[0]
        if all(key in answers for answers in keyed)
    ]


def _data_files(reader: RunReader) -> list[str] | None:
    """Hashes of the data files of a run in their order, by which rows are numbered.

    None where its record has none.
    """
    hashes = reader.manifest.get(DATA_FILES)
    return list(map(str, hashes.values())) if isinstance(hashes, dict) and hashes else None


def _row_of(result: PreviewResult) -> str:
    """The id of a prompt that is a row of a data file; "" for one from the config."""
    return result.prompt_id if result.prompt_id.startswith(("validation-", "train-")) else ""


# ---- their scores


@dataclass(frozen=True)
class ScoreComparison:
    """The mean of one score in one run against that in the first one, over the same prompts."""

    run: str
    """Its letter; the first run is A."""
    source: str
    """One of SOURCES."""
    score: str
    """`match`, or as in `ScoreFigure`."""
    step: int
    """Whose weights answered."""
    step_of_a: int
    num_prompts: int
    """Prompts that have the score in both runs."""
    mean: float
    mean_of_a: float
    difference: float
    """`mean` less `mean_of_a`."""
    low: float | None
    """Lower end of the difference's interval at 95 %; None where nothing can be said."""
    high: float | None
    """Upper end."""
    is_clear: bool | None
    """Whether chance alone would hardly show as much; None with fewer than 12 prompts."""
    is_share: bool
    """Whether all values were from 0 to 1."""


def compared_scores(readers: Sequence[RunReader]) -> list[ScoreComparison]:
    """Each run against the first one, by every source and score that both have."""
    found = []
    for letter, reader in zip(LETTERS[1:], readers[1:], strict=False):
        for source, newest_of in SOURCES.items():
            pairs = common_answers([readers[0], reader], newest_of)
            found += [_compared(letter, source, *one) for one in _by_score(pairs)]
    return found


def _by_score(
    pairs: Iterable[Sequence[PreviewResult]],
) -> list[tuple[str, list[tuple[float, float]], tuple[int, int]]]:
    """(score, the values of both runs to each prompt, the steps of both)."""
    values: dict[str, list[tuple[float, float]]] = {}
    steps = (0, 0)
    for base, other in pairs:
        steps = (base.step, other.step)
        ours, theirs = _values(base), _values(other)
        for name in ours:
            if name in theirs:
                values.setdefault(name, []).append((ours[name], theirs[name]))
    return [(name, of_prompts, steps) for name, of_prompts in values.items()]


def _values(result: PreviewResult) -> dict[str, float]:
    found = {} if result.matches is None else {MATCH: float(result.matches)}
    return found | values_of(result) if result.ok else {}


def _compared(
    letter: str,
    source: str,
    score: str,
    values: Sequence[tuple[float, float]],
    steps: tuple[int, int],
) -> ScoreComparison:
    before, now = [one for one, _ in values], [one for _, one in values]
    interval, is_clear = difference_of(now, before)
    low, high = interval if interval is not None else (None, None)
    mean, mean_of_a = statistics.fmean(now), statistics.fmean(before)
    return ScoreComparison(
        run=letter,
        source=source,
        score=score,
        step=steps[1],
        step_of_a=steps[0],
        num_prompts=len(values),
        mean=mean,
        mean_of_a=mean_of_a,
        difference=mean - mean_of_a,
        low=low,
        high=high,
        is_clear=is_clear,
        is_share=all(0 <= one <= 1 for pair in values for one in pair),
    )


def newest_val_loss(reader: RunReader) -> float | None:
    """The last loss on held-out rows; None where there is none."""
    losses = [one.val_loss for one in reader.metrics.evaluations if math.isfinite(one.val_loss)]
    return losses[-1] if losses else None
