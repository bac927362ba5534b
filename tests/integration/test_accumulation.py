"""How a batch is cut does not change the step: 1x8 = 2x4 = 8x1, through the real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

CUTS = [(1, 8), (2, 4), (8, 1)]


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD at the config's rate: AdamW would hide errors of scale."""
    import trainer.core.training as training

    monkeypatch.setattr(
        training,
        "build_optimizer",
        lambda model, hyper, **_: torch.optim.SGD(model.parameters(), lr=hyper.learning_rate),
    )


@pytest.fixture
def fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's model in double precision."""
    from trainer.models import train_on

    load = train_on.load_model
    monkeypatch.setattr(
        train_on, "load_model", lambda *args, **named: load(*args, **named).double()
    )


@pytest.fixture
def no_dropout(model_folder: Path) -> Path:
    import json

    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    return model_folder


def change(before: Path, after: Path) -> torch.Tensor:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return torch.cat([(new[name].double() - old[name].double()).flatten() for name in sorted(new)])


def check_cuts(train: Callable[..., Any], start: Path, rate: float, tolerance: float) -> None:
    """37 rows in five steps of 8 rows, the last of 5, move the weights alike however they are cut.

    At rate 1 the third step doubles the distance walked, and in fp32 multiplies the rounding of
    those before it by ten (1e-7 becomes 2e-6); in fp64 the cuts agree to 6e-16 even there.
    """
    moved = []
    for batch_size, accumulation in CUTS:
        result = train(
            f"cut{batch_size}",
            hyperparams={
                "batch_size": batch_size,
                "gradient_accumulation": accumulation,
                "learning_rate": rate,
                "max_steps": None,
                "max_grad_norm": 0.0,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
            },
            data={"validation_split": 0.0, "max_rows": 37, "group_by_length": False},
            monitoring={"inference_interval": 0},
        )
        assert result.success, result.error_message
        assert result.global_step == 5
        moved.append(change(start, result.model_path))
    for other in moved[1:]:
        assert (other - moved[0]).norm() <= tolerance * moved[0].norm()


def test_accumulation_1x8_equals_2x4_equals_8x1_on_ragged_rows(
    train: Callable[..., Any], no_dropout: Path, sgd: None
) -> None:
    check_cuts(train, no_dropout, rate=0.1, tolerance=2e-6)


def test_accumulation_at_rate_1_is_equal_to_the_last_digits_of_fp64(
    train: Callable[..., Any],
    no_dropout: Path,
    sgd: None,
    fp64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import trainer.core.training as training

    save = training.save_final_model
    monkeypatch.setattr(
        training,
        "save_final_model",
        lambda *args, **named: save(*args, **{**named, "dtype": torch.float64}),
    )
    check_cuts(train, no_dropout, rate=1.0, tolerance=1e-12)
