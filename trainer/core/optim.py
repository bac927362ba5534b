"""The optimizers of `hyperparams.optimizer`, and the learning rate of every step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from trainer.config.training_sections import Hyperparams
from trainer.core.bf16_masters import Bf16AdamW, make_bf16_adamw
from trainer.counts import counted
from trainer.errors import ConfigError
from trainer.models.precision import computes_in_bf16, is_vector

# ---- muon in fp32, for devices without bf16 arithmetic
#
# `torch.optim.Muon` orthogonalizes in bf16 whatever the weights are. Where bf16 is emulated (x86
# without AMX or AVX512-BF16, GPUs before Ampere) that alone took 0.55 of 0.82 s of a demo step; in
# fp32 it takes 0.03 s and loses no digits.


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


# ---- the optimizers of `hyperparams.optimizer`, and which parameter gets which treatment
#
# `muon` is one `torch.optim.Optimizer` that holds two, so that schedulers, checkpoints, gradient
# scaling and HF's Trainer need to know nothing about it.


FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Device types on which torch has one kernel for a whole AdamW step."""

MIN_PAGED_SIZE = 100_000
"""bitsandbytes pages the moments of parameters from this many elements on."""

ALGORITHM = "algorithm"
"""Key of a parameter group of MuonAdamW: `muon` or `adamw`."""


def check_optimizer(hyperparams: Hyperparams, device: torch.device) -> None:
    """Refuse, before anything is written, what this machine cannot step with.

    Raises:
        ConfigError: a package is missing, or the device is not a CUDA GPU, whose memory is paged.
    """
    name = hyperparams.optimizer
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ConfigError(
            f"hyperparams.optimizer={name} moves moments between a CUDA GPU and the CPU, and the "
            f"device is {device}, where nothing is paged; adamw_8bit is the same without that."
        )
    _optimizer_package(hyperparams)


def _optimizer_package(hyperparams: Hyperparams) -> Any:
    """The optimizers of the optional package that a run needs; None where it needs none.

    Raises:
        ConfigError: it is missing.
    """
    if hyperparams.masters != "fp32":
        where, package, extra = f"masters={hyperparams.masters}", "torchao", "torchao"
        instead = "masters=fp32"
    elif hyperparams.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        where, package, extra = f"optimizer={hyperparams.optimizer}", "bitsandbytes", "qlora"
        instead = "optimizer=adamw"
    else:
        return None
    try:
        return importlib.import_module(f"{package}.optim")
    except ImportError as error:
        raise ConfigError(
            f"hyperparams.{where} needs the package {package}, which is not here ({error}): "
            f"pip install 'ultimate-trainer[{extra}]', or use {instead}."
        ) from error


def build_optimizer(
    model: nn.Module, hyperparams: Hyperparams, *, seed: int = 42
) -> torch.optim.Optimizer:
    """Build the optimizer of a run over the model's trainable parameters.

    Args:
        model: adapters included; parameters without requires_grad are left out.
        hyperparams: optimizer, masters, learning_rate (filled in), weight_decay and AdamW's own
            values.
        seed: of stochastic rounding.
    Raises:
        ConfigError: `muon` finds no matrix, or a package is missing.
    """
    assert hyperparams.learning_rate is not None, "learning_rate is filled in by resolve()"
    learning_rate, weight_decay = hyperparams.learning_rate, hyperparams.weight_decay
    adam: dict[str, Any] = {
        "betas": (hyperparams.adam_beta1, hyperparams.adam_beta2),
        "eps": hyperparams.adam_epsilon,
    }
    if hyperparams.optimizer == "muon":
        return MuonAdamW(model, learning_rate, weight_decay=weight_decay, **adam)
    groups = _decay_groups(list(_trainable(model)), weight_decay)
    package = _optimizer_package(hyperparams)
    embeddings = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    ]
    if hyperparams.masters == "bf16_stochastic":
        is_8bit = hyperparams.optimizer == "adamw_8bit"
        kind = package.AdamW8bit if is_8bit else package._AdamW
        return make_bf16_adamw(kind, groups, wide=embeddings, seed=seed, lr=learning_rate, **adam)
    if package is not None:
        is_paged = hyperparams.optimizer == "paged_adamw_8bit"
        kind = package.PagedAdamW8bit if is_paged else package.AdamW8bit
        return _adamw_8bit(kind, groups, package, wide=embeddings, lr=learning_rate, **adam)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=_can_fuse(groups), **adam)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weights of linear layers, AdamW for embeddings, head, norms, biases, the rest.

    Muon's rate is scaled to AdamW's size of update, so that one learning rate serves both.
    Parameter groups and state are torch's ordinary ones: a group says in `algorithm` who steps it.
    Source: `torch.optim.Muon`; arXiv:2502.16982 for the scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Share the trainable parameters out.

        Args:
            model: adapters count as linear layers; those of an adapted embedding or head do not.
            lr: of both parts.
            weight_decay: decoupled, of both parts; norms and biases are left out.
            betas: AdamW's decays of the mean of gradients and of their squares.
            eps: AdamW's term against division by zero.
        Raises:
            ConfigError: there is no linear layer to train.
        """
        matrices, others = _split_for_muon(model)
        if not matrices:
            raise ConfigError(
                "hyperparams.optimizer=muon needs weights of linear layers, and none of the "
                "trainable ones is (embeddings and the head do not count); use adamw."
            )
        self._parts: dict[str, torch.optim.Optimizer] = {
            "muon": _muon(matrices, lr=lr, weight_decay=weight_decay)
        }
        if others:  # adapters on linear layers alone leave nothing for AdamW
            groups = _decay_groups(others, weight_decay)
            self._parts["adamw"] = torch.optim.AdamW(
                groups, lr=lr, betas=betas, eps=eps, fused=_can_fuse(groups)
            )
        shared = [
            {**group, ALGORITHM: name}
            for name, part in self._parts.items()
            for group in part.param_groups
        ]
        super().__init__(shared, defaults={"lr": lr, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # Handed over at every step: loading a state puts new objects in both places.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group[ALGORITHM] == name]
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling keep: torch's own keys and the two parts."""
        return {**super().__getstate__(), "_parts": self._parts}


