"""Models whose weights are quantized already: what works with them, one clear error for the rest.

bitsandbytes models (4 and 8 bit) can be the frozen base of LoRA. Nothing else of this kind is
loaded, and no quantized weight is trained, merged into or sent to a preview server.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ModelError

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
            "`pip install 'ultimate-trainer[8bit]'`."
        )


def check_trainable(config: Any, name: str, *, training_mode: str, previews: str | None) -> None:
    """Refuse, before anything is written, what a run cannot do with a quantized model.

    Args:
        training_mode: `full` or `lora`.
        previews: the preview backend; None: no previews.
    Raises:
        ModelError: the model is quantized, and this mode or backend needs its plain weights.
    """
    found = quantization_of(config)
    if found is None:
        return
    check_loadable(config, name)
    if training_mode != "lora":
        raise ModelError(
            f"{name}: its weights are quantized already ({found}), and "
            f"hyperparams.training_mode={training_mode} would have to move them. Train adapters "
            "(hyperparams.training_mode=lora), or give the model it was made from."
        )
    if previews in ("sidecar", "remote_3090"):
        raise ModelError(
            f"{name}: its weights are quantized already ({found}), and "
            f"monitoring.preview_backend={previews} sends plain weights to a preview server. Use "
            "monitoring.preview_backend=local, or give the model it was made from."
        )


def check_takes_weights(config: Any, name: str) -> None:
    """Refuse a quantized model as the frame of plain weights that a trainer sends.

    Raises:
        ModelError: it is one.
    """
    found = quantization_of(config)
    if found is not None:
        raise ModelError(
            f"{name}: its weights are quantized ({found}), and a trainer sends plain ones. Give "
            "the model that it was quantized from."
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
