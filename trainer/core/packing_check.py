"""How packs reach a model, and the check at start that their documents stay apart.

The documents of a pack are told apart by the mask that transformers makes from positions (sdpa,
eager, flex), or by the borders that a varlen kernel is given (flash attention in its versions,
kernels from the hub). The former takes several packs as rows: one long row would need a mask of
its length squared. The latter is only right for one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.core.loss import RELATIVE_TOLERANCE, shifted_targets, supervised_logits
from trainer.data.batches import PadCollator, on_device
from trainer.data.encode import IGNORE_INDEX
from trainer.data.packing import JoinCollator, PackCollator, join_documents
from trainer.errors import ConfigError

SAME_SHAPE_TOLERANCE = 1e-5
"""Between batches that differ in other documents only: no dtype excuses a difference there."""
DOCUMENT_LENGTH = 8
COMPARED = (1, 2, 3, DOCUMENT_LENGTH - 1)
"""Tokens of a document whose prediction is compared: a convolution leaks into the first ones."""


def attention_name(model: Any) -> str:
    """The attention that the language model's layers ask transformers for."""
    config = _base(model).config.get_text_config()
    return str(getattr(config, "_attn_implementation", None) or "eager")


def takes_borders(model: Any) -> bool:
    """Whether attention goes through transformers' varlen path, whatever the kernel's name."""
    return ALL_ATTENTION_FUNCTIONS.get(attention_name(model)) is flash_attention_forward


def pack_collator(model: Any, pad_id: int) -> PackCollator | JoinCollator:
    """What makes a batch of packs for this model's attention."""
    if not takes_borders(model):
        return PackCollator(pad_id)
    parameters = inspect.signature(type(_base(model)).forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return JoinCollator(with_borders=is_open or "cu_seq_lens_q" in names)


def check_documents_apart(
    model: Any,
    *,
    batch_size: int = 2,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> None:
    """Refuse models whose documents see each other; the caller sets eval mode and autocast.

    Args:
        batch_size: packs in a batch of the run.
        collate: makes the run's batches of packs; None: what `pack_collator` chooses.
    Raises:
        ConfigError: the logits of a document depend on another one, or on where it stands; or the
            model does not take packs at all.
    """
    collate = collate or pack_collator(model, 0)
    size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, DOCUMENT_LENGTH)
    before, told = torch.randint(size, shape, generator=generator)
    # Of several lengths, so that rows are padded and borders are not all the same distance apart.
    first = [ids[: DOCUMENT_LENGTH - n % 3] for n, ids in enumerate(before)]
    alone = _logits(model, PadCollator(0)([_document(ids, COMPARED) for ids in told]))
    name = f"data.enable_packing=true, but {type(model).__name__}"
    try:
        packed = _logits(model, collate(_packs(first, told)))
        changed = _logits(model, collate(_packs([(ids + 1) % size for ids in first], told)))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{name} does not take packed rows (attention {attention_name(model)}): {error} "
            "Set data.enable_packing=false."
        ) from error
    scale = float(alone.abs().max().clamp(min=1e-6))
    moved = float((packed - changed).abs().max()) / scale
    apart = float((packed - alone).abs().max()) / scale
    # Both are written so that a NaN refuses.
    if not moved <= SAME_SHAPE_TOLERANCE:
        raise ConfigError(
            f"{name} lets the documents of a pack see each other (attention "
            f"{attention_name(model)}, {batch_size} packs a batch): logits of a document change "
            f"by {moved:.1e} (relative) when others do. Models with convolution or recurrent "
            "layers do that, whatever the attention; set data.enable_packing=false."
        )
    tolerance = RELATIVE_TOLERANCE.get(_compute_dtype(model), 1e-4)
    if not apart <= tolerance:
        raise ConfigError(
            f"{name} gives a document other logits in a pack than alone (attention "
            f"{attention_name(model)}, {batch_size} packs a batch): they differ by {apart:.1e} "
            f"(relative), {tolerance:.0e} is what rounding explains. The model does not begin "
            "again at each document; set data.enable_packing=false."
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _compute_dtype(model: Any) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, whatever the weights are kept in."""
    parameter = next(model.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    dtype: torch.dtype = parameter.dtype
    return dtype


def _packs(first: list[torch.Tensor], told: torch.Tensor) -> list[dict[str, Any]]:
    return [
        join_documents([_document(before, ()), _document(ids, COMPARED)])
        for before, ids in zip(first, told, strict=True)
    ]


def _document(ids: torch.Tensor, compared: tuple[int, ...]) -> dict[str, Any]:
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[list(compared)] = ids[list(compared)]
    return {"input_ids": ids, "labels": labels}


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits (documents x compared tokens, V) float32, in the order of the documents."""
    batch = on_device(batch, next(model.parameters()).device)
    keep = shifted_targets(batch.pop("labels")) != IGNORE_INDEX
    with torch.no_grad():
        return supervised_logits(model, model, batch, keep).float()
