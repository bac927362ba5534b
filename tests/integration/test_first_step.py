"""A run that is called completed has moved its weights, however short it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.core import optim
from trainer.monitoring import TrainingStatusReader

FEW = {"validation_split": 0, "max_rows": 8}
DEFAULT = {"batch_size": 8, "max_steps": None, "warmup_steps": 0.03}


def changed(model: Path, result: Any) -> list[str]:
    """Names of the tensors whose bits are others than the base model's."""
    before = load_file(model / "model.safetensors")
    [path] = Path(result.model_path).glob("*model.safetensors")
    after = load_file(path)
    if "adapter" in path.name:  # B begins at 0, so that an untrained adapter changes nothing
        return [name for name, tensor in after.items() if "lora_B" in name and tensor.any()]
    return [name for name in before if not torch.equal(before[name], after[name])]


SHORT: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # name: data, hyperparams, steps
    "eight rows, all defaults": (FEW, {}, 1),
    "max_steps 1": ({}, {"max_steps": 1}, 1),
    "a share that is the whole run": (FEW, {"warmup_steps": 0.99}, 1),
    "a last window of one row": ({**FEW, "max_rows": 5}, {"batch_size": 4}, 2),
    "accumulation over all rows": (FEW, {"batch_size": 2, "gradient_accumulation": 8}, 1),
    "half an epoch": ({**FEW, "max_rows": 16}, {"num_epochs": 0.5, "lr_scheduler": "cosine"}, 1),
    "packed": ({**FEW, "enable_packing": True}, {"max_length": 512}, 1),
    "muon": (FEW, {"optimizer": "muon"}, 1),
    "lora": (FEW, {"training_mode": "lora", "lr_scheduler": "constant"}, 1),
}


@pytest.mark.parametrize("name", SHORT)
def test_the_shortest_runs_move_their_weights(
    train: Callable[..., Any], model_folder: Path, name: str
) -> None:
    check_moves(train, model_folder, name)


def check_moves(train: Callable[..., Any], model_folder: Path, name: str) -> None:
    data, hyper, steps = SHORT[name]
    quiet = {"inference_interval": 0}
    result = train(data=data, hyperparams={**DEFAULT, **hyper}, monitoring=quiet)
    assert (result.state, result.global_step) == ("completed", steps), result.error_message
    assert changed(model_folder, result)
    lines = TrainingStatusReader(result.output_dir).metrics()
    assert all(line["learning_rate"] > 0 for line in lines if line["type"] == "StepDone")


def test_mutant_first_step_at_rate_zero_is_killed(
    train: Callable[..., Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = optim.rate_factor

    def from_zero(name: str, step: int, *, warmup: int, total: int) -> float:
        return ours(name, step, warmup=warmup, total=total) if step else 0.0

    monkeypatch.setattr(optim, "rate_factor", from_zero)
    monkeypatch.setattr(optim, "check_schedule", lambda *args, **named: None)
    with pytest.raises(AssertionError):
        check_moves(train, model_folder, "max_steps 1")


def test_a_warm_up_as_long_as_the_epochs_is_refused(train: Callable[..., Any]) -> None:
    result = train(data=FEW, hyperparams={**DEFAULT, "warmup_steps": 1})
    assert result.exit_code == 2
    assert "warmup_steps=1 is not below the 1 step that" in result.error_message
    assert not result.output_dir.exists()
