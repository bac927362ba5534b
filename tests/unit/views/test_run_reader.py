"""RunReader says what the files say, no step twice, whoever wrote them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import OutputError
from trainer.monitoring.events import PhaseChanged
from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.views.facts import alerts_of, bar_figures, moment, report_figures
from trainer.views.page.list_page import _cells
from trainer.views.run_reader import RunReader, find_runs

MakeRun = Callable[..., Any]


def test_it_reads_bit_by_bit_what_the_status_reader_reads_as_a_whole(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 9, train_loss=3.0)
    run.preview(5, [True, False])
    run.evaluate(9, 2.0)
    run.read()
    again = type(run)(run.folder, start_step=4)  # a resume: steps 5 to 9 are made again
    again.steps(5, 12, train_loss=1.0)
    again.preview(5, [True, True])
    again.evaluate(12, 1.5)
    for reader in (run.read(), again.read()):  # one saw the interrupted steps, one did not
        whole = TrainingStatusReader(run.folder)
        steps = [line for line in whole.metrics() if line["type"] == "StepDone"]
        assert list(reader.metrics.steps) == [line["step"] for line in steps] == [*range(1, 13)]
        losses = [line["train_loss"] for line in steps]
        assert list(reader.metrics.columns["train_loss"]) == losses
        assert [one.step for one in reader.metrics.evaluations] == [12]
        assert len(reader.previews) == len(list(whole.previews())) == 2


def test_a_start_from_step_0_forgets_the_previews_of_step_0(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(0, [False, False, False])
    run.read()
    type(run)(run.folder).preview(0, [True])
    assert [result.matches for result in run.read().previews.newest()] == [True]


def test_poll_says_whether_anything_changed(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(1)
    assert run.reader.poll()
    assert not run.reader.poll()
    run.step(2)
    assert run.reader.poll()


def test_lines_that_no_run_writes_are_left_out_and_counted(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(1)
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n[1]\n\xff\n{"step": "x"}\n')
        file.write(b'{"step": 18446744073709551615}\n{"step": 99999999999999999999999}\n')
    with (run.folder / "previews.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "surprise": 1}\n')
    run.step(2)
    reader = run.read()
    assert list(reader.metrics.steps) == [1, 2]
    assert reader.num_bad_lines == 7


def test_a_broken_status_is_said_and_the_last_good_one_stays(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(1)
    assert run.read().problem is None
    (run.folder / "status.json").write_text('{"schema_version": 99}')
    reader = run.read()
    assert reader.problem is not None
    assert reader.status is not None


def test_the_state_in_words(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(420)
    status = run.read().status
    assert run.reader.words(now=status.updated_at) == "training, step 420 of 1000, 3 min left"
    run.end("completed")
    assert run.read().words() == "completed, step 1000 of 1000"


@pytest.mark.parametrize(
    ("state", "error_type", "message", "words"),
    [
        (
            "failed",
            "NonFiniteError",
            "step 81: the loss is nan; the weights are those of step 80.",
            "stopped on a non-finite loss at step 81",
        ),
        (
            "failed",
            "NonFiniteError",
            "step 7: the gradient norm is inf; the weights are those of step 6.",
            "stopped on a non-finite gradient norm at step 7",
        ),
        ("failed", "OSError", "disk full\nmore", "failed at step 80 of 1000: disk full"),
        (
            "stopped",
            None,
            "by SIGINT after step 80; continue with --resume",
            "stopped by SIGINT after step 80; continue with --resume",
        ),
    ],
)
def test_the_ending_in_words(
    made_up_run: MakeRun, state: str, error_type: str | None, message: str, words: str
) -> None:
    run = made_up_run()
    run.end(state, 80, error_type=error_type, error_message=message)
    assert run.read().words() == words


def test_a_run_that_nobody_has_waited_for_is_lost(made_up_run: MakeRun) -> None:
    """Whoever started it does not care: its number is still there."""
    run = made_up_run()
    run.step(1)
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    status = run.folder / "status.json"
    status.write_text(status.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {process.pid}'))
    assert run.read().state() == "lost"
    process.wait()


def test_a_killed_run_is_lost_and_a_living_one_is_not(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(81)
    assert run.read().state() == "training"
    kill(run.folder)
    assert run.read().state() == "lost"
    assert run.reader.words().startswith("stopped unexpectedly at step 81 of 1000")
    (run.folder / ".lock").write_text("process 1 on some-other-machine\n")
    assert run.reader.state() == "training"  # nothing can be said about other machines' processes


def test_runs_are_found_below_a_folder_and_links_are_not_followed(
    made_up_run: MakeRun, tmp_path: Path
) -> None:
    run = made_up_run()
    run.step(1)
    os.symlink(tmp_path, tmp_path / "loop")
    assert find_runs(tmp_path) == [run.folder]
    assert find_runs(run.folder) == [run.folder]
    with pytest.raises(OutputError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_a_manifest_that_is_a_link_is_not_read(made_up_run: MakeRun, tmp_path: Path) -> None:
    run = made_up_run()
    (tmp_path / "secret.json").write_text('{"key": "value"}')
    os.symlink(tmp_path / "secret.json", run.folder / "run.json")
    assert run.read().manifest == {}


def test_an_empty_folder_is_unknown_and_says_why(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    reader.poll()
    assert reader.state() == "unknown"
    assert "no such status file" in reader.words()


def test_a_run_that_hangs_says_so_and_stops_counting_down(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 420, step_time_s=0.2, eta_s=180.0)
    run.reader.poll()
    last = run.reader.metrics.newest("created_at")
    assert not run.reader.is_silent(now=last + 19)
    assert "3 min left" in run.reader.words(now=last + 19)
    assert run.reader.is_silent(now=last + 45)
    words = run.reader.words(now=last + 45)
    assert words == "no update for 45 s (a step takes 0.2 s); training, step 420 of 1000"


def test_steps_that_take_long_are_waited_for(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 3, step_time_s=30.0, eta_s=6000.0)
    run.reader.poll()
    last = run.reader.metrics.newest("created_at")
    assert not run.reader.is_silent(now=last + 250)
    assert run.reader.is_silent(now=last + 301)


def test_a_list_of_runs_that_reads_status_alone_knows_the_pace_too(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 500, step_time_s=30.0, eta_s=15_000.0)
    run.reader.poll_summary()
    assert not run.reader.is_silent(now=time.time() + 250)
    assert run.reader.is_silent(now=time.time() + 400)


@pytest.mark.parametrize(
    "text", ["making the previews of step 20 (4 prompts, 256 tokens)", "writing a checkpoint"]
)
def test_previews_evaluation_and_saving_take_what_they_take(
    made_up_run: MakeRun, text: str
) -> None:
    run = made_up_run()
    run.steps(1, 20)
    run.writer.on_event(PhaseChanged(state="training", text=text))
    run.reader.poll()
    assert not run.reader.is_silent(now=time.time() + 300)
    words = run.reader.words(now=time.time() + 300)
    assert words == f"{text}, step 20 of 1000"  # nothing is counted below zero


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        ([], "no checkpoint was written"),
        (
            ["step-00000040", "step-00000080", "step-00000090.tmp"],
            "step 80; continue with: trainer",
        ),
    ],
)
def test_a_broken_run_says_once_how_to_go_on(
    made_up_run: MakeRun, checkpoints: list[str], words: str
) -> None:
    run = made_up_run()
    run.step(81)
    for name in checkpoints:
        (run.folder / "checkpoints" / name).mkdir(parents=True)
    kill(run.folder)
    assert run.read().state() == "lost"
    said = [run.reader.words(), *(alert.text for alert in alerts_of(run.reader))]
    assert sum("checkpoint" in text or "--resume" in text for text in said) == 1
    assert words in " ".join(said)
    if checkpoints:
        assert f"trainer train --resume --output {run.folder}" in " ".join(said)


def kill(folder: Path) -> None:
    """The run's process is gone without a word."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = folder / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": ended.pid}))


