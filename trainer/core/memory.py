"""The memory card: bytes a run needs on its device and on the host, from shapes alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trainer.config.training_sections import LoraSection
from trainer.core.fake_step import StepBytes, StepShape, count_step, gradients_of
from trainer.core.sharding import gathered_bytes
from trainer.core.tiles import tile_length
from trainer.models.adapters import add_lora
from trainer.models.quantized import quantization_of
from trainer.publish.snapshot import memory_left

LOGIT_BYTES = 12
"""Peak bytes of one logit in a step, with softmax and gradient (benchmarks/bench_loss.py)."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in nf4 with double quantization: half a byte, an 8-bit scale for 64 weights, an fp32
scale for 256 of those."""

BLOCK = 256
"""Values that share one fp32 scale in 8-bit optimizer states."""

MIN_8BIT_VALUES = 4096
"""Smaller parameters keep an unquantized state."""

CONTEXT = 2**29
"""About what CUDA and its libraries take for themselves."""

USABLE = 0.94
"""Share of the rest that tensors can fill: the allocator's blocks are never all used."""


@dataclass(frozen=True, kw_only=True)
class MemorySetup:
    """What decides how many bytes a run needs, beside the model."""

    training_mode: str = "full"
    """`full`, `lora`, or `qlora`: LoRA on a base in nf4."""
    masters: str = "fp32"
    """Of full training: `fp32`, or `bf16_stochastic`: weights and gradients in bf16."""
    optimizer: str = "adamw"
    compute_dtype: torch.dtype
    gradient_checkpointing: bool = False
    batch_size: int
    gradient_accumulation: int = 1
    length: int
    """Of the longest row or pack, in tokens."""
    is_packed: bool = False
    device_type: str = "cuda"
    attention: str = "auto"
    """`eager` keeps its matrix; all others count as sdpa."""
    lora: LoraSection = field(default_factory=LoraSection)
    num_processes: int = 1
    is_sharded: bool = False
    """Processes share out weights, gradients and optimizer state (FSDP2); else each has a copy."""
    is_resharded: bool = True
    """Shards: a layer's gathered weights are given back after its forward pass."""
    preview_rows: int = 0
    """Prompts that are answered at once on this device."""
    preview_tokens: int = 0
    """Of the longest prompt and its answer."""
    arenas: int = 0
    """Copies of the trained weights that are held in shared memory for a preview server."""

    def __post_init__(self) -> None:
        """Weights in bf16 are computed with in bf16."""
        if self.is_stochastic:
            object.__setattr__(self, "compute_dtype", torch.bfloat16)

    @property
    def is_stochastic(self) -> bool:
        """Weights and gradients are bf16."""
        return self.training_mode == "full" and self.masters == "bf16_stochastic"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use. The parts of a step are not all there at once: see `step`."""

    num_parameters: int
    num_trainable: int
    weights: int
    """Of this process: its shards, where weights are shared out; so are gradients and optimizer."""
    gradients: int
    optimizer: int
    copies: int
    """Of fp32 weights in the compute dtype, which autocast keeps from forward to backward; of
    shards: what is gathered at once, see `gathered_bytes`."""
    activations: int
    """Of one micro-batch of the longest rows, as the forward pass leaves them."""
    loss: int
    """Logits with softmax and gradient, of one tile where they are made in tiles."""
    step: int
    """Most of gradients, copies, activations and loss that is there at once."""
    previews: int
    """Keys and values of local previews, between steps."""
    host: int
    """Copies of weights in shared memory, and optimizer state that is paged out."""
    is_counted: bool = True
    """False: this model cannot be run on shapes alone, and the step is a rough formula's."""

    @property
    def total(self) -> int:
        """The peak on the device."""
        return self.weights + self.optimizer + max(self.step, self.previews)

    def as_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {**dataclasses.asdict(self), "total": self.total}

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) lines for the terminal."""
        share = 100 * self.num_trainable / max(self.num_parameters, 1)
        names = ("gradients", "copies", "activations", "loss")
        parts = ", ".join(f"{name} {size_words(getattr(self, name))}" for name in names)
        found = [
            (
                "parameters",
                f"{self.num_parameters:,}, of them trained {self.num_trainable:,} ({share:.1f} %)",
            ),
            (
                "memory",
                f"about {size_words(self.total)}: weights {size_words(self.weights)}, optimizer "
                f"{size_words(self.optimizer)}, step {size_words(self.step)}",
            ),
            ("step", f"{parts} (not all at once){'' if self.is_counted else '; a rough formula'}"),
        ]
        if self.previews:
            found.append(("previews", f"{size_words(self.previews)} of keys and values"))
        if self.host:
            found.append(("host memory", f"{size_words(self.host)} beside the process itself"))
        return found


def estimate_memory(model_config: Any, setup: MemorySetup) -> MemoryEstimate:
    """Add up what training needs, without making a weight.

    Args:
        model_config: the transformers config of the model; it is not changed.
        setup: how it is trained.
    """
    return _estimate_of(
        _ByContent(model_config.to_json_string(use_diff=False), model_config), setup
    )


@dataclass(frozen=True)
class _ByContent:
    """A model config that is compared by what it says: a dry run asks for some setups twice."""

    text: str
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=64)
def _estimate_of(content: _ByContent, setup: MemorySetup) -> MemoryEstimate:
    with warnings.catch_warnings():  # libraries' own, which the run itself shows
        warnings.simplefilter("ignore")
        model = _meta_model(content.config, setup)
        return _estimate(model, content.config, setup)


def _estimate(model: Any, model_config: Any, setup: MemorySetup) -> MemoryEstimate:
    if setup.is_sharded:
        return _sharded_estimate(model, model_config, setup)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    gradients = gradients_of(model)
    state = int(sum(optimizer_bytes(model, setup)))
    num_parameters = sum(_numel(module, p) for module, p in _owned(model))
    weights = sum(p.numel() * p.element_size() for p in parameters)
    num_trained = sum(p.numel() for p in trained)
    step, is_counted = _step_bytes(model, model_config, setup)
    buckets = gradients if setup.num_processes > 1 else 0  # of DDP: a second copy
    is_paged = setup.optimizer.startswith("paged")
    return MemoryEstimate(
        num_parameters=num_parameters,
        num_trainable=num_trained,
        weights=weights,
        gradients=gradients,
        optimizer=0 if is_paged else state,
        copies=step.copies,
        activations=step.activations,
        loss=step.loss,
        step=step.peak + buckets,
        previews=_cache_bytes(model_config, setup),
        host=(state if is_paged else 0) + setup.arenas * num_trained * setup.compute_dtype.itemsize,
        is_counted=is_counted,
    )


def _sharded_estimate(model: Any, model_config: Any, setup: MemorySetup) -> MemoryEstimate:
    """Each process has 1/N of weights, gradients and optimizer state, and gathers layers in turn.

    Args:
        model: its matrices in the compute dtype, in which they are gathered.
    """
    world = setup.num_processes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    state = int(sum(optimizer_bytes(model, setup)))
    gathered = gathered_bytes(model, is_resharded=setup.is_resharded)
    gradients = math.ceil(4 * trained / world)  # trained shards are fp32
    whole = gradients_of(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    # With gradients that are there before, the count is of what comes beside them.
    step, is_counted = _step_bytes(
        model, model_config, dataclasses.replace(setup, gradient_accumulation=2)
    )
    beside = step.peak - whole
    layers = _heads(model_config.get_text_config())[0]
    late = beside - step.activations + step.activations // max(layers, 1)
    # Gradients come as activations go; those of one more micro-batch are all there beside the sum.
    if setup.gradient_accumulation > 1:
        most = max(gradients + beside, 2 * gradients + late)
    else:
        most = max(beside, gradients + late)
    return MemoryEstimate(
        num_parameters=num_parameters,
        num_trainable=trained,
        weights=math.ceil((4 * trained + frozen) / world),
        gradients=gradients,
        optimizer=math.ceil(state / world),
        copies=gathered,
        activations=step.activations,
        loss=step.loss,
        step=gathered + most,
        previews=_cache_bytes(model_config, setup),
        host=setup.arenas * trained * setup.compute_dtype.itemsize,
        is_counted=is_counted,
    )


def size_words(num_bytes: int) -> str:
    """In GiB, or in MiB below one."""
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{math.ceil(num_bytes / 2**20)} MiB"


# ---- the model on the meta device, in the dtypes of each mode


def _meta_model(model_config: Any, setup: MemorySetup) -> Any:
    config = copy.deepcopy(model_config)
    found = quantization_of(config)
    bits = found.bits if found is not None else 4 if setup.training_mode == "qlora" else None
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        vars(one).pop("quantization_config", None)
    is_full = setup.training_mode == "full"
    has_masters = is_full and not setup.is_stochastic and not setup.is_sharded
    dtype = torch.float32 if has_masters else setup.compute_dtype
    options: dict[str, Any] = {"dtype": dtype}
    if setup.attention == "eager":
        options["attn_implementation"] = "eager"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, **options)
        if is_full:
            return model
        model = add_lora(model, setup.lora, seed=0)
    if bits is not None:
        _quantize(model, NF4_BYTES if bits == 4 else 1.0, setup.compute_dtype)
    return model


def _quantize(model: Any, num_bytes: float, compute_dtype: torch.dtype) -> None:
    """Linear layers but the head as bitsandbytes has them: packed, and unpacked for each use."""
    head = model.get_base_model().get_output_embeddings()
    for module in model.modules():
        if type(module) is not nn.Linear or module is head or module.weight.requires_grad:
            continue
        size = math.ceil(module.weight.numel() * num_bytes)
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        shape = tuple(module.weight.shape)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.plain_shape = shape  # type: ignore[assignment]
        module.forward = functools.partial(_packed_linear, module, compute_dtype)  # type: ignore[method-assign]


def _packed_linear(module: Any, compute_dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _PackedProduct.apply(  # type: ignore[no-untyped-call]
        x.to(compute_dtype), module.weight, module.plain_shape, module.bias
    )
    return out.to(x.dtype)


class _PackedProduct(torch.autograd.Function):
    """x W^T with a weight that is unpacked in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, packed: Any, shape: tuple[int, int], bias: Any) -> Any:
        ctx.shape = shape
        ctx.save_for_backward(packed)
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Every parameter once, with the module that holds it."""
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, parameter


def _numel(module: nn.Module, parameter: nn.Parameter) -> int:
    shape = getattr(module, "plain_shape", None)
    is_packed = shape is not None and parameter is module.weight
    return math.prod(shape) if is_packed and shape is not None else parameter.numel()


# ---- optimizer state


def optimizer_bytes(model: nn.Module, setup: MemorySetup) -> Iterator[float]:
    """State of each trained parameter.

    Args:
        model: with its parameters in the dtype in which they are trained.
    """
    outside = {id(p) for p in _ends(model)}
    for module, parameter in _owned(model):
        if not parameter.requires_grad:
            continue
        num, plain = parameter.numel(), 2 * 4 * parameter.numel()  # moments are fp32
        if setup.optimizer == "muon" and parameter.ndim == 2 and id(parameter) not in outside:
            yield plain / 2  # one momentum
        elif "8bit" in setup.optimizer and _is_packed(module, num, setup):
            yield 2 * (num + 4 * math.ceil(num / BLOCK))
        else:
            yield plain


def _is_packed(module: nn.Module, num: int, setup: MemorySetup) -> bool:
    """Whether an 8-bit optimizer keeps the state of this parameter in 8 bits."""
    if isinstance(module, nn.Embedding):  # they keep 32 bits, see core/optim.py
        return False
    # torchao takes whole blocks only.
    return num >= MIN_8BIT_VALUES and (num % BLOCK == 0 or not setup.is_stochastic)


def _ends(model: Any) -> Iterator[nn.Parameter]:
    """Parameters of embeddings and head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in [*modules, base.get_output_embeddings()]:
        if module is not None:
            yield from module.parameters()


