"""Hashes that say which weights, config, tokenizer and chat template a model has."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from trainer.files import canonical_hash
from trainer.models.chat_template import chat_template_hash, tokenizer_hash
from trainer.publish.wire import AdapterConfig, TensorEntry, WeightsManifest

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Keys of a config that differ between two loads of the same architecture.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def canonical_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by their Hugging Face names, tied ones once, sorted by name.

    The parameters themselves, as in the two functions below: detach before changing them.
    """
    saved = set(model.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    found |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: found[name] for name in sorted(found)}


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter run trains (`modules_to_save` too), sorted by name, of a PEFT model.

    The adapter's own name is left out of the names, so that both sides may call it as they like.
    """
    found = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }
    return {name: found[name] for name in sorted(found)}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights under the adapters of a PEFT model, by the names of the plain model."""
    found = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in canonical_tensors(model.get_base_model()).items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    return {name: found[name] for name in sorted(found)}


def adapter_config(model: Any) -> AdapterConfig:
    """How the adapters of a PEFT model are built, with every target module by its full name."""
    config = model.peft_config["default"]
    base = model.get_base_model()
    targets = sorted(name for name, module in base.named_modules() if hasattr(module, "lora_A"))
    return AdapterConfig(
        r=config.r,
        alpha=config.lora_alpha,
        target_modules=targets,
        modules_to_save=sorted(config.modules_to_save or ()),
    )


def tensor_hash(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, as safetensors lays them out."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def tensor_entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    """Name, dtype, shape and hash of one tensor."""
    return TensorEntry.model_validate(
        {
            "name": name,
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": tensor_hash(tensor),
        }
    )


def config_hash(config: Any) -> str:
    """Hash of a model config, without names, versions and dtype."""
    plain = json.loads(config.to_json_string(use_diff=False))
    return canonical_hash({key: value for key, value in plain.items() if key not in VOLATILE})


def model_manifest(model: Any, tokenizer: Any) -> WeightsManifest:
    """The manifest of a model as it is now; its `weights_id` names the weights."""
    return WeightsManifest(
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
        tensors=[tensor_entry(name, tensor) for name, tensor in canonical_tensors(model).items()],
    )
