"""The LM head and its cross-entropy on tiles of the positions: memory for one tile of logits.

A plain linear head gets its gradients tile by tile in the forward pass, where the logits are at
hand: three products in place of the four of logits that are made again, and the gradient of the
weight is added up in one buffer. Heads of other kinds (adapters, quantized weights, offloaded
ones) are left to autograd, which makes the logits of a tile again in the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

TILE_LOGITS = 2**26
"""Logits that one tile may have: 256 MiB in fp32, and about three times that with gradients."""

CPU_TILE_LOGITS, CPU_TILE_POSITIONS = 2**22, 192
"""On a CPU a tile has no more logits, or no more positions, than that, whichever is longer. Each
tile adds to the gradient of the whole head. A GPU, whose products are far faster than its memory,
would wait for that as long as for the products of so few positions."""

ROWS = 2**12
"""Rows of the weight at a time where dtypes differ: what mixes them makes copies."""


def tile_length(vocabulary: int, device_type: str) -> int:
    """Positions of one tile."""
    most = TILE_LOGITS // vocabulary
    if device_type == "cpu":
        most = min(most, max(CPU_TILE_LOGITS // vocabulary, CPU_TILE_POSITIONS))
    return max(1, most)


@dataclass(frozen=True)
class PostHead:
    """What a model's forward does to the output of its LM head: cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the head's output.

        Args:
            logits: what `__call__` returned.
            gradient: of those; it is used up.
        """
        if self.cap is not None:
            gradient.mul_((logits.to(gradient.dtype) / self.cap).square_().neg_().add_(1))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


FusedSum = Callable[[torch.Tensor, Any, torch.Tensor, torch.Tensor | None, PostHead], torch.Tensor]
"""(N, D) states, head, (N,) targets, (N,) weights or None -> summed cross-entropy."""


@dataclass(frozen=True)
class Tiling:
    """How the head is applied to parts of a batch's kept positions."""

    post: PostHead
    length: int
    """Positions in one tile; fewer than that are not tiled."""
    fused: FusedSum | None = None
    """A kernel that does all tiles at once, once it is proved."""

    @classmethod
    def of(cls, post: PostHead, vocabulary: int, device_type: str) -> Tiling:
        """Tiles for a head of so many tokens on a kind of device."""
        return cls(post, tile_length(vocabulary, device_type))


Losses = tuple[torch.Tensor, torch.Tensor]
"""The sum, with a gradient, and the losses of each position, (N,), before weights and without."""


def summed_loss(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None) -> Losses:
    """Cross-entropy of (N, V) logits, each position times its weight.

    In the two steps that `F.cross_entropy` takes, as what is between them has each position's loss.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # a softmax over many tokens loses digits in half precision
    logs = F.log_softmax(logits, dim=-1)
    if weights is None:
        each = logs.detach().gather(1, target[:, None])[:, 0].neg()
        return F.nll_loss(logs, target, reduction="sum"), each
    each = F.nll_loss(logs, target, reduction="none")
    return (each * weights).sum(), each.detach()


def summed_in_tiles(
    states: torch.Tensor,
    head: Any,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    tiling: Tiling,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed cross-entropy of the head on (N, D) states; the caller sets autocast.

    Args:
        head: the module, whose hooks do not run: those of FSDP would give its weights back, and
            reduce their gradients, behind each tile.
        target: (N,) token ids.
        weights: (N,), or None.
    Returns:
        As `summed_loss`; a kernel does not tell of each position.
    """
    if tiling.fused is not None:
        return tiling.fused(states, head, target, weights, tiling.post), None
    if torch.is_grad_enabled() and is_plain(head):
        found: Losses = _SumWithGradients.apply(  # type: ignore[no-untyped-call]
            states, head.weight, head.bias, target, weights, tiling
        )
        return found

    def tile(states: torch.Tensor, wanted: torch.Tensor, by: torch.Tensor | None) -> Losses:
        return summed_loss(tiling.post(head.forward(states[None])[0]), wanted, by)

    parts = _split(tiling.length, states, target, weights)
    return _joined([checkpoint(tile, *part, use_reentrant=False) for part in parts])


