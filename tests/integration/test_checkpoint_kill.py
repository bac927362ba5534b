"""kill -9 at every operation of a save leaves a verified checkpoint, and a resume equals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import files
from trainer.core.checkpoint import (
    clean_staging,
    find_latest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "run_state.json",
)


def save(root: Path, step: int, mark: str) -> None:
    def write(folder: Path) -> None:
        for name in FILES:
            files.write_text(folder / name, f"{name} {mark} " * 50)

    save_checkpoint(root, step, write, keep=1, metadata={"mark": mark})


def save_and_die(root: Path, step: int, at: int) -> bool:
    """Save in a child that is killed at its operation number `at`; False if it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        files.before_operation = kill
        try:
            save(root, step, "new")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("new_step", [2, 1], ids=["next step", "same step again"])
def test_kill_at_every_operation_leaves_a_verified_checkpoint(
    tmp_path: Path, new_step: int
) -> None:
    before = tmp_path / "before"
    save(before, 1, "old")
    at, outcomes = 0, []
    while True:
        at += 1
        root = tmp_path / f"kill{at}"
        shutil.copytree(before, root)
        was_killed = save_and_die(root, new_step, at)
        clean_staging(root)
        path, manifest, _ = find_latest_checkpoint(root)
        verify_checkpoint(path)
        outcomes.append(manifest.metadata["mark"])
        assert all(name.name.startswith("step-") for name in root.iterdir())
        shutil.rmtree(root)
        if not was_killed:
            break
    assert at > 40
    assert outcomes == sorted(outcomes, reverse=True)  # old ... old, new ... new
    assert outcomes[-1] == "new"


KILLED_RUN = """
import os, signal, sys
from trainer import files
from trainer.core import TrainerEngine
from trainer.config import ConfigLoader

seen = 0
def kill(operation, path):
    global seen
    seen += "step-00000004" in str(path)
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

files.before_operation = kill
TrainerEngine().run_job(ConfigLoader.load(sys.argv[1]).config)
"""


MORE_POINTS = (1, 2, 3, 5, 8, 11, 14, 20, 23, 26, 28, 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", [17, *(pytest.param(at, marks=pytest.mark.long) for at in MORE_POINTS)]
)
def test_a_run_killed_in_the_middle_of_a_save_resumes_bit_for_bit(
    job: Callable[..., Any],
    train: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    tmp_path: Path,
    at: int,
) -> None:
    options: dict[str, Any] = {"hyperparams": {"max_steps": 6}}
    output = {"checkpoint_interval": 2, "keep_checkpoints": 9}
    straight = train("straight", **options, output=output)
    (tmp_path / "config.json").write_text(job("killed", **options, output=output).model_dump_json())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path / "config.json"), str(at)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = train("killed", **options, output={**output, "resume": "latest"})
    assert again.success, again.error_message
    assert_same_weights(again.model_path, straight.model_path)
    left = [path.name for path in (again.output_dir / "checkpoints").iterdir()]
    assert all(name.startswith("step-") for name in left)