def state_placeholders(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Empty tensors of the size that the optimizer's state will have; none where it has one."""
    if optimizer.state:
        return []
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return [
        torch.empty_like(parameter, dtype=_moment_dtype(inner, parameter))
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _ in range(1 if group.get(ALGORITHM) == "muon" else 2)  # momentum, or two moments
        if not (getattr(inner, "is_paged", False) and parameter.numel() >= MIN_PAGED_SIZE)
    ]


def _moment_dtype(optimizer: Any, parameter: torch.Tensor) -> torch.dtype:
    """In which dtype an optimizer that has not stepped yet will keep a parameter's moments."""
    if isinstance(optimizer, Bf16AdamW):
        return torch.uint8 if optimizer.is_8bit(parameter) else torch.float32
    if not hasattr(optimizer, "mng"):  # not bitsandbytes'
        return parameter.dtype
    is_wide = id(parameter) in optimizer.mng.pid2config
    is_small = parameter.numel() < optimizer.args.min_8bit_size
    return torch.float32 if is_wide or is_small else torch.uint8


def _muon(matrices: list[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Torch's, which computes in bf16, where the device does; elsewhere ours, in fp32."""
    if not computes_in_bf16(matrices[0].device):
        return Fp32Muon(matrices, lr=lr, weight_decay=weight_decay)
    return torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )


Owned = tuple[nn.Module, str, nn.Parameter]
"""A parameter, the module that holds it, and its name there."""


def _trainable(model: nn.Module) -> Iterator[Owned]:
    """Every trainable parameter once; tied ones come with the module that is listed first."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def _split_for_muon(model: nn.Module) -> tuple[list[nn.Parameter], list[Owned]]:
    """Weights of linear layers within the blocks, and everything else."""
    outside = _embedding_and_head_parameters(model)
    matrices: list[nn.Parameter] = []
    others: list[Owned] = []
    for owned in _trainable(model):
        module, name, parameter = owned
        is_matrix = isinstance(module, nn.Linear | Conv1D) and name == "weight"
        if is_matrix and parameter.ndim == 2 and id(parameter) not in outside:
            matrices.append(parameter)
        else:
            others.append(owned)
    return matrices, others


def _embedding_and_head_parameters(model: nn.Module) -> set[int]:
    """Ids of all parameters in or under embeddings and the head, adapters on them included."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is not None:
            modules.append(module)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _decay_groups(parameters: list[Owned], weight_decay: float) -> list[dict[str, Any]]:
    """One group with weight decay and one without: norms, biases and other vectors."""
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for module, name, parameter in parameters:
        (without if is_vector(module, name, parameter) else with_decay).append(parameter)
    groups = [(with_decay, weight_decay), (without, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    return all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])


def _adamw_8bit(
    kind: Any,
    groups: list[dict[str, Any]],
    package: Any,
    *,
    wide: list[nn.Parameter],
    **options: Any,
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; embeddings keep 32 bits, whose rare large updates 8 bits lose.

    That is said through a manager of its own: the package has one for all, which keeps every model
    that it ever heard of and takes the places of one's parameters for those of the next.
    """
    manager = package.GlobalOptimManager.__new__(package.GlobalOptimManager)
    manager.initialize()
    for parameter in wide:
        manager.override_config(parameter, "optim_bits", 32)
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    optimizer.mng = manager  # type: ignore[attr-defined]
    return optimizer


# ---- the learning rate of every step: a closed form of the step and the length of the run alone
#
#     step   = optimizer steps done before this one: 0 ... total - 1
#     warm-up (step < warmup):  peak * (step + 1) / (warmup + 1)
#     then, with share = (step - warmup) / (total - warmup):
#         linear    peak * (1 - share)
#         cosine    peak * (1 + cos(pi * share)) / 2
#         constant  peak
#
# So the first step has a positive rate, step `warmup` the peak, and the last one is above 0 too: 0
# is where the step after it would be.


def warmup_length(warmup_steps: float, total: int) -> int:
    """Steps before the one at the peak rate.

    Args:
        warmup_steps: a whole number, or below 1 a share of all steps, rounded up; a share leaves
            at least one step at the peak, also in a run of one step.
        total: steps of the whole run.
    """
    if warmup_steps >= 1:
        return int(warmup_steps)
    return min(math.ceil(warmup_steps * total), total - 1)


def rate_factor(name: str, step: int, *, warmup: int, total: int) -> float:
    """The share of the peak rate, 0 to 1, at which the step after `step` others is made.

    Args:
        name: `linear`, `cosine` or `constant`.
        step: optimizer steps done; from `total` on what the curve ends in.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    if name == "linear":
        return 1 - share
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    assert name == "constant", name
    return 1.0


class RateSchedule(LambdaLR):
    """Sets the rate of every parameter group; a resume takes back its position only.

    Torch's own keeps the rate it had computed last, so the first step of a run that is made longer
    would be at the rate of the shorter one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hyperparams: Hyperparams, total: int):
        """Begin before the first step.

        Args:
            optimizer: each group's own `lr` is its peak.
            hyperparams: lr_scheduler and warmup_steps.
            total: steps of the whole run.
        """
        warmup = warmup_length(hyperparams.warmup_steps, total)
        name = hyperparams.lr_scheduler
        super().__init__(
            optimizer, lambda step: rate_factor(name, step, warmup=warmup, total=total)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint, at this run's own rates.

        Call it after the optimizer's, which brings the rates of the checkpoint along.
        """
        peaks = self.base_lrs  # the checkpoint's may be others
        super().load_state_dict(state_dict)
        self.base_lrs = peaks
        rates = [
            peak * factor(self.last_epoch)
            for peak, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        self._last_lr = rates


def rate_words(hyperparams: Hyperparams, total: int, *, start: int) -> str:
    """The rate of the first step after `start`, and where it comes from.

    Args:
        hyperparams: with learning_rate filled in.
        total: steps of the whole run.
    """
    name, warmup = hyperparams.lr_scheduler, warmup_length(hyperparams.warmup_steps, total)
    peak = hyperparams.learning_rate or 0.0
    rate = peak * rate_factor(name, start, warmup=warmup, total=total)
    return (
        f"the learning rate of step {start + 1} is {rate:.3g}: that of a run of {total} steps with "
        f"lr_scheduler={name}, learning_rate={peak:g} and {warmup} steps of warm-up"
    )


def check_schedule(hyperparams: Hyperparams, total: int, *, start: int = 0) -> None:
    """Refuse a run whose steps could not move a weight.

    Args:
        hyperparams: with learning_rate filled in.
        total: steps of the whole run.
        start: steps that are done already.
    Raises:
        ConfigError: the warm-up is as long as the run, or every rate that is left is 0.
    """
    if hyperparams.warmup_steps >= total:
        raise ConfigError(
            f"hyperparams.warmup_steps={hyperparams.warmup_steps:g} is not below the "
            f"{counted(total, 'step')} that these rows and epochs make; lower it or train longer."
        )
    peak = hyperparams.learning_rate or 0.0
    warmup = warmup_length(hyperparams.warmup_steps, total)
    left = range(start, total)
    name = hyperparams.lr_scheduler
    if left and not any(peak * rate_factor(name, n, warmup=warmup, total=total) for n in left):
        raise ConfigError(
            f"hyperparams.learning_rate={peak:g} makes every rate of steps {start + 1} to {total} "
            "0, so that no weight would move; raise it."
        )
