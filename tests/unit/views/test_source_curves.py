"""The losses of sources on their way from a run's files to what people see."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.unit.views.conftest import MadeUpRun
from trainer.monitoring.events import EvaluationDone, StepDone
from trainer.monitoring.loss_names import losses_of_line
from trainer.monitoring.status_reader import METRICS_NAME
from trainer.monitoring.trackers import figures_of
from trainer.monitoring.tracking import TensorBoardPreviews
from trainer.views.facts import report_figures
from trainer.views.metrics import MetricsTable
from trainer.views.page.charts import source_chart
from trainer.views.report import render_report
from trainer.views.source_curves import SourceCurves
from trainer.views.watch import _metric
from trainer.views.words import evaluation_words

HOSTILE = "<b>x</b>"


def evaluation(step: int, **losses: float) -> EvaluationDone:
    return EvaluationDone(
        step=step,
        val_loss=1.5,
        train_loss=1.0,
        num_rows=40,
        num_trained_tokens=1000,
        duration_s=0.5,
        source_losses=losses,
    )


@pytest.fixture
def run(tmp_path: Any) -> MadeUpRun:
    """60 steps over two sources of which one is in every third step only."""
    made = MadeUpRun(tmp_path)
    for step in range(1, 61):
        losses = {HOSTILE: 2.0 - step / 60}
        made.step(step, source_losses={**losses, "talk": 3.0} if step % 3 == 0 else losses)
    made.writer.on_event(evaluation(60, talk=1.25, **{HOSTILE: 1.75}))
    made.reader.poll()
    return made


def test_a_line_of_metrics_has_a_key_for_each_source_and_is_read_back(run: MadeUpRun) -> None:
    lines = [json.loads(line) for line in (run.folder / METRICS_NAME).open()]
    assert lines[2]["loss/talk"] == 3.0
    assert "loss/talk" not in lines[3]
    assert (lines[-1]["val_loss/talk"], "source_losses" in lines[-1]) == (1.25, False)
    told = [_metric(line) for line in lines]
    assert isinstance(told[2], StepDone)
    assert told[2].source_losses == {HOSTILE: 1.95, "talk": 3.0}
    assert isinstance(told[-1], EvaluationDone)
    assert told[-1] == evaluation(60, talk=1.25, **{HOSTILE: 1.75})
    assert losses_of_line({"type": "ScoresDone", "loss/x": 1.0}) == {}


def test_a_loss_that_is_not_finite_is_named_and_drawn_nowhere(tmp_path: Any) -> None:
    made = MadeUpRun(tmp_path)
    made.step(1, source_losses={"a": math.nan, "b": 1.0})
    [line] = [json.loads(line) for line in (tmp_path / METRICS_NAME).open()]
    assert line["loss/a"] is None
    assert line["non_finite"] == {"loss/a": "nan"}
    made.reader.poll()
    assert made.reader.metrics.source_losses.points() == {"b": [(1, 1.0)]}
    told = _metric(line)
    assert isinstance(told, StepDone)
    assert math.isnan(told.source_losses["a"])


def test_the_status_keeps_the_newest_loss_of_a_source_also_over_a_resume(run: MadeUpRun) -> None:
    run.step(61, source_losses={"talk": 0.5})
    status = run.writer.status
    assert status.source_losses == {HOSTILE: pytest.approx(1.0), "talk": 0.5}
    assert status.val_source_losses == {"talk": 1.25, HOSTILE: 1.75}
    again = MadeUpRun(run.folder, start_step=60)
    assert again.writer.status.val_source_losses == {"talk": 1.25, HOSTILE: 1.75}


def test_a_resume_drops_the_steps_that_it_makes_again() -> None:
    curves = SourceCurves("StepDone")
    rows = [{"type": "StepDone", "step": n, "loss/a": float(n)} for n in range(1, 6)]
    curves.add_all([*rows, {"type": "StepDone", "step": 5, "loss/b": 1.0}])
    curves.drop_after(3)
    assert curves.points() == {"a": [(1, 1.0), (2, 2.0), (3, 3.0)]}
    assert curves.newest() == {"a": 3.0}
    assert not SourceCurves("EvaluationDone")


def test_a_smoothed_curve_is_the_mean_around_each_step() -> None:
    curves = SourceCurves("StepDone")
    curves.add_all([{"type": "StepDone", "step": n, "loss/a": float(n % 2)} for n in range(100)])
    assert curves.smoothed(0.0)["a"] == curves.points()["a"]
    middle = curves.smoothed(0.2)["a"][10:90]
    assert all(abs(loss - 0.5) < 0.03 for _, loss in middle)


def test_many_lines_at_once_are_those_one_by_one(run: MadeUpRun) -> None:
    rows = [json.loads(line) for line in (run.folder / METRICS_NAME).open()][:60]
    one, all_ = MetricsTable(), MetricsTable()
    for row in rows:
        one.add(row)
    all_.add_steps(rows)
    assert one.source_losses.points() == all_.source_losses.points()
    assert set(all_.source_losses.points()) == {HOSTILE, "talk"}


def test_page_report_and_terminal_show_each_source(run: MadeUpRun) -> None:
    chart = source_chart(run.reader, smoothing=0.025, is_dark=False)
    names = [one["name"] for one in chart["series"]]
    assert names == [HOSTILE, f"{HOSTILE}, validation", "talk", "talk, validation"]
    assert len(chart["dataset"][2]["source"]["x"]) == 20
    figures = dict(report_figures(run.reader))
    assert figures["last validation loss of each source"] == f"{HOSTILE} 1.7500, talk 1.2500"
    report = render_report(run.reader)
    assert "loss of talk" in report
    assert HOSTILE not in report
    assert "of sources talk 1.2500" in evaluation_words(evaluation(60, talk=1.25))
    assert "\x1b" not in evaluation_words(evaluation(60, **{"\x1b[31m": 1.25}))


def test_a_run_of_one_source_shows_no_sources(tmp_path: Any) -> None:
    made = MadeUpRun(tmp_path)
    made.steps(1, 3)
    made.evaluate(3, 1.5)
    made.reader.poll()
    assert not made.reader.metrics.source_losses
    assert source_chart(made.reader, smoothing=0.0, is_dark=True)["series"] == []
    assert "of each source" not in render_report(made.reader)
    assert "sources" not in evaluation_words(evaluation(3))


def test_trackers_are_told_the_loss_of_each_source() -> None:
    assert figures_of(evaluation(5, talk=1.25)) == {"eval_loss": 1.5, "eval_loss/talk": 1.25}

    class Writer:
        def __init__(self) -> None:
            self.scalars: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[name] = value

    writer = Writer()
    TensorBoardPreviews(writer).on_event(evaluation(5, talk=1.25))
    assert writer.scalars == {"val_loss": 1.5, "val_loss/talk": 1.25}
