"""An adapter as the beginning of a new run: its base, its options, its weights made trainable.

How an adapter is built is not to be chosen again: rank, scale and modules are those that its
weights were trained with. They take the place of what section `lora` has as defaults.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from trainer.config.training_sections import LoraSection, ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.models import is_adapter_folder, resolve_alias
from trainer.models.adapter_files import (
    base_of,
    check_base,
    describe_base,
    read_adapter_config,
    token_rows,
)
from trainer.models.adapters import adapted_modules, add_lora, put_on
from trainer.models.load import grow_embeddings, load_model, read_model_config
from trainer.models.quantized import quantization_of

ADVICE = "its folder or hub id as base_model_name_or_path in the adapter's adapter_config.json"

# PEFT's names of what can be trained on, published and merged; of anything else the default.
KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("target_modules", "modules_to_save", "fan_in_fan_out", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("layers_to_transform", "layers_pattern"),
}

EMBEDDINGS = {"embed_tokens", "lm_head"}
"""Names of modules whose adapters PEFT ties; see `lora.ensure_weight_tying`."""

STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


def adapter_of(section: ModelSection) -> Path | None:
    """The folder of the adapter that `model.model_path` is; None where it is a whole model."""
    path = Path(resolve_alias(section.model_path))
    return path if is_adapter_folder(path) else None


def base_section(section: ModelSection) -> ModelSection:
    """The model to load: an adapter's base, all other options as given; else the model itself.

    Raises:
        ModelError: the base is no longer there, or the adapter names none.
    """
    folder = adapter_of(section)
    if folder is None:
        return section
    base = base_of(folder, base=None, advice=ADVICE)
    return section.model_copy(update={"model_path": base.model_path, "revision": base.revision})


def adapter_options(section: LoraSection, folder: Path, model_config: Any) -> LoraSection:
    """Section `lora` with what the adapter decides.

    Args:
        model_config: of the base.
    Raises:
        ConfigError: an option was given that says something else.
        ModelError: the adapter is of a kind that cannot be trained on.
    """
    config = _peft_config(folder)
    mine = LoraSection.model_validate(
        {
            **section.model_dump(),
            "r": config.r,
            "alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "target_modules": tuple(sorted(config.target_modules)),
            "modules_to_save": tuple(sorted(config.modules_to_save or ())),
            "layers_to_transform": _numbers(config.layers_to_transform),
            "ensure_weight_tying": config.ensure_weight_tying,
            "init": "default",  # nothing of it is left
            **({} if "dropout" in section.model_fields_set else {"dropout": config.lora_dropout}),
        }
    )
    given = {name for name in section.model_fields_set if name not in ("dropout", "neftune_alpha")}
    wrong = [name for name in sorted(given) if getattr(section, name) != getattr(mine, name)]
    if "target_modules" in wrong and _targets(section, model_config) == _targets(
        mine, model_config
    ):
        wrong.remove("target_modules")  # `all-linear` and the names that it stood for
    if wrong:
        differences = ", ".join(
            f"lora.{name}={getattr(section, name)} (the adapter: {getattr(mine, name)})"
            for name in wrong
        )
        raise ConfigError(
            f"{folder}: the adapter that is trained on decides how it is built, and {differences}; "
            "leave these out, or begin a new adapter on its base."
        )
    return mine


def _numbers(layers: Any) -> tuple[int, ...]:
    return (layers,) if isinstance(layers, int) else tuple(layers or ())


def _targets(section: LoraSection, model_config: Any) -> set[str]:
    """Full names of the adapted modules, found on a model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
        return adapted_modules(add_lora(model, section, seed=0))


def _peft_config(folder: Path) -> Any:
    """How an adapter is built.

    Raises:
        ModelError: it is none of LoRA's, or has options that are not known here.
    """
    from peft import LoraConfig, PeftConfig

    read_adapter_config(folder)  # a broken file is told in our words
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    advice = "merge it (`trainer export FOLDER --merge`) and train a new adapter on the result."
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"{folder}: a {config.peft_type} adapter cannot be trained on, only LoRA can; {advice}"
        )
    plain, odd = LoraConfig().to_dict(), []
    for name, value in config.to_dict().items():
        is_start = name == "init_lora_weights" and value in STARTS
        if name not in KNOWN and not is_start and (value or None) != (plain.get(name) or None):
            odd.append(f"{name}={value!r}")
    if isinstance(config.target_modules, str):
        odd.append(f"target_modules={config.target_modules!r}")
    elif config.ensure_weight_tying and EMBEDDINGS & {
        name.rsplit(".", 1)[-1] for name in config.target_modules
    }:
        odd.append("ensure_weight_tying of target_modules")
    if odd:
        raise ModelError(
            f"{folder}: an adapter with {', '.join(odd)[:300]} cannot be trained on; {advice}"
        )
    return config


def load_base(
    section: ModelSection,
    *,
    dtype: torch.dtype,
    seed: int,
    offline: bool,
    device: torch.device,
    quantize: bool = False,
    is_described: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """The model of a run, without adapters, and what `base.json` will say of it.

    An adapter's base is compared with what is recorded beside the adapter, and gets the rows of
    the tokens that the adapter was trained with.

    Args:
        quantize: as of `load_model`, which takes the rest too.
        is_described: False where all weights are trained, and no base is to be known again.
    Raises:
        ModelError: it cannot be loaded, or is not the adapter's base.
    """
    folder, where = adapter_of(section), base_section(section)
    is_copy = quantize and quantization_of(read_model_config(where, offline=offline)) is None
    model = load_model(
        where, dtype=dtype, seed=seed, offline=offline, device=device, quantize=quantize
    )
    record = describe_base(model, is_quantized_copy=is_copy) if is_described else {}
    if folder is not None:
        check_base(folder, model, advice=ADVICE)
        rows = token_rows(folder)
        if rows:
            grow_embeddings(model, rows)
    return model, record


def train_on(model: Any, folder: Path, section: LoraSection, *, seed: int) -> Any:
    """Put an adapter on its base, ready to be trained further; all that is trained is fp32.

    Args:
        model: the base, compared with what is known of it, with rows for all tokens.
        section: of `adapter_options`.
        seed: of weights that the files should all replace.
    Raises:
        ModelError: the files do not fit it.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = _peft_config(folder)
    config.inference_mode, config.lora_dropout = False, section.dropout
    config.base_model_name_or_path = None  # where it is now: of the model
    try:
        adapted = put_on(model, config, seed=seed)
        # Into fp32: PEFT's own loading would round modules_to_save to the dtype of the base.
        found = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, UserWarning) as error:
        raise ModelError(_misfit(folder, model, " ".join(str(error).split())[:300])) from error
    trained = {name for name, one in adapted.named_parameters() if one.requires_grad}
    lost = sorted(trained & set(found.missing_keys)) or sorted(found.unexpected_keys)
    if lost:
        raise ModelError(_misfit(folder, model, f"{lost[0]} is on one side only"))
    return adapted


def _misfit(folder: Path, model: Any, cause: str) -> str:
    return (
        f"{folder}: this adapter does not fit {model.config._name_or_path}, which must be the "
        f"model it was trained on; give {ADVICE}. Cause: {cause}"
    )
