"""control.json: each command once, and whatever else lies there is reported once and ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.monitoring.control import ControlFile, ControlWriter

Said = list[tuple[str, str]]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def control(tmp_path: Path, said: Said) -> ControlFile:
    return ControlFile(tmp_path, lambda text, level: said.append((level, text)))


def test_a_command_is_done_once_and_acknowledged(
    control: ControlFile, said: Said, tmp_path: Path
) -> None:
    assert control.poll() == frozenset()
    writer = ControlWriter(tmp_path)
    first = writer.send("preview")
    assert writer.outcome([]) == "Preview now: sent, done at the end of the step."
    second = writer.send("save")
    assert control.poll() == {"preview", "save"}
    control.acknowledge(42, is_previewed=True)
    texts = [text for _, text in said]
    assert texts == [
        f"control: previews at step 42 ({first})",
        f"control: checkpoint of step 42 ({second})",
    ]
    assert writer.outcome(texts) == texts[1]
    writer.send("stop")  # the file holds the earlier commands still
    assert control.poll() == {"stop"}


def test_commands_of_before_the_start_do_not_count(tmp_path: Path) -> None:
    ControlWriter(tmp_path).send("stop")
    control = ControlFile(tmp_path, lambda text, level: None)
    assert control.poll() == frozenset()
    ControlWriter(tmp_path).send("save")
    assert control.poll() == {"save"}


def test_previews_that_are_off_are_said_to_be(control: ControlFile, said: Said) -> None:
    ControlWriter(control.path.parent).send("preview")
    control.poll()
    control.acknowledge(7, is_previewed=False)
    assert "no previews: this run makes none" in said[0][1]


def test_a_mark_is_known_after_a_resume(control: ControlFile, tmp_path: Path) -> None:
    ControlWriter(tmp_path).send("mark_best")
    control.poll()
    control.acknowledge(9, is_previewed=False)
    assert control.marked_step == 9
    assert ControlFile(tmp_path, lambda text, level: None).marked_step == 9


def test_the_page_asks_for_the_step_it_shows(control: ControlFile, tmp_path: Path) -> None:
    writer = ControlWriter(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert writer.mark_question(3) == (
        "Keep the checkpoint of step 3, whose answers you see, as the best?",
        True,
    )
    question, is_possible = writer.mark_question(4)
    assert (is_possible, "step 4" in question.lower()) == (False, True)
    assert writer.mark_question(None)[1]
    writer.send("mark_best", step=3)
    control.poll()
    assert not control.is_save_asked(7)  # its checkpoint is there
    control.acknowledge(7, is_previewed=False)
    assert control.marked_step == 3


def _command(**changes: Any) -> str:
    entry = {"id": "a", "command": "stop", "created_at": 0.0, **changes}
    return json.dumps({"schema_version": 1, "commands": [entry]})


def _link(path: Path) -> None:
    target = path.parent / "elsewhere.json"
    target.write_text(_command())
    os.symlink(target, path)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"\xff\x00not json"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text(json.dumps({"schema_version": 2, "commands": []})),
        lambda path: path.write_text(_command(command="rm -rf /")),
        lambda path: path.write_text(_command(id="../../etc/passwd")),
        lambda path: path.write_text(_command(id="x" * 65)),
        lambda path: path.write_text(_command(extra=1)),
        lambda path: path.write_text(_command(step=3)),
        lambda path: path.write_text(_command(command="mark_best", step=-1)),
        lambda path: path.write_text(_command(command="mark_best", step="3")),
        lambda path: path.write_text(
            json.dumps({"schema_version": 1, "commands": [{"id": "a", "command": "stop"}] * 21})
        ),
        lambda path: path.write_text(_command() + " " * 70_000),
        _link,
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ],
    ids=[
        *(
            "bytes",
            "deep",
            "version",
            "command",
            "path",
            "long",
            "extra",
            "step",
            "below",
            "text",
            "many",
            "large",
        ),
        *("link", "pipe", "folder"),
    ],
)
def test_a_hostile_file_is_reported_once_and_ignored(
    control: ControlFile, said: Said, make: Callable[[Path], object]
) -> None:
    make(control.path)
    for _ in range(3):
        assert control.poll() == frozenset()
    assert [level for level, _ in said] == ["warning"]
    assert len(said[0][1]) < 1000


def test_a_good_file_in_the_place_of_a_bad_one_is_obeyed(control: ControlFile) -> None:
    control.path.write_text("{")
    control.poll()
    control.path.write_text(_command())
    assert control.poll() == {"stop"}
