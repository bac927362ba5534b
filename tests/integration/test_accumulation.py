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
    """Plain SGD: AdamW would hide errors of scale. Rate 1 lets the fifth step amplify rounding."""
    import trainer.core.engine as engine

    monkeypatch.setattr(
        engine, "build_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1)
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


def test_accumulation_1x8_equals_2x4_equals_8x1_on_ragged_rows(
    train: Callable[..., Any], no_dropout: Path, sgd: None
) -> None:
    moved = []
    for batch_size, accumulation in CUTS:
        # 40 rows in steps of 8, validation off, and a 36-row run would leave a partial window.
        result = train(
            f"cut{batch_size}",
            hyperparams={
                "batch_size": batch_size,
                "gradient_accumulation": accumulation,
                "learning_rate": 0.1,
                "max_steps": None,
                "max_grad_norm": 0.0,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
            },
            data={"validation_split": 0.0, "max_rows": 37, "group_by_length": False},
            monitoring={"inference_interval": 0},
        )
        assert result.success, result.error_message
        assert result.global_step == 5  # the last window has 5 rows only
        moved.append(change(no_dropout, result.model_path))
    for other in moved[1:]:
        assert (other - moved[0]).norm() <= 2e-6 * moved[0].norm()
