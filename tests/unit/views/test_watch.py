"""Attaching to a run: the events that wrote the files, each once."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from trainer.cli import main
from trainer.monitoring.events import (
    EvaluationDone,
    Event,
    Notice,
    PhaseChanged,
    PreviewsDone,
    RunEnded,
    RunStarted,
    StepDone,
)
from trainer.views.terminal import create_display
from trainer.views.watch import Follower, watch_run

MakeRun = Callable[..., Any]


class Recorder:
    """Remembers events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing to let go of."""


def of_kind(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_attaching_tells_the_newest_and_then_every_event_once(made_up_run: MakeRun) -> None:
    run = made_up_run()
    told = Recorder()
    run.writer, writer = _Both(run.writer, told), run.writer
    run.steps(1, 10)
    run.evaluate(10, 2.0)
    for step in (0, 5, 10):
        run.preview(step, [True, False])
    follower = Follower(run.folder, num_before=2)
    first = list(follower.poll())
    assert [event.step for event in of_kind(first, StepDone)] == [10]
    assert [event.step for event in of_kind(first, PreviewsDone)] == [5, 10]
    assert len(of_kind(first, RunStarted)) == len(of_kind(first, EvaluationDone)) == 1
    assert list(follower.poll()) == []
    told.events.clear()
    run.steps(11, 13, train_loss=1.5)
    run.evaluate(13, 1.0)
    run.preview(13, [True, None])
    writer.on_event(Notice(text="look", level="warning"))
    run.end("failed", 13, error_type="OSError", error_message="disk full")
    seen = list(follower.poll())
    for kind in (StepDone, EvaluationDone, Notice, RunEnded):
        expected = of_kind(told.events, kind) or [Notice(text="look", level="warning")]
        assert of_kind(seen, kind) == expected, kind
    [previews] = of_kind(seen, PreviewsDone)
    assert previews.results == of_kind(told.events, PreviewsDone)[0].results
    assert follower.is_ended


def test_how_far_a_phase_is_is_told_as_that_and_not_as_a_new_phase(made_up_run: MakeRun) -> None:
    run = made_up_run()
    follower = Follower(run.folder, num_before=2)
    seen: list[Event] = []
    for progress in ("", "5 rows", "9 rows"):
        phase = PhaseChanged(state="loading", text="encoding a", progress=progress)
        run.writer.on_event(phase)
        seen += follower.poll()
    assert [(e.text, e.progress) for e in of_kind(seen, PhaseChanged)] == [
        ("encoding a", ""),
        ("encoding a", "5 rows"),
        ("encoding a", "9 rows"),
    ]
    assert not any(event.is_pause for event in of_kind(seen, PhaseChanged)[1:])


class _Both:
    """A writer whose events are remembered too."""

    def __init__(self, *observers: Any) -> None:
        self.observers = observers

    def on_event(self, event: Event) -> None:
        for observer in self.observers:
            observer.on_event(event)


def test_a_loss_that_json_cannot_hold_is_nan_again(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(1, train_loss=float("nan"))
    [step] = of_kind(list(Follower(run.folder, num_before=1).poll()), StepDone)
    assert step.train_loss != step.train_loss


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("stopped", 130)])
def test_the_exit_code_is_that_of_the_run(made_up_run: MakeRun, state: str, code: int) -> None:
    run = made_up_run()
    run.step(1)
    if state == "stopped":
        (run.folder / "run.json").write_text(json.dumps({"exit_code": 130}))
    run.end(state, 1)
    assert watch_run(run.folder, Recorder(), num_before=1) == code


def test_a_run_whose_process_is_gone_ends_the_watching(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = run.folder / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": ended.pid}))
    recorder = Recorder()
    assert watch_run(run.folder, recorder, num_before=1) == 1
    assert "stopped unexpectedly at step 1 of 1000" in of_kind(recorder.events, Notice)[-1].text


def test_the_words_are_those_of_the_run_itself(
    made_up_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run()
    own = io.StringIO()
    display = create_display("plain", own)
    run.writer = _Both(run.writer, display)
    run.step(1000)
    run.preview(1000, [True, False])
    assert main(["watch", str(run.folder), "--display", "plain", "--once"]) == 0
    said = capsys.readouterr().out
    for line in own.getvalue().splitlines():
        assert line in said
    assert "1 of 2 match" in said


def test_no_run_is_one_line_and_exit_code_2(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
