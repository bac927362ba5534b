"""An adapter added to its base's weights: untied first where only one side of a tie has one."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

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
