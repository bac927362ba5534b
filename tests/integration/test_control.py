"""Acting on a run that trains: control.json is obeyed at the end of a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.core import TrainerEngine
from trainer.core.checkpoint import find_checkpoint
from trainer.files import checkpoint_steps
from trainer.monitoring import TrainingStatusReader
from trainer.monitoring.control import ControlWriter
from trainer.monitoring.events import Event, StepDone
from trainer.views.run_reader import RunReader

ROOT = Path(__file__).parents[2]


class Person:
    """An observer that does something in the run folder when a step is reported."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        """Take step -> what is done while that step ends."""
        self.actions = actions

    def on_event(self, event: Event) -> None:
        """Act, if it is the step."""
        if isinstance(event, StepDone) and event.step in self.actions:
            self.actions[event.step]()

    def close(self) -> None:
        """Nothing to let go of."""


def send(folder: Path, *commands: str) -> Callable[[], object]:
    return lambda: [ControlWriter(folder).send(command) for command in commands]


def texts_of(folder: Path) -> list[str]:
    return [notice.text for notice in TrainingStatusReader(folder).read().notices]


def test_stop_ends_like_a_finished_run_and_a_resume_goes_on_without_obeying_it_again(
    job: Callable[..., Any], tmp_path: Path, assert_same_weights: Callable[..., None]
) -> None:
    straight = TrainerEngine().run_job(job("straight"))
    config = job()
    person = Person({3: send(tmp_path / "out", "stop")})
    result = TrainerEngine(observers=[person]).run_job(config)
    assert (result.state, result.exit_code, result.global_step) == ("stopped", 0, 3)
    assert (result.success, result.model_path) == (True, tmp_path / "out" / "final_model")
    assert result.checkpoint_path is not None
    assert_same_weights(result.model_path, result.checkpoint_path)
    assert result.error_message is not None
    assert "by the control file after step 3" in result.error_message
    assert any("control: stop after step 3" in text for text in texts_of(result.output_dir))
    check_stop_is_told(result.output_dir)
    output = config.output.model_copy(update={"resume": "latest"})
    again = TrainerEngine().run_job(config.model_copy(update={"output": output}))
    assert (again.state, again.global_step) == ("completed", 12)
    assert again.summary["ended_by"] == "steps"
    assert_same_weights(straight.model_path, again.model_path)


def check_stop_is_told(folder: Path) -> None:
    """run.json, status.json and the page's words, after a stop by the control file at step 3."""
    record = json.loads((folder / "run.json").read_text())
    assert (record["state"], record["exit_code"]) == ("stopped", 0)
    assert record["summary"]["ended_by"] == "control"
    reader = RunReader(folder)
    reader.poll()
    assert reader.words().startswith("stopped by the control file after step 3; its model is saved")
    previews = {result.step for result in TrainingStatusReader(folder).previews()}
    assert previews == {0, 3}  # of the weights it ended with, as of any finished run
    assert reader.metrics.evaluations[-1].step == 3


