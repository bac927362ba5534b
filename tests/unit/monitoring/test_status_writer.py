"""What TrainingStatusWriter puts on disk, and that no trouble with a disk stops it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.monitoring.events import CheckpointSaved, Notice, PhaseChanged, RowShown, RunEnded
from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.monitoring.status_writer import TrainingStatusWriter


def strict_json(text: str):
    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_status_goes_to_the_own_path_and_to_the_run_folder(tmp_path, started):
    writer = TrainingStatusWriter(tmp_path / "status.json", run_dir=tmp_path / "run")
    writer.on_event(started(model_name="tiny"))
    texts = {(tmp_path / place / "status.json").read_text() for place in ("", "run")}
    assert len(texts) == 1
    assert strict_json(texts.pop())["model_name"] == "tiny"
    assert sorted(os.listdir(tmp_path / "run")) == ["status.json"]


def test_the_run_folder_may_be_named_later(tmp_path, started, step_done):
    writer = TrainingStatusWriter(None)
    writer.on_event(PhaseChanged(state="loading", text="loading tiny"))
    assert os.listdir(tmp_path) == []
    writer.attach(run_dir=tmp_path / "run", context_window=64, model_name="tiny")
    status = TrainingStatusReader(tmp_path / "run").read()
    assert (status.state, status.phase, status.context_window) == ("loading", "loading tiny", 64)
    writer.on_event(started())
    writer.on_event(step_done(1))
    assert [line["step"] for line in TrainingStatusReader(tmp_path / "run").metrics()] == [1]


def test_status_holds_the_newest_value_of_everything(tmp_path, started, step_done, evaluated):
    writer = TrainingStatusWriter(tmp_path / "status.json")
    for event in (
        started(),
        step_done(1, train_loss=3.0),
        step_done(2, train_loss=2.0, grad_norm=0.25),
        evaluated(2, 2.5, 2.0),
        CheckpointSaved(step=2, path="run/checkpoints/step-00000002", duration_s=0.1),
        Notice(text="a row was cut", level="warning"),
    ):
        writer.on_event(event)
    status = TrainingStatusReader(tmp_path / "status.json").read()
    assert (status.step, status.train_loss, status.grad_norm) == (2, 2.0, 0.25)
    assert (status.val_loss, status.val_gap, status.val_step) == (2.5, 0.5, 2)
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.step == 2
    assert [notice.text for notice in status.notices] == ["a row was cut"]
    assert (status.state, status.eta_s, status.pid) == ("training", 180.0, os.getpid())


def test_status_is_written_every_nth_step_and_at_the_first_and_last(tmp_path, started, step_done):
    path = tmp_path / "status.json"
    writer = TrainingStatusWriter(path, status_update_interval=4)
    writer.on_event(started(total_steps=11))
    seen = []
    for step in range(1, 12):
        writer.on_event(step_done(step, total_steps=11))
        seen.append(TrainingStatusReader(path).read().step)
    assert seen == [1, 1, 1, 4, 4, 4, 4, 8, 8, 8, 11]


def test_close_writes_what_was_not_written_yet(tmp_path, started, step_done):
    writer = TrainingStatusWriter(tmp_path / "status.json", status_update_interval=50)
    writer.on_event(started())
    for step in (1, 2, 3):
        writer.on_event(step_done(step))
    writer.on_event(RowShown(step=3, prompt="p", golden_answer="g"))
    writer.close()
    status = TrainingStatusReader(tmp_path / "status.json").read()
    assert status.step == 3
    assert status.training_row is not None
    assert status.training_row.golden_answer == "g"


def test_long_texts_are_cut_in_status_and_whole_in_previews(tmp_path, started, previews):
    writer = TrainingStatusWriter(None, run_dir=tmp_path, max_output_tokens=5)
    writer.on_event(started())
    writer.on_event(previews(0, [False], text="y" * 21))
    writer.on_event(previews(10, [True], text="y" * 20))
    status = TrainingStatusReader(tmp_path).read()
    assert [(one.text, one.truncated) for one in status.last_previews] == [("y" * 20, False)]
    writer.on_event(previews(20, [False], text="y" * 21))
    (preview,) = TrainingStatusReader(tmp_path).read().last_previews
    assert (preview.text, preview.truncated) == ("y" * 20, True)
    assert [len(one.text) for one in TrainingStatusReader(tmp_path).previews()] == [21, 20, 21]


def test_accuracy_counts_the_last_20_and_50_with_golden(tmp_path, previews):
    writer = TrainingStatusWriter(tmp_path / "status.json")
    for step in range(12):  # 24 wrong, 24 right, and prompts without golden, which do not count
        writer.on_event(previews(step, [step >= 6] * 4))
        writer.on_event(previews(step, [None], golden_answer=None))
    status = writer.status
    assert status.accuracy_last_20 is not None
    assert status.accuracy_last_50 is not None
    assert (status.accuracy_last_20.num_matched, status.accuracy_last_20.num_previews) == (20, 20)
    assert (status.accuracy_last_50.num_matched, status.accuracy_last_50.num_previews) == (24, 48)
    assert status.accuracy_last_50.share == 0.5


def test_numbers_that_json_cannot_hold_become_null_and_a_notice(tmp_path, started, step_done):
    writer = TrainingStatusWriter(None, run_dir=tmp_path, status_update_interval=1)
    writer.on_event(started())
    for step in (1, 2, 3):
        writer.on_event(step_done(step, train_loss=float("nan"), grad_norm=float("inf")))
    status = strict_json((tmp_path / "status.json").read_text())
    assert (status["train_loss"], status["grad_norm"]) == (None, None)
    assert len(status["notices"]) == 2  # said once per field
    assert "train_loss is nan" in status["notices"][0]["text"]
    line = strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["train_loss"] is None
    assert line["non_finite"] == {"train_loss": "nan", "grad_norm": "inf"}


def test_odd_texts_and_summaries_are_still_json(tmp_path, previews):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(
        previews(1, [False], text="\x00\ud800\u2028 \N{GRINNING FACE}", tokens_per_sec=float("inf"))
    )
    summary = {"path": Path("a"), "rate": float("-inf"), "counts": {1: (2, 3)}}
    writer.on_event(RunEnded(state="completed", step=1, summary=summary))
    status = TrainingStatusReader(tmp_path).read()
    assert status.summary == {"path": "a", "rate": None, "counts": {"1": [2, 3]}}
    assert status.last_previews[0].text == "\x00?\u2028 \N{GRINNING FACE}"
    (result,) = TrainingStatusReader(tmp_path).previews()
    assert (result.text, result.tokens_per_sec) == ("\x00?\u2028 \N{GRINNING FACE}", 0.0)


def test_a_failed_run_says_why_and_a_stopped_one_is_no_error(tmp_path):
    path = tmp_path / "status.json"
    writer = TrainingStatusWriter(path)
    writer.on_event(
        RunEnded(state="failed", step=3, error_type="NonFiniteError", error_message="nan")
    )
    status = TrainingStatusReader(path).read()
    assert status.error is not None
    assert (status.state, status.error.type, status.error.message) == (
        "failed",
        "NonFiniteError",
        "nan",
    )
    writer.on_event(RunEnded(state="stopped", step=4, error_message="stopped by Ctrl-C"))
    status = TrainingStatusReader(path).read()
    assert (status.state, status.phase, status.error) == ("stopped", "stopped by Ctrl-C", None)


def test_a_second_run_of_one_writer_starts_afresh(tmp_path, started, step_done):
    writer = TrainingStatusWriter(tmp_path / "status.json", model_name="tiny")
    writer.attach(run_dir=tmp_path / "one")
    for event in (started(), step_done(1), RunEnded(state="completed", step=1)):
        writer.on_event(event)
    writer.on_event(PhaseChanged(state="loading", text="again"))
    status = TrainingStatusReader(tmp_path / "status.json").read()
    assert (status.state, status.step, status.train_loss) == ("loading", 0, None)
    assert (status.model_name, writer.run_dir) == ("tiny", None)
    assert TrainingStatusReader(tmp_path / "one").read().state == "completed"


def test_a_vanished_folder_is_said_once_and_tried_again(tmp_path, caplog, started, step_done):
    run = tmp_path / "run"
    writer = TrainingStatusWriter(tmp_path / "status.json", run_dir=run, status_update_interval=1)
    writer.on_event(started())
    run.rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            writer.on_event(step_done(step))
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "metrics.jsonl: cannot be written" in text]) == 1
    assert any("lines of it are missing" in notice.text for notice in writer.status.notices)
    assert TrainingStatusReader(tmp_path / "status.json").read().step == 3
    (tmp_path / "gone").rename(run)
    writer.on_event(step_done(4))
    assert [line["step"] for line in TrainingStatusReader(run).metrics()] == [4]
    assert TrainingStatusReader(run).read().step == 4


FULL_DISK = """
import os, resource, signal, sys
from trainer.monitoring.events import PhaseChanged, PreviewsDone
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewResult

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = TrainingStatusWriter(None, run_dir=sys.argv[1])
def previews(step, size):
    result = PreviewResult(step=step, prompt="p", text="y" * size)
    writer.on_event(PreviewsDone(step=step, results=(result,), duration_s=0))
