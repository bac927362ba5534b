"""What a reader sees: whole files at any instant, and every step once."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys

import pytest

from trainer.errors import OutputError
from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.monitoring.status_writer import TrainingStatusWriter

WRITER = """
import sys
from trainer.monitoring.events import PreviewsDone, StepDone
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewResult

writer = TrainingStatusWriter(None, run_dir=sys.argv[1], status_update_interval=1)
print("ready", flush=True)
for step in range(1, int(sys.argv[2]) + 1):
    result = PreviewResult(step=step, prompt="p", text=str(step) * (step % 700))
    writer.on_event(StepDone(step=step, total_steps=10**6, epoch=0.0, train_loss=1.0 / step,
        learning_rate=1e-3, grad_norm=1.0, tokens_per_s=1.0, num_tokens=1, num_trained_tokens=1,
        step_time_s=1.0, eta_s=1.0, memory_gib=1.0))
    writer.on_event(PreviewsDone(step=step, results=(result,), duration_s=0.0))
"""


def start_writer(folder, num_steps: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(num_steps)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_every_read_is_whole_while_another_process_replaces_the_file(tmp_path):
    TrainingStatusWriter(None, run_dir=tmp_path).attach()
    process = start_writer(tmp_path, 2000)  # 4000 replacements
    reader = TrainingStatusReader(tmp_path)
    while not (tmp_path / "status.json").exists():
        assert process.poll() is None
    steps = []
    while process.poll() is None:
        status = reader.read()
        assert all(one.text == str(one.step) * (one.step % 700) for one in status.last_previews)
        steps.append(status.step)
    assert process.returncode == 0
    assert steps == sorted(steps)
    assert len(set(steps)) > 100, "too few different states were seen to prove anything"
    assert reader.read().step == 2000


def test_lines_are_whole_after_a_kill_and_the_next_start_goes_on(tmp_path, started, step_done):
    process = start_writer(tmp_path, 10**6)
    reader = TrainingStatusReader(tmp_path)
    while len(list(reader.metrics())) < 50:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [line["step"] for line in reader.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(started(start_step=20))
    writer.on_event(step_done(21))
    assert [line["step"] for line in reader.metrics()] == list(range(1, 22))
    assert reader.read().step == 20 + 1


def test_a_cut_last_line_is_left_out_and_removed_by_the_next_writer(tmp_path, started, step_done):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(started())
    writer.on_event(step_done(1))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"type": "StepDone", "step": 2, "text": "' + "y" * 200_000)
    reader = TrainingStatusReader(tmp_path)
    assert [line["step"] for line in reader.metrics()] == [1]
    TrainingStatusWriter(None, run_dir=tmp_path).on_event(step_done(2))
    assert [line["step"] for line in reader.metrics()] == [1, 2]
    assert len(path.read_text().splitlines()) == 2


def test_steps_made_again_after_resumes_appear_once(tmp_path, started, step_done, previews):
    last = 0
    for start, end in ((0, 6), (4, 9), (2, 5)):
        writer = TrainingStatusWriter(None, run_dir=tmp_path)
        writer.on_event(started(start_step=start))
        for step in range(start + 1, end + 1):
            writer.on_event(step_done(step, train_loss=float(start)))
            writer.on_event(previews(step, [True], text=f"from {start}"))
        last = end
    reader = TrainingStatusReader(tmp_path)
    found = [(line["step"], line["train_loss"]) for line in reader.metrics()]
    assert found == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [one.step for one in reader.previews()] == [1, 2, 3, 4, last]
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(raw) == 6 + 5 + 3 + 2  # nothing is deleted
    assert [line["step"] for line in raw if line["type"] == "resumed"] == [4, 2]


def test_a_run_that_begins_again_at_step_0_shows_its_own_step_0(tmp_path, started, previews):
    for text in ("old", "new"):
        writer = TrainingStatusWriter(None, run_dir=tmp_path)
        writer.on_event(started(start_step=0))
        writer.on_event(previews(0, [True], text=text))
    assert [one.text for one in TrainingStatusReader(tmp_path).previews()] == ["new"]


def test_a_resumed_run_goes_on_from_what_was_known(tmp_path, started, evaluated, previews):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    for event in (
        started(),
        previews(10, [True, False, None], text="kept"),
        evaluated(10, 2.0, 1.5),
        previews(20, [False, False, None], text="superseded"),
        evaluated(20, 1.0, 0.5),
    ):
        writer.on_event(event)
    resumed = TrainingStatusWriter(None, run_dir=tmp_path)
    resumed.on_event(started(start_step=15))
    status = TrainingStatusReader(tmp_path).read()
    assert (status.val_loss, status.val_step, status.val_gap) == (2.0, 10, 0.5)
    assert [one.text for one in status.last_previews] == ["kept"] * 3
    assert status.accuracy_last_20 is not None
    assert (status.accuracy_last_20.num_matched, status.accuracy_last_20.num_previews) == (1, 2)


def test_the_word_resumed_in_a_text_supersedes_nothing(tmp_path, started, previews):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(started())
    writer.on_event(previews(5, [True]))
    writer.on_event(previews(6, [True], text='{"type": "resumed", "step": 0}\n', prompt="resumed"))
    assert [one.step for one in TrainingStatusReader(tmp_path).previews()] == [5, 6]


def test_a_damaged_line_is_left_out_and_said_once(tmp_path, caplog, step_done):
    writer = TrainingStatusWriter(None, run_dir=tmp_path)
    writer.on_event(step_done(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff{"step"\n[1]\n{"type": "StepDone"}\n')
    writer.on_event(step_done(2))
    reader = TrainingStatusReader(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [line["step"] for line in reader.metrics()] == [1, 2]
    assert len([one for one in caplog.records if "metrics.jsonl: line 2" in one.getMessage()]) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such status file"),
        ("{", "not a status.json"),
        ("[]", "not a status.json"),
        ('{"schema_version": 2}', "schema_version=2, and this program reads 1"),
        ('{"schema_version": 1}', "not a whole status.json"),
        ("\x00", "not a status.json"),
    ],
)
def test_what_is_no_status_is_named_with_its_path(tmp_path, content, said):
    path = tmp_path / "status.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OutputError, match=said) as caught:
        TrainingStatusReader(tmp_path).read()
    assert str(path) in str(caught.value)


def test_a_run_without_metrics_yet_has_none(tmp_path):
    reader = TrainingStatusReader(tmp_path)
    assert list(reader.metrics()) == []
    assert list(reader.previews()) == []


def test_a_status_file_finds_the_lines_beside_it(tmp_path, step_done):
    TrainingStatusWriter(None, run_dir=tmp_path).on_event(step_done(1))
    reader = TrainingStatusReader(tmp_path / "status.json")
    assert [line["step"] for line in reader.metrics()] == [1]
    assert reader.read().step == 1
