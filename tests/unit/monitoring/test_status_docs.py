"""docs/status.md describes every field of what is written, and no other."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from trainer.monitoring.events import (
    DriftMeasured,
    EvaluationDone,
    ScoreDecided,
    ScoresDone,
    StepDone,
)
from trainer.monitoring.loss_names import FIELD, PREFIXES
from trainer.monitoring.status_schema import (
    AccuracyStatus,
    CheckpointStatus,
    DecidingStatus,
    DriftStatus,
    ErrorStatus,
    NoticeStatus,
    PreviewStatus,
    RowStatus,
    TrainingStatus,
)
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewResult, PreviewSample
from trainer.scores.figures import ScoreDifference, ScoreFigure

EVENTS = [StepDone, EvaluationDone, DriftMeasured, ScoresDone, ScoreDecided]
TEXT = (Path(__file__).parents[3] / "docs" / "status.md").read_text(encoding="utf-8")
HEADINGS = {
    "## status.json": TrainingStatus,
    "### An entry of `last_previews`": PreviewStatus,
    "### `accuracy_last_20` and `accuracy_last_50`": AccuracyStatus,
    "### `drift`": DriftStatus,
    "### `deciding`": DecidingStatus,
    "### An entry of `preview_scores` and `evaluation_scores`": ScoreFigure,
    "### `first` and `best`": ScoreDifference,
    "### `training_row`": RowStatus,
    "### `last_checkpoint`": CheckpointStatus,
    "### An entry of `notices`": NoticeStatus,
    "### `error`": ErrorStatus,
}
PREVIEW_LINES = {"## previews.jsonl": PreviewResult, "### An entry of `samples`": PreviewSample}


def rows_below(heading):
    section = re.split(r"\n#{2,3} ", TEXT.split(f"\n{heading}\n")[1])[0]
    return re.findall(r"^\| `(\w+)` \| ", section, flags=re.MULTILINE)


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_field_has_its_row_in_order(heading):
    assert rows_below(heading) == list(HEADINGS[heading].model_fields)


@pytest.mark.parametrize("heading", PREVIEW_LINES)
def test_every_field_of_a_line_of_previews_has_its_row_in_order(heading):
    assert rows_below(heading) == list(PREVIEW_LINES[heading].model_fields)


def test_a_written_line_of_previews_has_the_fields_that_are_described(tmp_path, previews):
    """All of them, and left out are only those whose row says so."""
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    known = {"golden_token_ids": (1,), "golden_token_bytes": ("34",), "golden_is_frame": (False,)}
    sample = PreviewSample(text="5")
    for event in (previews(1, [True], **known, samples=(sample,)), previews(2, [True])):
        writer.on_event(event)
    full, short = map(json.loads, (tmp_path / "previews.jsonl").read_text().splitlines())
    assert list(full) == rows_below("## previews.jsonl")
    assert list(full["samples"][0]) == rows_below("### An entry of `samples`")
    left_out = [name for name in full if name not in short]
    assert left_out == re.findall(r"^\| `(\w+)` \| .*left out where", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("event", EVENTS)
def test_metrics_lines_are_described(event):
    row = re.search(rf"^\| `{event.__name__}` \| (.*) \|$", TEXT, flags=re.MULTILINE)
    assert row is not None
    names = {FIELD: f"{PREFIXES.get(event.__name__)}NAME"}
    written = [names.get(field.name, field.name) for field in fields(event)]
    assert re.findall(r"`([\w/]+)`", row[1]) == written


@pytest.mark.parametrize("model", HEADINGS.values())
def test_every_field_says_what_it_means(model):
    assert all(field.description for field in model.model_fields.values())
