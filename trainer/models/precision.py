"""One precision from load to save: floating-point dtypes, and quantized weights."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config.schema import TrainerConfig
from trainer.config.section import Precision, TrainingMode
from trainer.errors import ConfigError, ModelError
from trainer.models.devices import cuda_problem

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class ResolvedPrecision:
    """Every dtype of a run, decided together."""

    name: Precision
    compute_dtype: torch.dtype
    """Matrix products, previews, snapshots and the final model."""
    load_dtype: torch.dtype
    """Weights as loaded; frozen weights stay in it."""
    master_dtype: torch.dtype
    """Weights that the optimizer moves."""
    autocast_dtype: torch.dtype | None
    """None: no autocast, everything is fp32."""
    use_bf16: bool
    """TrainingArguments.bf16."""
    use_fp16: bool
    """TrainingArguments.fp16, which scales gradients."""
    reason: str
    """What was chosen and why, in words."""


def resolve_device(device: str) -> torch.device:
    """Turn `environment.device` into a torch device.

    Raises:
        ConfigError: the device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {device!r} is not one of auto, cpu, mps, cuda, cuda:N.")
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            why = "" if (problem := cuda_problem()) is None else f" that torch can use ({problem})"
            raise ConfigError(
                f"device {device!r}: this machine has {count} CUDA devices{why}; "
                "choose one of them, or cpu."
            )
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {device!r}: not available here; choose cpu or cuda.")
    return wanted


def default_precision(device: torch.device) -> Precision:
    """bf16 where the device computes in it: emulated, it is many times slower than fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def fill_precision(config: TrainerConfig, device: torch.device) -> tuple[TrainerConfig, Precision]:
    """The config with `hyperparams.fp_precision` filled where it is empty, and its value."""
    hyper = config.hyperparams
    if hyper.fp_precision is not None:
        return config, hyper.fp_precision
    chosen = default_precision(device)
    filled = hyper.model_copy(update={"fp_precision": chosen})
    return config.model_copy(update={"hyperparams": filled}), chosen


def resolve_precision(
    fp_precision: Precision, training_mode: TrainingMode, device: torch.device
) -> ResolvedPrecision:
    """Decide load dtype, master dtype, autocast dtype and TrainingArguments flags together.

    Full fine-tuning keeps fp32 master weights: at usual learning rates most updates are smaller
    than half a bf16 step and would be lost. LoRA keeps the frozen base in the compute dtype and
    only the adapters in fp32.

    Raises:
        ConfigError: the device cannot compute in this precision.
    """
    _check_device(fp_precision, device)
    compute = DTYPES[fp_precision]
    mixed = compute != torch.float32
    load = compute if training_mode == "lora" else torch.float32
    if not mixed:
        reason = f"fp32 everywhere on {device}"
    elif training_mode == "full":
        reason = (
            f"computes in {fp_precision} by autocast on {device}, keeps fp32 master weights "
            f"(small updates would be lost in {fp_precision}), saves the model in {fp_precision}"
        )
    else:
        reason = (
            f"computes in {fp_precision} by autocast on {device}, frozen base in {fp_precision}, "
            "adapters in fp32"
        )
    if fp_precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        reason += "; this CPU has no bf16 arithmetic, so that fp32 (--fp32) is likely faster"
    return ResolvedPrecision(
        name=fp_precision,
        compute_dtype=compute,
        load_dtype=load,
        master_dtype=torch.float32,
        autocast_dtype=compute if mixed else None,
        use_bf16=fp_precision == "bf16",
        use_fp16=fp_precision == "fp16",
        reason=reason,
    )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (x86: AMX or AVX512-BF16); others are taken to."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, but all there is
    found = [getattr(torch.cpu, name, None) for name in names]
    return any(check() for check in found if check is not None) or None in found


def _check_device(fp_precision: Precision, device: torch.device) -> None:
    if fp_precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"hyperparams.fp_precision=fp16 needs a CUDA GPU, the device is {device}: fp16 "
            "gradients need scaling, which only CUDA has. Use bf16 or fp32."
        )
    if fp_precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(
                f"hyperparams.fp_precision=bf16: {name} has no bf16 arithmetic. Use fp16 or fp32."
            )


# ---- models whose weights are quantized already: what works with them
#
# bitsandbytes models (4 and 8 bit) can be the frozen base of LoRA. Nothing else of this kind is
# loaded, and no quantized weight is trained, merged into or sent to a preview server.


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


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Give all floating weights that are saved with a model a dtype, in place.

    `model.to(dtype)` would also round what the model computes anew, such as the frequencies of
    rotary positions, which must stay fp32.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


# ---- saving in it


def save_full(
    model: Any, folder: Path, dtype: torch.dtype, stop_ids: frozenset[int], use_cache: bool
) -> None:
    """save_pretrained with weights cast on the way and a config that says so.

    Args:
        model: its own weights are not changed.
        dtype: floating-point weights are saved in it.
        stop_ids: become the model's end-of-text ids, so that generation elsewhere stops too.
        use_cache: value for the saved config (training turns it off).
    Raises:
        OSError: the folder cannot be written.
    """
    weights = cast_state(model.state_dict(), dtype)
    config, generation = model.config, model.generation_config
    before = config.use_cache, generation.eos_token_id
    named = generation.eos_token_id
    named = set(named if isinstance(named, list) else [named]) - {None}
    try:
        config.use_cache = use_cache
        generation.eos_token_id = sorted(named | stop_ids)
        model.save_pretrained(folder, state_dict=weights)
    finally:
        config.use_cache, generation.eos_token_id = before
    # save_pretrained writes the dtype of the model in memory, not that of the weights it was given.
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cast_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating tensors in another dtype; names that share one tensor share its copy too.

    save_pretrained tells tied weights by their memory: cast one by one, a tied head is saved twice.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    cast = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            cast[name] = tensor
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.data_ptr() == 0 or key not in copies:  # no memory: nothing to share
            copies[key] = tensor.to(dtype)
        cast[name] = copies[key]
    return cast