# ---- the step


def _step_bytes(model: Any, model_config: Any, setup: MemorySetup) -> tuple[StepBytes, bool]:
    mixed = setup.compute_dtype != torch.float32
    gradients = gradients_of(model)
    copies = sum(
        p.numel() * setup.compute_dtype.itemsize
        for p in model.parameters()
        if mixed and p.requires_grad and p.dtype == torch.float32 and p.ndim == 2
    )
    shape = StepShape(
        batch_size=setup.batch_size,
        length=setup.length,
        has_mask=(setup.is_packed or setup.batch_size > 1) and "flash" not in setup.attention,
        autocast_dtype=setup.compute_dtype if mixed else None,
        gradient_checkpointing=setup.gradient_checkpointing,
        accumulates=setup.gradient_accumulation > 1,
        device_type=setup.device_type,
    )
    try:
        return count_step(model, shape), True
    except Exception:  # whatever a model's own code does with values that are not there
        kept, loss = _formula(model_config, setup)
        return StepBytes(gradients + copies + kept + loss, kept, copies, loss), False


def _formula(model_config: Any, setup: MemorySetup) -> tuple[int, int]:
    """Activations and loss of a dense transformer, roughly, with attention that keeps no matrix.

    Per token and layer: two norms' inputs and outputs (4 h), queries, keys, values before and
    after the rotation, the attention's output, and gate, up and their product in the MLP.
    """
    text = model_config.get_text_config()
    hidden = getattr(text, "hidden_size", None) or 0
    ffn = getattr(text, "intermediate_size", None) or 4 * hidden
    layers, heads, keys, head = _heads(text)
    per_token = 4 * hidden + 3 * heads * head + 4 * keys * head + 3 * ffn
    tokens = setup.batch_size * setup.length
    kept = layers * per_token
    if setup.gradient_checkpointing:  # layer inputs, and one layer at a time in full
        kept = layers * hidden + per_token
    vocabulary = getattr(text, "vocab_size", None) or 0
    positions = min(tokens, tile_length(vocabulary, setup.device_type)) if vocabulary else 0
    logits = positions * vocabulary
    return int(tokens * kept * setup.compute_dtype.itemsize), logits * LOGIT_BYTES


