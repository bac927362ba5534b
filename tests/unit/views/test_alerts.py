"""Alerts fire on what they name and on nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from trainer.monitoring.events import PhaseChanged
from trainer.views.facts import DRIFT_KL, alerts_of, bar_figures
from trainer.views.timeline import mark_of

MakeRun = Callable[..., Any]


def texts_of(run: Any) -> list[str]:
    return [alert.text for alert in alerts_of(run.read())]


def test_a_healthy_run_has_none(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(0, [False, False])
    run.steps(1, 100)
    for step, loss in [(30, 2.0), (60, 1.5), (90, 1.4)]:
        run.evaluate(step, loss)
    run.preview(100, [True, True])
    assert texts_of(run) == []


def test_rising_validation_loss(made_up_run: MakeRun) -> None:
    run = made_up_run()
    for step, loss in [(10, 2.0), (20, 1.0), (30, 1.2), (40, 1.3)]:
        run.evaluate(step, loss)
    [text] = texts_of(run)
    assert text == "validation loss rises: 1.3000 at step 40, lowest 1.0000 at step 20"


def test_throughput_that_falls(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 80)
    run.steps(81, 100, tokens_per_s=300.0)
    [text] = texts_of(run)
    assert text.startswith("throughput fell: 300 tokens/s in the last 20 steps, 1,000 over the run")
    run.end()
    assert texts_of(run) == []  # a run that is over needs no help


def test_accuracy_that_falls_at_two_previews_in_a_row_names_the_prompts(
    made_up_run: MakeRun,
) -> None:
    run = made_up_run()
    run.preview(0, [False] * 8)
    run.preview(50, [True] * 8)
    run.preview(100, [True] + [False] * 7)
    assert texts_of(run) == []  # once may be chance
    run.preview(150, [True, True] + [False] * 6)
    warning, info = texts_of(run)
    assert warning == "accuracy falls: 2 of 8 previews match at step 150, 8 did at step 50"
    assert info.startswith("answered correctly at step 50, wrong now: 'max of 4 and 2?', ")
    alert = alerts_of(run.read())[0]
    assert run.read().previews.timelines[alert.prompt].prompt == "max of 4 and 2?"
    assert alert.step == 150


def test_two_prompts_of_eight_that_go_wrong_are_no_alert(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(50, [True] * 8)
    for step in (100, 150, 200):
        run.preview(step, [True] * 6 + [False] * 2)
    assert texts_of(run) == []


def test_a_score_that_is_missing_where_it_decides(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.decide(60)
    assert texts_of(run) == []
    run.decide(80, mean=None, missing="no answer for 60 s", num_missing=1)
    [text] = texts_of(run)
    assert text == ("score.exact of step 60 is missing and decides nothing: no answer for 60 s")
    assert bar_figures(run.read())[-1] == (
        "score.exact decides: best step 20, 1 of 3 evaluations without a clear rise, 1 missing, "
        "training waited 2.0 s"
    )


def test_drift_above_the_threshold_names_the_prompt(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.drift(0, 0.0, num_changed=0)
    run.drift(50, DRIFT_KL, num_changed=20)  # many answers that changed a word are no alarm
    assert texts_of(run) == []
    run.drift(100, DRIFT_KL + 1)
    [text] = texts_of(run)
    assert text.startswith(f"drift of {DRIFT_KL + 1:.2f} nats per token")
    assert text.endswith("12 of 20 greedy answers changed, most 'Who wrote Hamlet?'")
    assert "at step 100" in text
    run.drift(150, 0.1)  # the newest one counts
    assert texts_of(run) == []
    run.drift(200, float("nan"))
    assert texts_of(run) == []


def test_previews_that_never_stop(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(0, [False, False], health=("never_stopped",))
    assert texts_of(run) == []  # an untrained model may
    run.preview(50, [False, False], health=("never_stopped",))
    assert texts_of(run) == ["2 of 2 previews of step 50 never stopped"]


def test_errors_of_previews_and_runs_and_non_finite_numbers(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(50, [None], text="", error_message="nobody is there", finish_reason="error")
    run.step(81, train_loss=float("nan"))
    run.end("failed", 81, error_type="NonFiniteError", error_message="step 81: the loss is nan;")
    assert texts_of(run) == [
        "step 81: the loss is nan;",
        "not finite at step 81: train_loss nan",
        "1 of 1 preview of step 50 without an answer: nobody is there",
    ]


def test_a_superseded_preview_is_no_fault_and_has_a_sign_of_its_own(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(40, [True])
    gone = {"error_message": "superseded by the weights of step 60", "is_superseded": True}
    run.preview(50, [None], text="", finish_reason="error", **gone)
    assert texts_of(run) == []
    [line] = run.read().previews.timelines.values()
    assert [mark_of(line.of_step(step)) for step in (40, 50)] == ["=", "-"]


def test_prompts_without_an_answer_before_are_no_loss(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(10, [True] * 6 + [None] * 6)
    for step in (20, 30):
        run.preview(step, [True] * 6 + [False] * 6)
    assert texts_of(run) == []
    for step in (40, 50):
        run.preview(step, [False] * 12)
    warning, _ = texts_of(run)
    assert warning == "accuracy falls: 0 of 6 previews match at step 50, 6 did at step 10"


def test_a_run_that_says_nothing_is_an_alert_in_words_that_stand_still(
    made_up_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = made_up_run(), time.time()
    run.steps(1, 4)
    assert texts_of(run) == []
    monkeypatch.setattr(time, "time", lambda: now + 60)
    [text] = texts_of(run)
    assert re.fullmatch(
        r"the run hangs, or waits for its machine: no update since \S+ \d\d:\d\d:\d\d \S+; "
        "a step takes 0.1 s",
        text,
    )
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert texts_of(run) == [text]  # it is not read aloud again at every second
    run.step(5)
    assert texts_of(run) == []


def test_a_phase_that_says_nothing_for_ten_minutes_is_named(
    made_up_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = made_up_run(), time.time()
    run.writer.on_event(PhaseChanged(state="saving", text="saving the final model"))
    monkeypatch.setattr(time, "time", lambda: now + 500)
    assert texts_of(run) == []
    monkeypatch.setattr(time, "time", lambda: now + 700)
    [alert] = alerts_of(run.read())
    assert (alert.level, alert.text.endswith(": saving the final model")) == ("info", True)
