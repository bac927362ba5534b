"""Every view says the same headline: told by events, read from files, in the list of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.monitoring.events import Event, Observers, RunEnded
from trainer.views.headline import headline_of
from trainer.views.page import store as store_module
from trainer.views.page.list_page import COLUMNS, _cells
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
    assert store.judged(key) is None  # nobody looks at the list
    store.num_lists = 1
    store._refresh()
    found = store.judged(key)
    assert found is not None
    assert found.headline.sentence == read.sentence
    assert not len(store.readers[key].previews)  # what was read for it is not kept


def test_a_row_of_the_list_follows_a_run_that_no_page_shows_any_more(
    made_up_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "JUDGE_S", 0.0)
    monkeypatch.setattr(store_module, "SUMMARY_S", 0.0)
    run = made_up_run()
    run.preview(0, [False] * 8)
    store = RunStore(tmp_path)
    [key] = store.readers
    with ThreadPoolExecutor(1) as thread:  # a browser of other tests may have a loop in this one
        thread.submit(asyncio.run, store.load(key)).result()  # as the newest runs are at first
    store.num_lists = 1
    assert row_of(store, key) == ["0 of 8 right. 0 lost, 8 never right.", "0/8", ""]
    run.preview(50, [True] * 2 + [False] * 6)
    row_of(store, key)
    run.preview(100, [True] * 8)
    run.end(step=100)
    for is_shown in (False, True):
        store.watched[key] = int(is_shown)
        assert row_of(store, key) == [
            "8 of 8 right, from 0 before training.",
            "8/8",
            "\u2581\u2583\u2588",
        ]


def row_of(store: RunStore, key: str) -> list[str]:
    """Headline, right answers and their curve, as the list of runs has them now."""
    store._refresh()
    cells = dict(zip(COLUMNS, _cells(store.readers[key], store.judged(key)), strict=True))
    return [cells[name] for name in ("headline", "right", "by step")]


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
