"""Every view says the same headline: told by events, read from files, in the list of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.monitoring.events import Event, Observers, RunEnded
from trainer.views.headline import headline_of
from trainer.views.page.store import RunStore
from trainer.views.report import render_report
from trainer.views.running_headline import RunningHeadline

MakeRun = Callable[..., Any]
FINAL = {"final_evaluation": {"matched": 3, "num_prompts": 4, "failed": 0}}


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...


def listen(run: Any) -> Kept:
    """Events of a made-up run from here on."""
    kept = Kept()
    run.writer = Observers([run.writer, kept])
    run.writer.on_event = run.writer.emit
    return kept


def test_events_make_the_headline_that_the_files_make(
    made_up_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run()
    run.preview(0, [False] * 8)
    run.evaluate(50, 2.0)
    run.preview(50, [True] * 3 + [False] * 5)
    run.preview(90, [True] * 8)  # made again after the resume
    again = made_up_run(start_step=60)
    kept = listen(again)
    again.writer.emit(again.started)
    again.evaluate(100, 1.0)
    again.preview(100, [True] * 6 + [False, None])
    again.writer.emit(RunEnded(state="completed", step=100, summary=FINAL))
    told = RunningHeadline()
    for event in [*kept.events, *kept.events]:  # what is told twice counts once
        told.note(event)
    reader = again.read()
    (reader.folder / "run.json").write_text("{}")
    read = headline_of(reader.previews, reader.metrics.evaluations, reader.final_evaluation)
    assert told.sentence() == read.sentence
    assert read.sentence.startswith("6 of 7 right, from 0 before training.")
    assert read.sentence.endswith("Final evaluation: 75.0 % (3/4) right.")
    assert read.rest in render_report(reader)
    main(["watch", "--once", str(run.folder)])
    assert capsys.readouterr().out.splitlines()[-1] == read.sentence
    store = RunStore(tmp_path)
    [key] = store.readers
    store._refresh()
    assert store.headline(key) is None  # nobody looks at the list
    store.num_lists = 1
    store._refresh()
    found = store.headline(key)
    assert found is not None
    assert found.sentence == read.sentence
    assert not len(store.readers[key].previews)  # what was read for it is not kept


def test_a_run_that_has_told_nothing_has_no_headline(made_up_run: MakeRun) -> None:
    told = RunningHeadline()
    told.note(made_up_run().started)
    assert told.sentence() == ""


def test_watch_says_the_headline_of_a_run_at_work(
    made_up_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run()
    run.step(1)
    for step in (0, 1):
        run.preview(step, [bool(step)] * 8)
    assert main(["watch", "--once", str(run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8 of 8 right, from 0 before training." in lines[:2]
