"""A small real run in this process, and the command line in another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path, model_folder: Path, qa_file: Path) -> Callable[..., Any]:
    """A function that makes a config: 2-layer model with dropout, 40 rows, batch 4, fp32."""
    from trainer.config import create_default_config

    def make(name: str = "out", /, **sections: Any) -> Any:
        hyper = {
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "fp_precision": "fp32",
            **sections.pop("hyperparams", {}),
        }
        monitoring = {
            "preview_max_tokens": 8,
            "preview_temperature": 0.0,
            "inference_interval": 5,
            "micro_eval_interval": 4,
            "report_to": (),
            **sections.pop("monitoring", {}),
        }
        options = {
            "model_path": str(model_folder),
            "dataset_path": str(qa_file),
            "output_dir": str(tmp_path / name),
            **{k: sections.pop(k) for k in ("model_path", "dataset_path") if k in sections},
        }
        data = {"validation_split": 0.2, **sections.pop("data", {})}
        environment = {"num_threads": 1, **sections.pop("environment", {})}
        return create_default_config(
            **options,
            hyperparams=hyper,
            monitoring=monitoring,
            data=data,
            environment=environment,
            **sections,
        )

    return make


@pytest.fixture
def train(job: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs a job and returns its TrainingResult."""
    from trainer.core import TrainerEngine

    def run(*args: Any, **sections: Any) -> Any:
        return TrainerEngine().run_job(job(*args, **sections))

    return run


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs `trainer WORDS` as a user would, in an empty folder.

    With a command or variables of a test's own, the process is a fresh one.
    """
    here = tmp_path / "cwd"
    here.mkdir()

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("TRAINER_")
        }
        if not options.keys() - {"cwd", "input"}:
            return forked.run(
                [*map(str, words)],
                cwd=options.get("cwd", here),
                environment={**environment, "PYTHONPATH": str(ROOT)},
                stdin=options.get("input", ""),
                timeout=300,
            )
        command = options.pop("command", [sys.executable, "-m", "trainer"])
        return subprocess.run(
            [*command, *map(str, words)],
            cwd=options.pop("cwd", here),
            env={**environment, "PYTHONPATH": str(ROOT), **options.pop("env", {})},
            capture_output=True,
            text=True,
            timeout=options.pop("timeout", 300),
            **options,
        )

    return run


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for each preview, so that none is superseded: for comparing all of them."""
    from trainer.preview.scheduler import PreviewScheduler

    ask = PreviewScheduler.ask

    def ask_and_wait(self: Any, step: int, **options: Any) -> None:
        ask(self, step, **options)
        self.drain(120)

    monkeypatch.setattr(PreviewScheduler, "ask", ask_and_wait)


def weights_of(folder: Path) -> dict[str, Any]:
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    [path] = folder.glob("*model.safetensors")
    return load_file(path)


@pytest.fixture
def assert_same_weights() -> Callable[[Path, Path], None]:
    """A function that compares two model folders bit for bit."""
    import torch

    def check(one: Path, two: Path) -> None:
        a, b = weights_of(one), weights_of(two)
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different

    return check
