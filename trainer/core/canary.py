"""The canary of a run: golden answers scored by training as a preview server scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.core.proofs import takes_borders
from trainer.core.run import Prepared
from trainer.core.sharding import dealt
from trainer.preview.base import PreviewRequest
from trainer.preview.neutral import SentAs, as_received, golden_logprobs
from trainer.publish.identity import (
    NOISE_FP32,
    NOISE_HALF,
    Canary,
    adapter_tensors,
    canary_rows,
)


def build_canary(
    prepared: Prepared, model: Any, requests: Sequence[PreviewRequest]
) -> Canary | None:
    """Golden answers scored by this process as the worker scores them; None without any."""
    rows = canary_rows(requests)
    if not rows:
        return None
    pairs = [
        (requests[row].prompt_token_ids or (), requests[row].golden_token_ids or ()) for row in rows
    ]
    # The one kind of kernel that cannot compute in fp32; `auto` may still take it.
    is_flash = takes_borders(model) or bool(prepared.attention.candidates)
    autocast = prepared.precision.autocast_dtype if is_flash else None

    def score() -> torch.Tensor:
        # Asked for anew: sharding puts other parameters in the place of those of a whole model.
        with as_received(model, _sent_as(prepared, model), autocast=autocast):
            if prepared.is_sharded:
                return _score_together(model, pairs)
            scores = [golden_logprobs(model, prompt, golden) for prompt, golden in pairs]
            return torch.cat(scores).sum()

    num_tokens = sum(len(golden) for _, golden in pairs)
    return Canary(rows, num_tokens, NOISE_FP32 if autocast is None else NOISE_HALF, score)


def _score_together(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> torch.Tensor:
    """The sum over all pairs, of which each process scores its share; alike on all."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for (prompt, golden), is_mine in dealt(pairs):
        found = golden_logprobs(model, prompt, golden).sum()
        if is_mine:
            total = total + found
    torch.distributed.all_reduce(total)
    return total


def _sent_as(prepared: Prepared, model: Any) -> SentAs:
    """In which dtype each tensor travels; the frozen base of adapters goes as it was loaded."""
    travel, loaded = prepared.precision.compute_dtype, prepared.precision.load_dtype
    if not hasattr(model, "peft_config"):
        return lambda tensor: travel
    trained = {id(tensor) for tensor in adapter_tensors(model).values()}
    return lambda tensor: travel if id(tensor) in trained else loaded
