"""A run on the CPU of a machine with a GPU does not start CUDA, in what it saves and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trust.reference import llama, ragged_rows
from tests.trust.trainers import make_trainer
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.resume import environment_manifest

STATE = torch.arange(16, dtype=torch.uint8)


def trainer() -> SupervisedTrainer:
    return make_trainer(llama(), ragged_rows(4, seed=1), batch_size=2)


def touched(*_: Any, **__: Any) -> Any:
    raise AssertionError("a run on the CPU has touched the GPU")


def test_a_run_on_the_cpu_leaves_the_gpu_of_its_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for holder in (torch.cuda, torch.cuda.random):
        for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
            monkeypatch.setattr(holder, name, touched)
    [state] = made._rng_states()
    assert "cuda" not in state
    torch.save(state, tmp_path / "rng_state.pth")
    expected = torch.rand(3)
    made._load_rng_state(str(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_only_a_run_on_a_gpu_asks_for_the_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", touched)
    assert environment_manifest(torch.device("cpu"))["gpus"] == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert environment_manifest(torch.device("cuda", 0))["gpus"] == ["GPU 0"]


def test_a_run_on_a_gpu_keeps_its_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer()
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: STATE)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(state))
    torch.save(made._rng_states()[0], tmp_path / "rng_state.pth")
    made._load_rng_state(str(tmp_path))
    assert restored == [], "resumed on the CPU"
    monkeypatch.setitem(made.args.__dict__, "_setup_devices", torch.device("cuda", 0))
    made._load_rng_state(str(tmp_path))
    assert len(restored) == 1
    assert torch.equal(restored[0], STATE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_cpu_of_a_gpu_machine_makes_no_cuda_context(
    qa_file: Path, tmp_path: Path
) -> None:
    words = ["train", "--model", "tiny", "--dataset", str(qa_file), "--output", str(tmp_path / "o")]
    words += ["--fp32", "--environment.device", "cpu", "--max-steps"]
    script = (
        "import torch\nfrom trainer.cli import main\n"
        f"codes = [main([*{words!r}, '2']), main([*{words!r}, '3', '--resume'])]\n"
        "print(torch.cuda.is_initialized(), codes)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False [0, 0]", done.stderr
    assert json.loads((tmp_path / "o" / "run.json").read_text())["state"] == "completed"
