"""Weights in shards: set up once, before the first forward pass, and whole weights out of them.

Under FSDP2 each process holds its part of every weight, gradient and optimizer state; a layer is
gathered while it runs. Sharding is accelerate's. Everything behind it (proofs, evaluation,
training) runs on shards, on all processes alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from trainer.config.schema import TrainerConfig
from trainer.models.precision import ResolvedPrecision


def sharding_options(config: TrainerConfig) -> dict[str, Any]:
    """TrainingArguments of a sharded run; none of any other."""
    section = config.distributed
    if section.strategy != "fsdp2":
        return {}
    return {
        # Else every process keeps whole gradients from one micro-batch to the next.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": section.reshard_after_forward,
            "cpu_offload": section.cpu_offload,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }


OFFLOAD_VARIABLES = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}


@contextlib.contextmanager
def offload_told(config: TrainerConfig) -> Iterator[None]:
    """Within the block accelerate joins the processes for tensors on the CPU too, if need be.

    With `distributed.cpu_offload` the norm of gradients is summed there; accelerate asks its
    launcher's variables, not the arguments.
    """
    is_needed = config.distributed.strategy == "fsdp2" and config.distributed.cpu_offload
    before = {name: os.environ.get(name) for name in OFFLOAD_VARIABLES}
    if is_needed:
        os.environ.update(OFFLOAD_VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            elif is_needed:
                os.environ.pop(name, None)


def allow_sharding(arguments: TrainingArguments) -> None:
    """Have accelerate shard on a CPU too, where it would fall back to DDP without a word."""
    state = arguments.distributed_state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def shard(trainer: Any, precision: ResolvedPrecision) -> None:
    """Share the weights out, and the parameters of the optimizer with them.

    Args:
        trainer: a `SupervisedTrainer` whose optimizer holds the model's whole parameters.
        precision: matrices are gathered in its compute dtype; gradients are reduced in fp32.
    Raises:
        RuntimeError: accelerate has not sharded.
    """
    accelerator = trainer.accelerator
    if not accelerator.is_fsdp2:
        raise RuntimeError("accelerate has fallen back from FSDP2 to another strategy")
    plugin = accelerator.state.fsdp_plugin
    half = precision.compute_dtype if precision.autocast_dtype is not None else None
    # accelerate would reduce gradients in the compute dtype as well.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32
    )
    part_frozen_ties(trainer.model)
    model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model = trainer.model_wrapped = model
    trainer.optimizer = optimizer


BEHIND_ADAPTERS = ("base_layer", "original_module")
"""Where PEFT keeps a module that it has put something in place of."""


def part_frozen_ties(model: nn.Module) -> None:
    """Give frozen weights between which an adapter lies, such as those of a tied head, own copies.

    FSDP2 keeps two modules with one weight together only where nothing lies between them. What is
    frozen stays equal without a tie.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                owners.setdefault(id(parameter), []).append((path, module, name))
    for tied in owners.values():
        if any(path.rpartition(".")[2] in BEHIND_ADAPTERS for path, _, _ in tied):
            for _, module, name in tied[1:]:
                copy = getattr(module, name).detach().clone()
                setattr(module, name, nn.Parameter(copy, requires_grad=False))


def mesh_words(model: Any) -> str:
    """The device mesh that a sharded model lies on, such as `fsdp 4 (cpu)`."""
    one = next(p for p in model.parameters() if isinstance(p, DTensor))
    mesh = one.device_mesh
    names = mesh.mesh_dim_names or ("fsdp",)
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))
    return f"{sizes} ({mesh.device_type})"


# ---- passes that all processes make together

T = TypeVar("T")


def dealt(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """What this process does of work that is dealt out, and whether what it finds counts.

    Every process does as many: a sharded layer is gathered by all of them at once.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for start in range(0, len(items), world):
        is_mine = start + rank < len(items)
        yield items[start + rank if is_mine else start], is_mine


# ---- whole weights out of shards


def gathered(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    is_wanted: Callable[[torch.Tensor], bool] = lambda tensor: True,
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Tensors of the state dict whole, one after the other; all processes walk together.

    Args:
        dtype: of floating ones while they travel and after; None: their own.
        is_wanted: whether a tensor, or parameter, is gathered at all.
    Yields:
        The names that share a tensor, and the tensor, on the device of its shards.
    """
    for names, tensor in state_tensors(model):
        if not is_wanted(tensor):
            continue
        part = tensor.detach()
        if dtype is not None and part.is_floating_point():
            part = part.to(dtype)
        yield names, part.full_tensor() if isinstance(part, DTensor) else part


def state_tensors(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Each tensor of a model's state once, with the names that share it; alike on all processes."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [(names[key], tensor) for key, tensor in tensors.items()]


def whole_copy(model: Any, dtype: torch.dtype) -> Any:
    """The sharded model as a plain one on the CPU; None on all processes but the main one.

    Args:
        model: sharded, without adapters.
        dtype: of its floating weights.
    """
    state: dict[str, torch.Tensor] = {}
    is_main = torch.distributed.get_rank() == 0
    for names, tensor in gathered(model, dtype):
        if is_main:
            state |= dict.fromkeys(names, tensor.cpu())
    if not is_main:
        return None
    plain = plain_class(model)
    with torch.device("meta"):
        shell: Any = plain._from_config(model.config, dtype=dtype)
    shell.load_state_dict(state, strict=True, assign=True)
    shell.tie_weights()
    for name, buffer in model.named_buffers():
        if name not in state:  # no part of the state: computed when the model is built
            path, _, leaf = name.rpartition(".")
            shell.get_submodule(path).register_buffer(leaf, buffer.cpu(), persistent=False)
    shell.generation_config = model.generation_config
    # By these transformers names the tensors of some models otherwise in files than in memory.
    if hasattr(model, "_weight_conversions"):
        shell._weight_conversions = model._weight_conversions
    return shell.eval()


def plain_class(model: Any) -> Any:
    """What the model was before FSDP2 made a class of its own of it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def whole_adapter(model: Any) -> dict[str, torch.Tensor]:
    """What is trained of a sharded model with adapters, whole, by its names in memory.

    Returns:
        On the CPU of rank 0; nothing on the others, which call it at the same time.
    """
    state: dict[str, torch.Tensor] = {}
    for names, tensor in gathered(model, is_wanted=lambda one: one.requires_grad):
        if torch.distributed.get_rank() == 0:
            state |= dict.fromkeys(names, tensor.cpu())
    return state


# ---- bytes


def gathered_bytes(model: nn.Module, *, is_resharded: bool) -> int:
    """Most of whole weights and whole gradients that a process holds for a moment.

    The layers are gathered one after the other, the next one while one runs; embedding, last norm
    and head are counted as if they stayed. A gradient is whole until it is summed, in fp32.
    """
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one)]
    blocks = max(lists, key=_bytes_of, default=nn.ModuleList())
    sizes = [_bytes_of(block) for block in blocks]
    all_bytes = _bytes_of(model)
    outside = all_bytes - sum(sizes)
    weights = outside + 2 * max(sizes, default=0) if is_resharded else all_bytes
    inside = {id(p) for block in blocks for p in block.parameters()}
    ends = [p for p in model.parameters() if id(p) not in inside]
    units = [ends, *(list(block.parameters()) for block in blocks)]
    gradients = [sum(4 * p.numel() for p in unit if p.requires_grad) for unit in units]
    return weights + max(gradients)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