previews(1, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))  # as a full disk does
previews(2, 5000)
print([name for name in os.listdir(sys.argv[1]) if name.endswith(".tmp")])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
previews(3, 10)
"""


def test_a_full_disk_leaves_whole_files_and_no_temporary_ones(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 2  # previews.jsonl and status.json, once each
    assert done.stdout.strip() == "[]", "a temporary file was left beside the full disk"
    assert [one.step for one in TrainingStatusReader(tmp_path).previews()] == [1, 3]
    assert TrainingStatusReader(tmp_path).read().last_previews[0].step == 3


def test_leftovers_of_killed_writers_are_removed_and_those_of_others_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".status.json.{dead.pid}.tmp"
    alive = tmp_path / f".status.json.{os.getppid()}.tmp"
    other = tmp_path / ".notes.tmp"
    for path in (stale, alive, other):
        path.write_text("{")
    TrainingStatusWriter(tmp_path / "status.json").on_event(Notice(text="hello"))
    assert not stale.exists()
    assert alive.exists()
    assert other.exists()


def test_importing_the_writer_loads_no_torch():
    code = "import sys, trainer.monitoring.status_writer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_superseded_previews_are_recorded_and_leave_the_newest_answers_in_place(
    tmp_path, started, previews
):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(started())
    writer.on_event(previews(5, [True, False]))
    gone = {"error_message": "superseded by the weights of step 15", "text": ""}
    writer.on_event(previews(10, [None, None], is_superseded=True, **gone))
    reader = TrainingStatusReader(tmp_path)
    assert [one.step for one in reader.read().last_previews] == [5, 5]
    assert [one.step for one in reader.previews()] == [5, 5, 10, 10]
    assert reader.read().accuracy_last_20.num_previews == 2


def test_a_resumed_run_counts_the_time_of_all_its_processes_and_knows_where_it_stands(
    tmp_path, monkeypatch, started, step_done
):
    """Killed while it loads in between: its time counts too, and nothing of before is lost."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def process(seconds, *events):
        writer = TrainingStatusWriter(None, run_dir=tmp_path)
        clock[0] += seconds
        for event in events:
            writer.on_event(event)
        writer.close()
        return TrainingStatusReader(tmp_path).read()

    loading = PhaseChanged(state="loading", text="loading")
    process(100.0, loading, started(), *map(step_done, (1, 2, 3, 4)))
    clock[0] += 5000.0  # nobody trains
    process(7.0, loading)
    clock[0] += 300.0
    status = process(20.0, started(start_step=2))
    assert (status.began_at, status.started_at) == (1000.0, 6407.0)
    assert (status.earlier_s, status.updated_at - status.started_at) == (107.0, 20.0)
    assert (status.step, status.epoch, status.train_loss) == (2, 0.02, 2.5)
    assert (status.total_steps, status.eta_s) == (100, None)
    status = process(1.0, started(), step_done(1))  # from the beginning: another run
    assert (status.earlier_s, status.began_at) == (0.0, status.started_at)


def test_a_status_that_cannot_be_read_is_no_time_before_and_is_said(tmp_path, caplog, started):
    (tmp_path / "status.json").write_text("{}")
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(started(start_step=2))
    assert TrainingStatusReader(tmp_path).read().earlier_s == 0.0
    assert "the time of earlier processes is not counted" in caplog.text