def test_stop_at_the_last_step_is_too_late_to_change_anything(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    person = Person({12: send(tmp_path / "out", "stop")})
    result = TrainerEngine(observers=[person]).run_job(job())
    assert (result.state, result.exit_code) == ("completed", 0)
    assert result.summary["ended_by"] == "steps"


def test_a_signal_after_a_stop_by_the_file_is_a_signals_stop(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    def both() -> None:
        ControlWriter(tmp_path / "out").send("stop")
        os.kill(os.getpid(), signal.SIGTERM)

    result = TrainerEngine(observers=[Person({3: both})]).run_job(job())
    assert (result.state, result.exit_code, result.model_path) == ("stopped", 143, None)
    assert result.summary["ended_by"] == "SIGTERM"
    assert not (tmp_path / "out" / "final_model").exists()


MARKS = {"keep_checkpoints": 1, "checkpoint_interval": 3}


@pytest.mark.parametrize("judged", [3, 5, None], ids=["earlier", "the one that ends", "not named"])
def test_a_mark_is_of_the_step_that_was_judged(
    job: Callable[..., Any], tmp_path: Path, judged: int | None
) -> None:
    folder = tmp_path / "out"
    person = Person({5: lambda: ControlWriter(folder).send("mark_best", step=judged)})
    config = job(output=MARKS, monitoring={"inference_interval": 0, "micro_eval_interval": 0})
    assert TrainerEngine(observers=[person]).run_job(config).success
    marked = judged or 5
    assert json.loads((folder / "best.json").read_text()) == {"step": marked}
    assert checkpoint_steps(folder / "checkpoints") == [marked, 12]
    assert find_checkpoint(folder, "best").step == marked


def test_a_step_without_a_checkpoint_is_not_marked_and_no_other_in_its_place(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    person = Person({5: lambda: ControlWriter(folder).send("mark_best", step=4)})
    config = job(output=MARKS, monitoring={"inference_interval": 0, "micro_eval_interval": 0})
    result = TrainerEngine(observers=[person]).run_job(config)
    assert result.success
    [said] = [text for text in texts_of(folder) if text.startswith("control:")]
    assert "step 4 is not marked as best: it has no checkpoint" in said
    assert not (folder / "best.json").exists()
    assert checkpoint_steps(folder / "checkpoints") == [12]


def test_preview_save_and_mark_are_done_once_and_the_marked_checkpoint_stays(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    config = job(
        output={"keep_checkpoints": 1, "checkpoint_interval": 4},
        monitoring={"inference_interval": 100},
    )
    folder = tmp_path / "out"
    person = Person({3: send(folder, "preview", "mark_best"), 7: send(folder, "save")})
    result = TrainerEngine(observers=[person]).run_job(config)
    assert result.success, result.error_message
    steps = {result.step for result in TrainingStatusReader(folder).previews()}
    assert steps == {0, 3, 12}
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    # 3 was marked; the last one is kept; the best by validation loss may be one of the others.
    assert {"step-00000003", "step-00000012"} <= set(kept)
    said = [text for text in texts_of(folder) if text.startswith("control:")]
    assert len(said) == 3
    assert "step 3 marked as best" in said[1]
    assert "checkpoint of step 7" in said[2]


def test_a_hostile_file_changes_nothing(job: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "out" / "control.json"
    person = Person({2: lambda: path.write_text('{"commands": "stop"}' * 9)})
    result = TrainerEngine(observers=[person]).run_job(job())
    assert (result.state, result.global_step) == ("completed", 12)
    assert sum("control.json is ignored" in text for text in texts_of(result.output_dir)) == 1


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(qa_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "from trainer.config import create_default_config\n"
        "from trainer.core import TrainerEngine\n"
        "from trainer.monitoring.control import ControlWriter\n"
        "from trainer.monitoring.events import StepDone\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "class Person:\n"
        "    def on_event(self, event):\n"
        "        if isinstance(event, StepDone) and event.step == 2:\n"
        "            ControlWriter(folder).send('stop')\n"
        "    def close(self): pass\n"
        "config = create_default_config(model_path='tiny', dataset_path=sys.argv[1],\n"
        "    output_dir=str(folder), hyperparams={'max_steps': 20, 'batch_size': 2,\n"
        "    'fp_precision': 'fp32', 'max_length': 64}, environment={'device': 'cpu'},\n"
        "    monitoring={'report_to': (), 'inference_interval': 0, 'display': 'quiet'})\n"
        "result = TrainerEngine(observers=[Person()]).run_job(config)\n"
        "print('END', os.environ['RANK'], os.environ['WORLD_SIZE'], result.global_step,\n"
        "      result.error_message, flush=True)\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *(script, qa_file, tmp_path / "two"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ends = sorted(line.split()[:4] for line in done.stdout.splitlines() if line.startswith("END"))
    assert ends == [["END", "0", "2", "2"], ["END", "1", "2", "2"]], done.stdout + done.stderr
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 2)
