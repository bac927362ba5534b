"""A quantized base in the engine: the tensors it must have, and a file of them checked and loaded.

What is checked here keeps a file from making bitsandbytes' kernels read behind a tensor's end: its
sizes come from texts in the file, and they must be those of the model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from trainer.models.quantized import keep_layout, quantized_layers
from trainer.publish.identity import DTYPES, canonical_tensors
from trainer.publish.wire import TensorEntry
from trainer.server.weight_store import MAX_TEXT, QUANTIZATION_TEXT

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own."""

UNKNOWN = "0" * 64


class BadQuantizationError(Exception):
    """A file is no quantized copy of this model."""


def frame_of(config: Any) -> Any:
    """The model of a config without memory, with quantized layers where it will have them."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config = copy.deepcopy(config)
    how = _record(config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=True)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    model.config.quantization_config = how
    return model


def _record(config: Any) -> dict[str, Any]:
    """How a config's model is quantized, as it is saved; transformers keeps it in two forms."""
    how = config.quantization_config
    return dict(how) if isinstance(how, Mapping) else dict(how.to_dict())


def outline_of(frame: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a quantized model by name, without memory; a text has no bytes here."""
    found = canonical_tensors(frame)
    for name, layer in quantized_layers(frame):
        place, (rows, columns) = f"{name}.weight", (layer.out_features, layer.in_features)
        if hasattr(layer, "quant_state"):
            found |= _outline_of_4bit(place, layer.weight, rows * columns)
        else:
            found[place] = _empty((rows, columns), torch.int8)
            found[f"{name}.SCB"] = _empty((rows,), torch.float32)
            found[f"{name}.weight_format"] = _empty((), torch.uint8)
    return {name: found[name] for name in sorted(found)}


def _outline_of_4bit(place: str, weight: Any, count: int) -> dict[str, torch.Tensor]:
    scales = math.ceil(count / BLOCK)
    found = {
        place: _empty(((count + 1) // 2, 1), torch.uint8),
        f"{place}.quant_map": _empty((16,), torch.float32),
        f"{place}.quant_state.bitsandbytes__{weight.quant_type}": _empty((0,), torch.uint8),
    }
    if not weight.compress_statistics:
        return {**found, f"{place}.absmax": _empty((scales,), torch.float32)}
    return {
        **found,
        f"{place}.absmax": _empty((scales,), torch.uint8),
        f"{place}.nested_absmax": _empty((math.ceil(scales / NESTED_BLOCK),), torch.float32),
        f"{place}.nested_quant_map": _empty((256,), torch.float32),
    }


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def entries_of(outline: dict[str, torch.Tensor]) -> list[TensorEntry]:
    """The tensors of a manifest; what their bytes are is not known yet."""
    return [
        TensorEntry.model_validate(
            {"name": name, "dtype": DTYPES[one.dtype], "shape": list(one.shape), "sha256": UNKNOWN}
        )
        for name, one in outline.items()
    ]


def load_quantized(path: str, config: Any, device: torch.device) -> Any:
    """A quantized model from a file that holds all of it, as `state_dict()` names it.

    Raises:
        BadQuantizationError: the file is no quantized copy of the config's model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    frame = frame_of(config)
    outline, tensors = outline_of(frame), load_file(path)
    odd = sorted(set(outline) ^ set(tensors))
    if odd:
        raise BadQuantizationError(f"the file's tensors differ from the model's: {odd[0][:200]!r}")
    for name, one in outline.items():
        if QUANTIZATION_TEXT not in name and not _is_alike(tensors[name], one):
            raise BadQuantizationError(f"{name} differs in shape or dtype from the model's")
    for name, layer in quantized_layers(frame):
        if hasattr(layer, "quant_state"):
            kind = layer.weight.quant_type
            _check_blob(tensors[f"{name}.weight{QUANTIZATION_TEXT}{kind}"], layer, kind)
    config = copy.deepcopy(config)
    config.quantization_config = _record(config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, device_map={"": str(device)}
    )
    keep_layout(model)
    return model


def _is_alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())


def _check_blob(blob: torch.Tensor, layer: Any, kind: str) -> None:
    """Compare what a text says of a matrix with the layer that it is for."""
    wanted: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": BLOCK,
        "shape": [layer.out_features, layer.in_features],
    }
    if layer.weight.compress_statistics:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    try:
        if blob.dtype != torch.uint8 or blob.ndim != 1 or blob.numel() > MAX_TEXT:
            raise ValueError("not a short text")
        said = json.loads(bytes(blob.tolist()))
        dtype, offset = said.pop("dtype"), said.pop("nested_offset", 0.0)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {str(dtype)[:40]!r}")
        if type(offset) is not float or not math.isfinite(offset):
            raise ValueError("nested_offset is no number")
        if said != wanted:
            raise ValueError(f"{str(said)[:200]} for {wanted}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadQuantizationError(f"a matrix is quantized in another way: {error}") from error
