"""`model.attn_implementation`: which attention code a run asks transformers for, and why.

What a name promises is proved on the loaded model before the first step (trainer/core/proofs.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config.training_sections import HUB_KERNEL, ModelSection
from trainer.errors import ModelError
from trainer.models.precision import ResolvedPrecision

NEWEST_FIRST = (3, 2)
"""Versions of flash attention that `auto` tries where they are installed."""

WITHOUT_DROPOUT = ("flash_attention_3", "flash_attention_4")
"""Their kernels take no dropout, and transformers leaves it out without a word."""

EXTRA = "pip install 'ultimate-trainer[kernels]'"

PACKAGES = {
    2: f"flash-attn (`pip install flash-attn --no-build-isolation`) or kernels (`{EXTRA}`)",
    3: f"flash-attn-3 (built from its sources) or kernels (`{EXTRA}`)",
    4: f"flash-attn-4 (`pip install flash-attn-4`) or kernels (`{EXTRA}`)",
}


@dataclass(frozen=True)
class AttentionPlan:
    """Which attention a run tries before its first step."""

    asked: str
    """`auto`, or the only one to take."""
    candidates: tuple[str, ...]
    """With `auto`: to be tried, best first, before the model's own choice."""
    reason: str
    """What is planned and why, in words."""


def plan_attention(
    section: ModelSection,
    config: Any,
    *,
    device: torch.device,
    precision: ResolvedPrecision,
    is_compiled: bool = False,
) -> AttentionPlan:
    """What `model.attn_implementation` means here, before any weights are loaded.

    Args:
        config: of the model.
        is_compiled: its layers are compiled, and flash attention's batches are not for that.
    Raises:
        ModelError: the name cannot be used with this device, precision, model or installation.
    """
    asked = section.attn_implementation
    if asked != "auto":
        _check_name(asked, device, precision)
        if asked in WITHOUT_DROPOUT and _dropout(config):
            raise _refusal(asked, f"it has no dropout; config.json has {_dropout(config)}")
        _check_model(section, config)
        return AttentionPlan(asked, (), f"{asked}, as configured")
    own = "auto: the model's own choice, usually sdpa"
    if device.type != "cuda":
        return AttentionPlan(asked, (), f"{own} (flash attention has no kernels for {device.type})")
    if is_compiled:
        return AttentionPlan(asked, (), f"{own} (flash attention is not compiled)")
    if precision.compute_dtype == torch.float32:
        return AttentionPlan(asked, (), f"{own} (flash attention has no fp32)")
    candidates = installed_attention()
    if _dropout(config):
        candidates = tuple(name for name in candidates if name not in WITHOUT_DROPOUT)
    if not candidates:
        return AttentionPlan(asked, (), f"{own} (flash attention is not installed)")
    first = f"auto: {' or '.join(candidates)} where the model is proved right with it, else "
    return AttentionPlan(asked, candidates, f"{first}its own choice")


def installed_attention() -> tuple[str, ...]:
    """The versions of flash attention that are installed as packages, best first."""
    return tuple(f"flash_attention_{n}" for n in NEWEST_FIRST if _is_installed(n))


def _check_name(name: str, device: torch.device, precision: ResolvedPrecision) -> None:
    """What can be said without the model."""
    if HUB_KERNEL.fullmatch(name) and not _has_hub_kernels():
        raise _refusal(name, f"kernels of the hub need the package kernels; `{EXTRA}`")
    if name == "flex_attention" and device.type == "cpu":
        raise _refusal(name, "torch's flex_attention has no backward pass on the CPU")
    if not name.startswith("flash_attention_"):
        return
    version = int(name[-1])
    kinds = sorted({kind for _, kind in _flash(version)["supported_devices"]})
    if device.type not in kinds:
        raise _refusal(name, f"it runs on {', '.join(kinds)}, and the device is {device}")
    if not (_is_installed(version) or _has_hub_kernels()):
        raise _refusal(name, f"it needs the package {PACKAGES[version]}")
    if device.type == "cuda" and precision.compute_dtype == torch.float32:
        raise _refusal(name, "it computes in half precision only; hyperparams.fp_precision is fp32")


def _check_model(section: ModelSection, config: Any) -> None:
    """Let transformers judge, by a model without weights; a kernel of the hub is fetched here."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.hub_kernels import allow_all_hub_kernels

    name = section.attn_implementation
    is_trusted = section.trust_remote_code
    before = config._attn_implementation
    try:
        with (
            torch.device("meta"),
            allow_all_hub_kernels() if is_trusted else contextlib.nullcontext(),
        ):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=name, trust_remote_code=is_trusted
            )
    except Exception as error:  # whatever a foreign kernel's package raises
        raise attention_error(name, error) from error
    finally:
        config._attn_implementation = before


def attention_error(name: str, error: Exception) -> ModelError:
    """The refusal of an attention by its own words."""
    cause = " ".join(str(error).split()).rpartition("following error: ")[2][:300]
    return _refusal(name, cause or type(error).__name__)


def _refusal(name: str, cause: str) -> ModelError:
    return ModelError(
        f"model.attn_implementation={name} cannot be used here: {cause.rstrip('.')}. Use auto, or "
        "another one."
    )


def _dropout(config: Any) -> str:
    """The attention dropout of a model config as `name=value`; empty where there is none."""
    text_config = config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(text_config, name, None):
            return f"{name}={getattr(text_config, name)}"
    return ""


def _flash(version: int) -> dict[str, Any]:
    """What transformers knows of a version of flash attention."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

    found: dict[str, Any] = FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
    return found


def _is_installed(version: int) -> bool:
    return bool(_flash(version)["general_availability_check"]())


def _has_hub_kernels() -> bool:
    from transformers.integrations import hub_kernels

    return bool(hub_kernels.is_kernels_available())