def _joined(tiles: list[Losses]) -> Losses:
    return torch.stack([total for total, _ in tiles]).sum(), torch.cat([each for _, each in tiles])


def is_plain(head: Any) -> bool:
    """Whether a head is F.linear of its own dense weights and nothing else."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)  # where accelerate moves weights in, or somebody looks on
        and type(head.weight) in (nn.Parameter, FakeTensor)  # no quantized one, no shard
        and head.weight.is_floating_point()
    )


def _split(length: int, *tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tiles of all of them; None for each of what is None."""
    parts = (itertools.repeat(None) if t is None else torch.split(t, length) for t in tensors)
    return zip(*parts, strict=False)


class _SumWithGradients(torch.autograd.Function):
    """`summed_in_tiles` of a plain head, whose gradients are made beside the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        weights: torch.Tensor | None,
        tiling: Tiling,
    ) -> Losses:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for_states, for_weight, for_bias = ctx.needs_input_grad[:3]
        grads = [
            torch.empty_like(states) if for_states else None,
            torch.zeros_like(weight) if for_weight else None,
            torch.zeros_like(bias) if bias is not None and for_bias else None,
        ]
        made = []
        with torch.autocast(device, enabled=False):
            inner, by = _as_autocast(states, dtype), _as_autocast(weight, dtype)
            shift = None if bias is None else _as_autocast(bias, dtype)
            parts = _split(tiling.length, inner, target, weights, grads[0])
            for part, wanted, factors, out in parts:
                losses, logits_grad = _with_gradient(
                    F.linear(part, by, shift), wanted, factors, tiling.post
                )
                made.append(losses)
                _add_gradients(logits_grad, part, by, (out, *grads[1:]))
                del logits_grad  # before the next tile is made
        ctx.grads = grads
        total, each = _joined(made)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the gradients of a loss in tiles are scaled in place, once"
        for grad in grads:
            if grad is not None:
                # Of as many dimensions, so that the factor is not rounded to a half precision.
                factor = gradient.reshape((1,) * grad.dim())
                for rows in torch.split(grad, ROWS):
                    torch.mul(rows, factor, out=rows)
        return *grads, None, None, None


def _as_autocast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """As autocast hands it to a linear layer, which leaves float64 alone."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _with_gradient(
    output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None, post: PostHead
) -> tuple[Losses, torch.Tensor]:
    """`summed_loss` of the head's output (N, V), and the gradient of that, in its dtype."""
    logits = post(output)
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient = torch.log_softmax(logits.to(precise), -1)
    index = target[:, None]
    of_target = gradient.gather(1, index)  # (N, 1) log-probabilities
    gradient.exp_().scatter_(1, index, of_target.expm1())
    each = of_target[:, 0].neg()
    if weights is None:
        total = each.sum()
    else:
        total = (each * weights).sum()
        gradient.mul_(weights[:, None])
    return (total, each), post.backward(logits, gradient).to(output.dtype)


def _add_gradients(
    logits_grad: torch.Tensor,
    states: torch.Tensor,
    weight: Any,
    grads: tuple[torch.Tensor | None, ...],
) -> None:
    """Put one tile's part into the gradients of states (its own rows), weight and bias."""
    of_states, of_weight, of_bias = grads
    if of_states is not None:
        of_states.copy_(logits_grad @ weight)
    if of_weight is not None and of_weight.dtype == logits_grad.dtype:
        of_weight.addmm_(logits_grad.t(), states)
    elif of_weight is not None:
        parts = zip(
            torch.split(of_weight, ROWS), torch.split(logits_grad, ROWS, dim=1), strict=True
        )
        for rows, part in parts:
            rows.add_((part.t() @ states).to(rows.dtype))
    if of_bias is not None:
        of_bias.add_(logits_grad.sum(0))
