"""LoRA: adapters put on a model, saved, opened with their base again, and merged into it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config.training_sections import LoraSection
from trainer.errors import ConfigError
from trainer.files import SAVED_BASE as SAVED_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel, section: LoraSection, *, seed: int, revision: str | None = None
) -> Any:
    """Put adapters on a model and freeze the rest; all that is trained is fp32.

    Args:
        revision: of the model on the hub, recorded in the adapter.

    Returns:
        A `peft.PeftModel`.
    Raises:
        ConfigError: a target module is not in the model, or is of a kind that takes no adapter.
    """
    from peft import LoraConfig

    targets: Any = section.target_modules
    _check_names(model, section)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(section.modules_to_save) or None,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        return put_on(model, config, seed=seed)
    except ValueError as error:  # PEFT's words for a model that has nothing to adapt
        raise ConfigError(
            f"lora.target_modules={targets} cannot be used with this model: "
            f"{' '.join(str(error).split())[:300]} {_choice(model)}"
        ) from error


def put_on(model: Any, config: Any, *, seed: int) -> Any:
    """New adapters as PEFT's config says; the random state stays as it was.

    Raises:
        ValueError: PEFT's own, where they do not fit the model.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT finds out by itself that GPT-2's layers are stored (in, out), and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        # A tied head gets adapters of its own; `merge_adapter` unties it.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT copies modules_to_save in the dtype of the frozen base,
            parameter.data = parameter.data.float()  # which would lose most updates
    return adapted


def adapted_modules(model: Any) -> set[str]:
    """Names in the plain model of the modules that a PEFT model has adapters on."""
    modules = model.get_base_model().named_modules()
    return {name for name, module in modules if hasattr(module, "lora_A")}


def _check_names(model: Any, section: LoraSection) -> None:
    """All names are the model's, targets can be adapted, saved ones can be trained."""
    targets = () if isinstance(section.target_modules, str) else section.target_modules
    modules = dict(model.named_modules())
    for option, names in (
        ("target_modules", targets),
        ("modules_to_save", section.modules_to_save),
    ):
        for name in names:
            found = [module for key, module in modules.items() if _is_named(key, name)]
            if not found:
                near = difflib.get_close_matches(name, _leaves(modules), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"lora.{option}: the model has no module named {name}.{hint} {_choice(model)}"
                )
            if option == "target_modules" and not all(map(_takes_adapter, found)):
                kind = type(next(one for one in found if not _takes_adapter(one))).__name__
                raise ConfigError(
                    f"lora.target_modules: {name} is a {kind}, which takes no adapter. "
                    f"{_choice(model)} To train it whole, name it in lora.modules_to_save."
                )
            if option == "modules_to_save" and name in targets:
                raise ConfigError(
                    f"lora: {name} is in target_modules and in modules_to_save; name it in one."
                )
            if option == "modules_to_save" and not all(map(_is_trainable, found)):
                raise ConfigError(
                    f"lora.modules_to_save: the weights of {name} are quantized and cannot be "
                    "trained; name it in lora.target_modules instead."
                )


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _takes_adapter(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def _is_trainable(module: Any) -> bool:
    return all(parameter.is_floating_point() for parameter in module.parameters())


def _leaves(modules: Iterable[str]) -> list[str]:
    return sorted({key.rsplit(".", 1)[-1] for key in modules} - {""})


def _choice(model: Any) -> str:
    """Names that can be given instead."""
    names = _leaves(key for key, module in model.named_modules() if _takes_adapter(module))
    return (
        f"Layers that take an adapter: {', '.join(names)}; all-linear is the linear ones but the "
        "head."
    )


# ---- an adapter added to its base's weights: untied first where only one side of a tie has one


ADAPTED = ".base_layer."


def merge_adapter(model: Any) -> Any:
    """Add the adapters of a PEFT model to its weights, in place, and take them off.

    A head that is tied to the embedding stays so where both are still equal. Else the config says
    that it is not tied, so that whoever loads the model keeps both.

    Args:
        model: with plain weights; in fp32, or small updates are lost.
    Returns:
        The plain model.
    """
    was_tied = _is_tied(model.get_base_model())
    _untie_adapted(model.get_base_model())
    with warnings.catch_warnings():
        # Both are about ties, which are dealt with here.
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    if was_tied:
        _settle_tie(merged)
    return merged


def has_true_tie(model: Any) -> bool:
    """Whether embedding and head are equal where the config says that they are one.

    transformers keeps both where they differ, other programs believe the config.
    """
    embedding, head = _ends(model)
    return not _is_tied(model) or head is None or torch.equal(embedding.weight, head.weight)


def _ends(model: Any) -> tuple[Any, Any]:
    """Embedding and head; what adapters wrap is looked at itself."""

    def inner(module: Any) -> Any:
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module

    return inner(model.get_input_embeddings()), inner(model.get_output_embeddings())


def _is_tied(model: Any) -> bool:
    config = model.config
    return bool(
        getattr(config, "tie_word_embeddings", False)
        or getattr(config.get_text_config(), "tie_word_embeddings", False)
    )


def _untie_adapted(model: Any) -> None:
    """Give each parameter that several modules share its own copy where one has an adapter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(ADAPTED in name for name in shared):
            for name in shared[1:]:
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                old = getattr(owner, leaf)
                copy = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
                setattr(owner, leaf, copy)


def _settle_tie(model: Any) -> None:
    """One tensor again where embedding and head are equal; else a config that says they differ."""
    embedding, head = _ends(model)
    if head is None:
        return
    is_equal = torch.equal(embedding.weight, head.weight)
    if is_equal:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_equal
