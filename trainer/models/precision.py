"""One precision from load to save: the dtypes of a run, and a model saved in its own."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config.schema import TrainerConfig
from trainer.config.section import Masters, Precision, TrainingMode
from trainer.errors import ConfigError
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


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: emulated, it is many times slower than fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_has_bf16()


def default_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that has it. A CPU that has it may be slower in it, so it must be asked for."""
    return "bf16" if device.type == "cuda" and computes_in_bf16(device) else "fp32"


def fill_precision(config: TrainerConfig, device: torch.device) -> tuple[TrainerConfig, Precision]:
    """The config with `hyperparams.fp_precision` filled where it is empty, and its value."""
    hyper = config.hyperparams
    if hyper.fp_precision is not None:
        return config, hyper.fp_precision
    chosen: Precision = "bf16" if hyper.masters != "fp32" else default_precision(device)
    filled = hyper.model_copy(update={"fp_precision": chosen})
    return config.model_copy(update={"hyperparams": filled}), chosen


def resolve_precision(
    fp_precision: Precision,
    training_mode: TrainingMode,
    device: torch.device,
    masters: Masters = "fp32",
) -> ResolvedPrecision:
    """Decide load dtype, master dtype, autocast dtype and TrainingArguments flags together.

    Full fine-tuning keeps fp32 master weights: at usual learning rates most updates are smaller
    than half a bf16 step and would be lost. With `masters="bf16_stochastic"` the optimizer rounds
    so that they are not, and the weights are bf16 (see `keep_vectors_wide` for the rest). LoRA
    keeps the frozen base in the compute dtype and only the adapters in fp32.

    Raises:
        ConfigError: the device cannot compute in this precision.
    """
    _check_device(fp_precision, device)
    compute = DTYPES[fp_precision]
    mixed = compute != torch.float32
    is_bf16_kept = training_mode == "full" and masters == "bf16_stochastic"
    load = compute if training_mode != "full" or is_bf16_kept else torch.float32
    base = f"frozen base in {fp_precision}"
    if training_mode == "qlora":
        base = f"frozen base in nf4 (embeddings, norms and head in {fp_precision})"
    if is_bf16_kept:
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"hyperparams.masters={masters} works on CPU and CUDA, and the device is {device}; "
                "use masters=fp32."
            )
        reason = (
            f"computes in bf16 by autocast on {device}, keeps and saves weights in bf16 (updates "
            "are rounded stochastically), norms and biases in fp32"
        )
    elif not mixed and training_mode == "qlora":
        reason = f"computes in fp32 on {device}, {base}, adapters in fp32"
    elif not mixed:
        reason = f"fp32 everywhere on {device}"
    elif training_mode == "full":
        reason = (
            f"computes in {fp_precision} by autocast on {device}, keeps fp32 master weights "
            f"(small updates would be lost in {fp_precision}), saves the model in {fp_precision}"
        )
    else:
        reason = f"computes in {fp_precision} by autocast on {device}, {base}, adapters in fp32"
    if fp_precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        reason += "; this CPU has no bf16 arithmetic, so that fp32 (--fp32) is likely faster"
    return ResolvedPrecision(
        name=fp_precision,
        compute_dtype=compute,
        load_dtype=load,
        master_dtype=torch.bfloat16 if is_bf16_kept else torch.float32,
        autocast_dtype=compute if mixed else None,
        use_bf16=fp_precision == "bf16",
        use_fp16=fp_precision == "fp16",
        reason=reason,
    )


def is_vector(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a module is a norm, a bias or another vector.

    By name too: biases of experts and norms of attention heads have two dimensions.
    """
    is_norm = "norm" in type(module).__name__.lower()
    return parameter.ndim < 2 or is_norm or name.endswith("bias")


def keep_vectors_wide(model: nn.Module) -> None:
    """Make norms, biases and other vectors fp32 in place, beside matrices in bf16.

    A norm's weights are near 1, where a bf16 step is 0.4 to 0.8 %, and they are too few to count.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_vector(module, name, parameter):
                parameter.data = parameter.data.float()


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
