"""LoRA: adapters put on a model, saved, opened with their base again, and merged into it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config.training_sections import LoraSection
from trainer.errors import ConfigError
from trainer.files import SAVED_BASE as SAVED_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel,
    section: LoraSection,
    *,
    seed: int,
    revision: str | None = None,
    token_ids: Sequence[int] = (),
) -> Any:
    """Put adapters on a model and freeze the rest; all that is trained is fp32.

    Args:
        revision: of the model on the hub, recorded in the adapter.
        token_ids: rows of embedding and head that are trained too.

    Returns:
        A `peft.PeftModel`.
    Raises:
        ConfigError: a target module is not in the model, or is of a kind that takes no adapter.
    """
    from peft import LoraConfig

    _check_names(model, section)
    if section.ensure_weight_tying:
        _check_tying(model, section)
    targets: Any = section.target_modules
    layers: dict[str, Any] = {}
    if section.layers_to_transform:
        pattern, linear = _layers(model, section)
        layers = {
            "layers_to_transform": list(section.layers_to_transform),
            "layers_pattern": pattern,
        }
        targets = linear if targets == "all-linear" else targets
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=True if section.init == "default" else section.init,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(section.modules_to_save) or None,
        ensure_weight_tying=section.ensure_weight_tying,
        trainable_token_indices=_token_rows(model, section, token_ids) if token_ids else None,
        task_type="CAUSAL_LM",
        revision=revision,
        **layers,
    )
    try:
        return put_on(model, config, seed=seed)
    except (ValueError, UserWarning) as error:  # PEFT's words for what does not fit the model
        raise ConfigError(
            f"lora.target_modules={section.target_modules} cannot be used with this model: "
            f"{' '.join(str(error).split())[:300]} {_choice(model)}"
        ) from error


def put_on(model: Any, config: Any, *, seed: int) -> Any:
    """New adapters as PEFT's config says; the random state stays as it was.

    Raises:
        ValueError, UserWarning: PEFT's own, where they do not fit the model.
        ConfigError: rows of tokens cannot be trained in this model.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT finds out by itself that GPT-2's layers are stored (in, out), and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        # A tied head gets adapters of its own; `merge_adapter` unties it.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
        warnings.filterwarnings("error", "You have requested `ensure_weight_tying`")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    _check_token_rows(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT copies modules_to_save in the dtype of the frozen base,
            parameter.data = parameter.data.float()  # which would lose most updates
    return adapted


def adapted_modules(model: Any) -> set[str]:
    """Names in the plain model of the modules that a PEFT model has adapters on."""
    modules = model.get_base_model().named_modules()
    return {name for name, module in modules if hasattr(module, "lora_A")}


def adapted_parameters(model: Any) -> list[str]:
    """Names in the plain model of parameters with adapters that belong to no linear layer.

    PEFT puts them on the experts and the router of a mixture of experts, whose weights are stacked.
    """
    from peft.tuners.lora.layer import ParamWrapper

    return sorted(
        f"{name.removesuffix('.base_layer')}.{module.parameter_name}"
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    )


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


def _check_tying(model: Any, section: LoraSection) -> None:
    """There is a tie, and one of its ends is trained whole.

    PEFT ties adapters of the two by parameters that share their memory: an optimizer would move
    each twice, and in half precision they are not tied at all.
    """
    embedding, head = _ends(model)
    ends = [key for key, module in model.named_modules() if module in (embedding, head)]
    if head is None or head.weight is not embedding.weight:
        raise ConfigError(
            "lora.ensure_weight_tying=true, and the head of this model is not tied to its "
            "embedding; leave it false."
        )
    if not any(_is_named(key, name) for key in ends for name in section.modules_to_save):
        raise ConfigError(
            f"lora.ensure_weight_tying=true, and none of {', '.join(ends)} is in "
            "lora.modules_to_save; name one there, or leave it false."
        )


def _layers(model: Any, section: LoraSection) -> tuple[str, list[str]]:
    """PEFT's pattern for the decoder's layers, and the names of the linear layers in them."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {key: one for key, one in model.named_modules() if isinstance(one, nn.ModuleList)}
    stacks = [key for key, one in lists.items() if len(one) == count]
    wrong = [number for number in section.layers_to_transform if number >= count]
    if wrong:
        raise ConfigError(
            f"lora.layers_to_transform names layer {wrong[0]}, and the model has {count}: 0 to "
            f"{count - 1}."
        )
    if len(stacks) != 1:
        raise ConfigError(
            "lora.layers_to_transform: it cannot be told which modules are the decoder's layers "
            f"(lists of {count}: {', '.join(stacks) or 'none'}); leave it empty."
        )
    parts = stacks[0].split(".")
    ends = [".".join(parts[at:]) for at in range(len(parts) - 1, 0, -1)]
    # The shortest that no other list has: a vision tower may have `layers` too.
    pattern = next(one for one in ends if sum(key.endswith(f".{one}") for key in lists) == 1)
    kinds = (nn.Linear, _conv1d())
    inner = lists[stacks[0]].named_modules()
    return pattern, sorted({key.rsplit(".", 1)[-1] for key, one in inner if isinstance(one, kinds)})


def _token_rows(model: Any, section: LoraSection, ids: Sequence[int]) -> dict[str, list[int]]:
    """Rows to train by the names of embedding and head; a tied head follows the embedding."""
    embedding, head = _ends(model)
    names = {module: key for key, module in model.named_modules()}
    ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    given = {*section.modules_to_save}
    given |= set() if isinstance(section.target_modules, str) else {*section.target_modules}
    for module in (embedding, head):
        named = [one for one in given if module is not None and _is_named(names[module], one)]
        if named:
            raise ConfigError(
                f"model.add_tokens trains the rows of its tokens in {names[module]}, and "
                f"lora.target_modules or lora.modules_to_save has {named[0]}; leave it out there."
            )
    return {names[module]: list(ids) for module in ends}


def _check_token_rows(model: Any) -> None:
    """Rows of tokens are trained in the embedding and in the head, without a bias of its own.

    Raises:
        ConfigError: PEFT would leave one of them out.
    """
    base = model.get_base_model()
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end]
    if not any(hasattr(end, "token_adapter") for end in ends):
        return
    tied = [end for end in ends if hasattr(end, "token_adapter")]
    if len(tied) < len(ends) or any(
        getattr(end.token_adapter.base_layer, "bias", None) is not None for end in tied
    ):
        raise ConfigError(
            f"rows of single tokens cannot be trained in the head of a {type(base).__name__}: it "
            "has a bias, or PEFT does not find it; leave model.add_tokens empty, or set "
            "hyperparams.training_mode=full."
        )


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _takes_adapter(module: Any) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | _conv1d())


def _conv1d() -> Any:
    """GPT-2's linear layer; transformers is slow to import."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


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

ROWS = ".token_adapter."
"""Rows of single tokens are put in place, not added: twice is the same."""


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
        if hasattr(module, "token_adapter"):
            return module.token_adapter.base_layer
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
        if len(shared) > 1 and any(ADAPTED in name and ROWS not in name for name in shared):
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