def _cache_bytes(model_config: Any, setup: MemorySetup) -> int:
    """Keys and values of all prompts of a preview, at their longest."""
    layers, _, keys, head = _heads(model_config.get_text_config())
    tokens = setup.preview_rows * setup.preview_tokens
    return int(2 * layers * keys * head * tokens * setup.compute_dtype.itemsize)


def _heads(text: Any) -> tuple[int, int, int, int]:
    """Layers, heads, heads of keys, size of a head; 0 where a model has no such thing."""
    layers = getattr(text, "num_hidden_layers", None) or 0
    heads = getattr(text, "num_attention_heads", None) or 0
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    keys = max(keys) if isinstance(keys, list | tuple) else keys
    size = getattr(text, "head_dim", None) or (
        (getattr(text, "hidden_size", None) or 0) // heads if heads else 0
    )
    return layers, heads, keys, size


# ---- what there is


def device_memory(device: torch.device) -> int:
    """Bytes that a process can fill on a device: all of a GPU's, its part of the host's free ones.

    The processes that a launcher starts on one machine share its memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(psutil.virtual_memory().available, memory_left())) // sharers


def fits(num_bytes: int, memory: int, *, device_type: str = "cuda") -> bool:
    """Whether tensors of so many bytes fit into a device of so much memory."""
    context = CONTEXT if device_type == "cuda" else 0
    return num_bytes <= USABLE * (memory - context)
