"""Muon in fp32: torch's own steps, without bf16's rounding, and interchangeable with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trainer.core import optim
from trainer.core.optim import Fp32Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's defaults
SHAPES = [(16, 16), (8, 24), (24, 8), (1, 12)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def fp32(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Fp32Muon(params, lr=1e-2, weight_decay=0.1)


def torchs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, start: int = 0
) -> None:
    for step in range(start, start + steps):
        for param, grad in zip(params, matrices(seed=1 + step), strict=True):
            param.grad = grad.detach()
        optimizer.step()


def largest_difference(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


def test_without_torchs_rounding_to_bf16_the_two_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = matrices(), matrices()
    train(ours, fp32(ours), steps=5)
    # Its one cast is all that is taken away; everything else is torch's code.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    train(theirs, torchs(theirs), steps=5)
    assert largest_difference(ours, theirs) < 1e-6


def test_torchs_bf16_differs_by_no_more_than_rounding() -> None:
    ours, theirs, start = matrices(), matrices(), matrices()
    train(ours, fp32(ours), steps=1)
    train(theirs, torchs(theirs), steps=1)
    for moved, rounded, before in zip(ours, theirs, start, strict=True):
        step = (moved - before).detach()
        assert (rounded - moved).norm() < 0.05 * step.norm()
        assert step.norm() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_move_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = orthogonalize(matrix, COEFFICIENTS, 5, 1e-7)
    inside = left.T @ result.double() @ right.T
    assert result.shape == shape
    assert result.dtype == torch.float32
    assert (inside - torch.diag(torch.diagonal(inside))).abs().max() < 1e-5
    assert torch.diagonal(inside).min() > 0.3
    assert torch.diagonal(inside).max() < 1.3


def test_a_gradient_of_zeros_leaves_only_the_decay() -> None:
    (param,) = [nn.Parameter(torch.ones(4, 4))]
    param.grad = torch.zeros(4, 4)
    Fp32Muon([param], lr=1e-2, weight_decay=0.1).step()
    assert torch.allclose(param, torch.full((4, 4), 0.999))


def test_a_state_of_torchs_continues_here_and_back() -> None:
    for first, then in ((torchs, fp32), (fp32, torchs)):
        straight, moved = matrices(), matrices()
        optimizer = first(straight)
        train(straight, optimizer, steps=3)
        train(moved, before := first(moved), steps=3)
        after = then(moved)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        train(straight, optimizer, steps=2, start=3)
        train(moved, after, steps=2, start=3)
        assert 0 < largest_difference(straight, moved) < 5e-3


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    params = matrices()

    def closure() -> float:
        loss: Any = sum((p**2).sum() for p in params)
        loss.backward()
        return float(loss.detach())

    assert Fp32Muon(params, lr=1e-2, weight_decay=0.0).step(closure) > 0
    assert largest_difference(params, matrices()) > 1e-3


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.optim.Muon), ("fp32", Fp32Muon)])
def test_torchs_runs_where_the_device_computes_in_bf16_and_ours_elsewhere(
    monkeypatch: pytest.MonkeyPatch, precision: str, kind: type[torch.optim.Optimizer]
) -> None:
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: precision == "bf16")
    optimizer = optim.MuonAdamW(nn.Sequential(nn.Linear(4, 4, bias=False)), lr=1e-2)
    assert type(optimizer._parts["muon"]) is kind
