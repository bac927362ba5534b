"""A page is told what changed since it last asked, and everything only where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.preview.base import PreviewResult
from trainer.views.page.answer_data import CELL_CHARS, answer_of, answers_of_step
from trainer.views.page.panel_data import CurvesData, RowsData
from trainer.views.run_reader import RunReader


def result_of(step: int, number: int, **changes: Any) -> PreviewResult:
    values = {"prompt": f"prompt {number}?", "prompt_id": f"validation-{number}", "text": "5"}
    return PreviewResult.model_validate(
        {"step": step, "golden_answer": "4", "matches": False, **values, **changes}
    )


@pytest.fixture
def reader(tmp_path: Path) -> RunReader:
    found = RunReader(tmp_path)
    for step in (0, 10, 20):
        for number in range(3):
            found.previews.add(result_of(step, number, matches=step >= 10 * number and step > 0))
    return found


def test_a_new_step_is_told_alone_and_a_late_answer_tells_its_step_again(
    reader: RunReader,
) -> None:
    rows = RowsData(reader)
    first = rows.since(0)
    assert first is not None
    assert [(step, marks) for step, marks, *_ in first["columns"]] == [
        (0, "xxx"),
        (10, "==x"),
        (20, "==="),
    ]
    assert len(first["names"]) == len(first["verdicts"]) == 3
    assert rows.since(reader.previews.clock) is None
    clock = reader.previews.clock
    for number in range(3):
        reader.previews.add(result_of(30, number, matches=number != 1))
    told = rows.since(clock)
    assert told is not None
    assert not told["whole"]
    assert told["names"] is None
    assert [column[:2] for column in told["columns"]] == [[30, "=x="]]
    assert [verdict[:3] for verdict in told["verdicts"]] == [[1, "lost", "lost at 30"]]
    assert told["order"] == [1, 0, 2]
    clock = reader.previews.clock
    reader.previews.add(result_of(10, 2, matches=True))
    told = rows.since(clock)
    assert told is not None
    assert [column[:2] for column in told["columns"]] == [[10, "==="]]


def test_after_a_resume_everything_is_told_again(reader: RunReader) -> None:
    rows = RowsData(reader)
    rows.since(0)
    clock = reader.previews.clock
    reader.previews.drop_after(10)
    told = rows.since(clock)
    assert told is not None
    assert told["whole"]
    assert [column[0] for column in told["columns"]] == [0, 10]


def test_the_loss_is_told_bit_by_bit_and_again_after_a_resume(reader: RunReader) -> None:
    for step in range(1, 101):
        reader.metrics.add({"type": "StepDone", "step": step, "train_loss": 1 / step})
    curves = CurvesData(reader)
    first = curves.since(0, 0, 0)
    assert (first["whole"], first["count"], first["last"]) == (True, 100, 100)
    assert len(first["raw"]) == len(first["smooth"]) == 100
    reader.metrics.add({"type": "StepDone", "step": 101, "train_loss": 0.5})
    more = curves.since(100, 100, first["stride"])
    assert (more["whole"], more["raw"]) == (False, [[101, 0.5]])
    assert len(more["smooth"]) < 10  # those near the end, whose window has grown
    reader.metrics.drop_after(50)
    assert curves.since(101, 101, first["stride"])["whole"]
    for step in range(51, 152):
        reader.metrics.add({"type": "StepDone", "step": step + 1, "train_loss": 1.0})
    assert curves.since(101, 101, first["stride"])["whole"]  # longer again, and not the same


def test_a_curve_that_becomes_long_enough_is_smoothed_from_its_beginning(reader: RunReader) -> None:
    curves = CurvesData(reader)
    for step in range(1, 101):
        reader.metrics.add({"type": "StepDone", "step": step, "train_loss": float(step % 2)})
    short = curves.since(0, 0, 0)
    assert (short["smoothing"], short["smooth"]) == ("", short["raw"])
    for step in range(101, 131):
        reader.metrics.add({"type": "StepDone", "step": step, "train_loss": float(step % 2)})
    longer = curves.since(100, 100, short["stride"])
    assert (longer["whole"], longer["smooth_whole"]) == (False, True)
    assert longer["smoothing"] == "running median"
    assert len(longer["smooth"]) == 130


def test_an_answer_is_that_of_the_step_or_of_the_one_before_it(reader: RunReader) -> None:
    found = answer_of(reader, 1, 15)
    assert found is not None
    assert (found["step"], found["words"]) == (10, "first difference at word 1")
    assert found["golden_pieces"] == [["missing", "4"]]
    assert answer_of(reader, 1, None)["step"] == 20  # type: ignore[index]
    assert answer_of(reader, 3, 0) is None
    assert answer_of(reader, -1, 0) is None
    assert found["is_same_as_before"]


def test_in_the_table_of_all_answers_a_late_difference_is_seen(reader: RunReader) -> None:
    words = "word " * 400
    reader.previews.add(result_of(40, 0, golden_answer=f"{words}59", text=f"{words}95 end"))
    [row] = answers_of_step(reader, 40)
    for side, marked in ((row["golden"], "59"), (row["text"], "95 end")):
        assert sum(len(text) for _, text in side) <= CELL_CHARS + 10
        assert marked in "".join(text for kind, text in side if kind != "same")
