"""Several answers of one prompt by the same weights (`monitoring.num_preview_samples`).

Sample 0 is the answer that is shown everywhere. Each further sample is asked for in a batch of its
own, of the same prompts in the same order: so no answer depends on how many there are, and none
needs more memory. No torch here: publisher and server import this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from trainer.preview.base import PreviewRequest, PreviewResult, PreviewSample

MAX_SEED = 2**53
"""Seeds are below it: each is a whole number in JSON."""


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of several samples; the first is the one that is made alone."""
    if sample == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big") % MAX_SEED


def sample_requests(requests: Sequence[PreviewRequest], sample: int) -> list[PreviewRequest]:
    """The same prompts, for one of several samples."""
    return [one.model_copy(update={"sample": sample}) for one in requests]


def joined_samples(batches: Sequence[Sequence[PreviewResult]]) -> list[PreviewResult]:
    """The answers of sample 0 with the others in them.

    Args:
        batches: one of each sample, in the order of their numbers.
    """
    first, *others = batches
    return [
        result.model_copy(update={"samples": tuple(_sample_of(batch[index]) for batch in others)})
        if result.ok
        else result
        for index, result in enumerate(first)
    ]


def _sample_of(result: PreviewResult) -> PreviewSample:
    return PreviewSample(
        text=result.text,
        raw_text=result.raw_text,
        matches=result.matches,
        tokens_generated=result.tokens_generated,
        finish_reason=result.finish_reason,
        health=result.health,
        error_message=result.error_message,
    )
