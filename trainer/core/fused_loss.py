"""Liger's kernel for head and cross-entropy in one, on a GPU, where it is proved equal to tiles.

It has not run on the machines this was written on; its test on a GPU runs where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.core.loss import RELATIVE_TOLERANCE, head_of
from trainer.core.tiles import FusedSum, PostHead, Tiling, summed_loss
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError

PACKAGE = "liger_kernel"

NUM_STATES = 64
"""Drawn hidden states on which kernel and tiles are compared."""


def check_loss_kernel(asked: str, device: torch.device) -> None:
    """Refuse `loss_kernel=liger` where it cannot run.

    Raises:
        ConfigError: no CUDA GPU, or the package is missing.
    """
    if asked != "liger":
        return
    option = "hyperparams.loss_kernel=liger"
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{option} needs the package liger-kernel: pip install 'ultimate-trainer[liger]', or "
            "use auto."
        )
    if device.type != "cuda":
        raise ConfigError(f"{option} runs on a CUDA GPU, and the device is {device}; use auto.")


def with_kernel(
    asked: str, tiling: Tiling, model: Any, *, dtype: torch.dtype, notice: Callable[..., None]
) -> Tiling:
    """The tiling with Liger's kernel, where it can be had and says what tiles say.

    Args:
        asked: `auto`, `tiles` or `liger`.
        model: unwrapped, on its device; the caller sets autocast.
        dtype: in which it computes.
        notice: told what is taken.
    Raises:
        ConfigError: `liger` was asked for and gives another loss or gradient.
    """
    is_there = importlib.util.find_spec(PACKAGE) is not None
    head = head_of(model)
    if asked == "tiles" or not is_there or head.weight.device.type != "cuda":
        return tiling
    wrong = why_not(liger_sum, head, tiling.post, dtype)
    if wrong is None:
        notice("loss: Liger's fused kernel, proved equal on this model's head")
        return dataclasses.replace(tiling, fused=liger_sum)
    if asked == "liger":
        raise ConfigError(
            f"hyperparams.loss_kernel=liger cannot be used with this model: {wrong}. Use auto."
        )
    notice(f"loss: tiles; Liger's kernel is not used: {wrong}")
    return tiling


def liger_sum(
    states: torch.Tensor,
    head: Any,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    post: PostHead,
) -> torch.Tensor:
    """Summed cross-entropy of (N, D) states by `LigerFusedLinearCrossEntropyFunction`."""
    # Needs triton, which comes with torch for CUDA only.
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(
        states * post.scale if post.scale != 1.0 else states,
        head.weight,
        target,
        head.bias,
        None,  # ce_weight: of classes
        IGNORE_INDEX,
        0.0,  # lse_square_scale
        0.0,  # label_smoothing
        "sum" if weights is None else "none",
        post.cap,
        False,  # return_z_loss
        torch.float32,  # accum_dtype
    )
    loss: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return loss if weights is None else (loss * weights).sum()


def why_not(kernel: FusedSum, head: Any, post: PostHead, dtype: torch.dtype) -> str | None:
    """Compare a kernel with a tile on drawn states: loss, and gradients of states and head.

    Args:
        dtype: of the states, and of the products.
    Returns:
        None where they agree within the rounding of `dtype`, with weights and without.
    """
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, with weights of its own kind or adapters"
    if head.bias is not None and post.scale != 1.0:
        return "the head has a bias, and the model scales its logits"
    device = head.weight.device
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_STATES, head.in_features, generator=generator).to(device, dtype)
    target = torch.randint(head.out_features, (NUM_STATES,), generator=generator).to(device)
    weigh = torch.rand(NUM_STATES, generator=generator).to(device)

    def tile(states: Any, head: Any, target: Any, weights: Any, post: PostHead) -> torch.Tensor:
        return summed_loss(post(head(states[None])[0]), target, weights)[0]

    for weights in (None, weigh):
        try:
            found, wanted = (
                _figures(one, drawn, head, target, weights, post) for one in (kernel, tile)
            )
        except Exception as error:  # a kernel that does not compile here raises anything
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        names = ("loss", "gradient", "head's gradient")[: len(wanted)]
        for name, mine, own in zip(names, found, wanted, strict=True):
            apart = float((mine - own).norm() / own.norm().clamp(min=1e-12))
            if not apart <= RELATIVE_TOLERANCE.get(dtype, 1e-6):
                return f"its {name} differs by {apart:.1e} from that of plain logits"
    return None


def _figures(
    kernel: FusedSum,
    drawn: torch.Tensor,
    head: Any,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    post: PostHead,
) -> list[torch.Tensor]:
    states = drawn.clone().requires_grad_()
    with torch.enable_grad():
        loss = kernel(states, head, target, weights, post)
        wanted = [states, head.weight] if head.weight.requires_grad else [states]
        gradients = torch.autograd.grad(loss, wanted)
    return [one.detach().float() for one in (loss, *gradients)]
