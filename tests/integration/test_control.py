"""Acting on a run that trains: control.json is obeyed at the end of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.core import TrainerEngine
from trainer.monitor.control_writer import ControlWriter
from trainer.monitoring import TrainingStatusReader
from trainer.monitoring.events import Event, StepDone

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


def test_stop_saves_and_a_resume_goes_on_without_obeying_it_again(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    config = job()
    person = Person({3: send(tmp_path / "out", "stop")})
    result = TrainerEngine(observers=[person]).run_job(config)
    assert (result.state, result.exit_code, result.global_step) == ("stopped", 0, 3)
    assert result.error_message is not None
    assert "by the control file after step 3" in result.error_message
    assert any("control: stop after step 3" in text for text in texts_of(result.output_dir))
    output = config.output.model_copy(update={"resume": "latest"})
    again = TrainerEngine().run_job(config.model_copy(update={"output": output}))
    assert (again.state, again.global_step) == ("completed", 12)


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
        "from trainer.monitor.control_writer import ControlWriter\n"
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
