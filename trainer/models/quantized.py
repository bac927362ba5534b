"""Quantized weights: what can be used, a base that is quantized while loading, its tensors by name.

Models of bitsandbytes (4 and 8 bit) can be the frozen base of adapters; `training_mode=qlora` makes
one out of a plain model: nf4, with scales that are quantized themselves. No quantized weight is
trained or merged into.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError, ModelError
from trainer.models import is_quantization_state

USABLE = "bitsandbytes"

KEYS = ("quantization_config", "compression_config")

UNPACK = {
    "mxfp4": "; transformers unpacks it: from_pretrained(..., quantization_config="
    "Mxfp4Config(dequantize=True)), then save_pretrained"
}


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are quantized."""

    method: str
    bits: int | None

    def __str__(self) -> str:
        """In words, such as `bitsandbytes, 4 bit`."""
        return self.method if self.bits is None else f"{self.method}, {self.bits} bit"


def quantization_of(config: Any) -> Quantization | None:
    """What a model config says of quantized weights; None where they are plain numbers."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for one in (config, text_config):
        for key in KEYS:
            found = getattr(one, key, None)
            if found:
                return _read(found if isinstance(found, Mapping) else found.to_dict())
    return None


def _read(record: Mapping[str, Any]) -> Quantization:
    four, eight = record.get("load_in_4bit"), record.get("load_in_8bit")
    bits = 4 if four else 8 if eight else record.get("bits")
    named = record.get("quant_method") or (USABLE if four or eight else "an unnamed method")
    return Quantization(str(getattr(named, "value", named)), bits)


def check_loadable(config: Any, name: str) -> None:
    """Refuse quantized weights that this program cannot compute with.

    Args:
        config: of the model.
        name: of the model, with the option that gave it.
    Raises:
        ModelError: another method than bitsandbytes, or bitsandbytes is missing.
    """
    found = quantization_of(config)
    if found is None:
        return
    if found.method != USABLE:
        raise ModelError(
            f"{name}: its weights are quantized already ({found}), and of such models only those "
            "of bitsandbytes can be used here. Give the model it was made from, which is not "
            f"quantized{UNPACK.get(found.method, '')}."
        )
    if importlib.util.find_spec(USABLE) is None:
        raise ModelError(
            f"{name}: its weights are quantized ({found}), which needs the package {USABLE}; "
            "`pip install 'ultimate-trainer[qlora]'`."
        )


def check_trainable(config: Any, name: str, *, training_mode: str) -> None:
    """Refuse, before anything is written, what a run cannot do with this model's weights.

    Args:
        training_mode: `full`, `lora` or `qlora`.
    Raises:
        ModelError: the model is quantized, and this mode needs its plain weights.
        ConfigError: the mode quantizes it, and bitsandbytes is missing.
    """
    if training_mode == "qlora":
        check_bitsandbytes("hyperparams.training_mode=qlora")
    found = quantization_of(config)
    if found is None:
        return
    check_loadable(config, name)
    if training_mode == "full":
        raise ModelError(
            f"{name}: its weights are quantized already ({found}), and "
            "hyperparams.training_mode=full would have to move them. Train adapters "
            "(hyperparams.training_mode=lora), or give the model it was made from."
        )


def check_bitsandbytes(where: str) -> None:
    """Refuse what needs bitsandbytes where it is missing.

    Args:
        where: the option that needs it.
    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec(USABLE) is None:
        raise ConfigError(
            f"{where} needs the package {USABLE}: pip install 'ultimate-trainer[qlora]'."
        )


def check_mergeable(config: Any, name: str) -> None:
    """Refuse a quantized base for a merge.

    Raises:
        ModelError: adding an adapter to rounded weights would round them again.
    """
    found = quantization_of(config)
    if found is not None:
        raise ModelError(
            f"{name}: its weights are quantized ({found}), and an adapter that is merged into them "
            "is rounded away. Leave --merge out (plain PEFT loads the adapter), or give the model "
            "that it was quantized from: --base FOLDER_OR_HUB_ID."
        )


def place(model: Any, device: Any) -> Any:
    """The model on a device; quantized weights were loaded where they are to stay."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


# ---- a plain base, quantized while it is loaded
#
# nf4 in blocks of 64 weights with double quantization: 0.516 bytes a weight. Embeddings, norms and
# the head stay in the run's dtype.


def nf4(dtype: torch.dtype) -> Any:
    """The BitsAndBytesConfig of `training_mode=qlora`; matrix products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig  # optional: it looks for bitsandbytes

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_layout(model: Any) -> None:
    """Have bitsandbytes leave the weights as they were quantized.

    On CPUs with AVX512-BF16 it packs them anew in the first forward pass without gradients, in
    place. Its kernel for that layout has no backward: every training step after a preview or an
    evaluation would get wrong gradients, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers of bitsandbytes in a model, by name; their weights may still have no memory."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(USABLE) and isinstance(module, nn.Linear):
            yield name, module


def quantized_share(model: Any) -> str:
    """In words, how much of a quantized model is quantized, and what its weights take."""
    layers = list(quantized_layers(model))
    small = sum(layer.in_features * layer.out_features for _, layer in layers)
    held = {id(layer.weight) for _, layer in layers}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in held)
    size = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    return (
        f"{small / (small + plain):.0%} of the base's {small + plain:,} weights are quantized; it "
        f"takes {size / 2**20:,.0f} MiB"
    )


def set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights in place; products with quantized ones, which stay, are made in `dtype`.

    Only what is saved with a model: `model.to(dtype)` would also round what it computes anew, such
    as the frequencies of rotary positions, which must stay fp32.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not is_quantization_state(name):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    for _, layer in quantized_layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


# What makes two quantized models the same architecture; the dtype of products is each side's own.
RECORDED = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_threshold"),
    "llm_int8_skip_modules",
)


def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config's `quantization_config` that two copies of a model have in common."""
    return {key: record.get(key) for key in RECORDED}
