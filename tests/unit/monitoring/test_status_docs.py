"""docs/status.md describes every field of what is written, and no other."""

from __future__ import annotations

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


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_field_has_its_row_in_order(heading):
    section = re.split(r"\n#{2,3} ", TEXT.split(f"\n{heading}\n")[1])[0]
    rows = re.findall(r"^\| `(\w+)` \| ", section, flags=re.MULTILINE)
    assert rows == list(HEADINGS[heading].model_fields)


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
