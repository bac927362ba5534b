"""May documents be packed? Two short ones, packed and alone, must give the same logits."""

from __future__ import annotations

from typing import Any

import torch

from trainer.core.loss import RELATIVE_TOLERANCE
from trainer.data.packing import PackCollator, join_documents
from trainer.errors import ConfigError

SAME_SHAPE_TOLERANCE = 1e-5
"""Between two packs that differ in document 1 only: no dtype excuses a difference there."""


def check_documents_apart(model: Any) -> None:
    """Refuse models whose documents see each other; the caller sets eval mode and autocast.

    Raises:
        ConfigError: the logits of the second document depend on the first.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    size = min(model.get_input_embeddings().weight.shape[0], 997)
    first, other, second = ((torch.arange(8) * step + step) % size for step in (7, 11, 13))
    alone = _logits(model, [second], device)
    packed = _logits(model, [first, second], device)[len(first) :]
    changed = _logits(model, [other, second], device)[len(first) :]
    scale = float(alone.abs().max().clamp(min=1e-6))
    apart = float((packed - alone).abs().max()) / scale
    moved = float((packed - changed).abs().max()) / scale
    tolerance = RELATIVE_TOLERANCE.get(dtype, 1e-4)
    # Written so that a NaN refuses.
    if not (apart <= tolerance and moved <= SAME_SHAPE_TOLERANCE):
        raise ConfigError(
            f"data.enable_packing=true, but {type(model).__name__} lets the documents of a pack "
            f"see each other: logits of the second document differ by {max(apart, moved):.1e} "
            "(relative) from those without the first. Models with convolution or recurrent layers "
            "do that, whatever the attention; set data.enable_packing=false."
        )


def _logits(model: Any, documents: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Logits (T, V) float32 of one pack."""
    pack = join_documents([{"input_ids": ids, "labels": ids} for ids in documents])
    batch = {key: value.to(device) for key, value in PackCollator(0)([pack]).items()}
    del batch["labels"]
    with torch.no_grad():
        logits: torch.Tensor = model(**batch, use_cache=False).logits[0]
    return logits.float()