def test_every_reader_counts_the_same_lines_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    """The run's own reader and the page's: one rule for lines that a resume made void."""

    def step(number: Any, loss: float) -> dict[str, Any]:
        return {"type": "StepDone", "step": number, "train_loss": loss, "total_steps": 9}

    lines: list[Any] = [
        *(step(number, 1.0) for number in range(1, 7)),
        {"type": "resumed", "step": True},  # none of ours: a line of a run has a whole number
        {"type": "resumed", "step": 2**60},
        {"type": "resumed", "step": 4},
        *(step(number, 2.0) for number in (5, 6, 7)),
        step(True, 9.0),
        {"type": "resumed", "step": 6},
        step(7, 3.0),
    ]
    preview = {"prompt": "p", "text": "t", "golden_answer": "t", "backend_type": "local"}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [
        {**preview, "step": 0},
        {**preview, "step": 5},
        {"type": "resumed", "step": 0},
        {**preview, "step": 0, "text": "again"},
    ]
    (tmp_path / "previews.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    (tmp_path / "run.json").write_text("{}")
    own, page = TrainingStatusReader(tmp_path), RunReader(tmp_path)
    page.poll()
    counted = [(row["step"], row["train_loss"]) for row in own.metrics()]
    assert counted == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 3.0)]
    columns = (page.metrics.steps, page.metrics.columns["train_loss"])
    assert list(zip(*map(list, columns), strict=True)) == counted
    assert [(one.step, one.text) for one in own.previews()] == [(0, "again")]
    of_page = [one for at in page.previews.steps for one in page.previews.of_step(at)]
    assert [(one.step, one.text) for one in of_page] == [(0, "again")]


def test_the_duration_of_a_resumed_run_is_that_of_all_its_parts(
    made_up_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    began = now[0]
    run = made_up_run()
    now[0] += 3000
    run.step(40)
    now[0] += 9000  # stopped over lunch
    run = made_up_run(start_step=40)
    now[0] += 600
    run.end("stopped", 40)
    reader = run.read()
    assert (reader.began_at(), reader.duration_s()) == (began, 3600)
    assert "1 h 00 min" in bar_figures(reader)
    assert "1 h 00 min" in _cells(reader, None)
    figures = dict(report_figures(reader))
    assert (figures["duration"], figures["resumed"]) == ("1 h 00 min", "at step 40")
    assert figures["epochs"] == "0.04 of 1"
    assert figures["began"] == moment(began)
