"""From a worker's answers to PreviewResults: what the trainer knows itself is not taken from it.

Prompt, golden answer, step and comparison are the trainer's own; text and counts are the worker's.
The canary decides whether they are shown: the log-probability of some golden answers, computed on
both sides, can only agree when the weights do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.preview.base import PreviewRequest, PreviewResult, WeightsProof, is_match

NOISE_FP32 = 5e-4
"""Nats by which the log-probability of one golden token may differ between two machines that
compute in fp32 with the same numbers. Measured in docs/previews.md."""

NOISE_HALF = 0.1
"""The same where the trainer's attention kernel takes half precision only."""

CANARY_TOKENS = 64
"""Golden tokens that are scored, where the run's prompts have so many."""


@dataclass(frozen=True)
class Canary:
    """Golden answers that both sides score, as one sum over all their tokens."""

    rows: tuple[int, ...]
    """Their places among the requests."""
    num_tokens: int
    tolerance: float
    """Nats by which one token may differ. Tokens differ independently, so a sum of n may differ by
    sqrt(n) of it, and their mean by 1/sqrt(n)."""
    score: Callable[[], torch.Tensor]
    """The trainer's own log-probabilities, (num_tokens,), under the weights as they are now."""

    def disagreement(self, mine: float | None, theirs: float | None) -> str | None:
        """Why the two sums cannot come from the same weights; None when they agree."""
        if mine is None or theirs is None:
            return "the worker returned no canary"
        allowed = self.tolerance * math.sqrt(self.num_tokens) + 1e-6 * abs(mine)
        if math.isfinite(mine) and math.isfinite(theirs) and abs(mine - theirs) <= allowed:
            return None
        return (
            f"the canary's log-probability is {theirs:.5f} there and {mine:.5f} here, and may "
            f"differ by {allowed:.5f}"
        )


def results_of(
    answer: dict[str, Any],
    requests: Sequence[PreviewRequest],
    step: int,
    *,
    canary: tuple[Canary | None, float | None],
    matches: Callable[[str, str], bool],
    decode: Callable[[int], str],
    backend_type: str,
    visible_s: float,
) -> list[PreviewResult]:
    """Judge the answers of one step.

    Args:
        answer: the publisher's event `done`: weights_id, results, golden_logprobs, canary_logprob.
        canary: the canary, if there is one, and the trainer's own sum for this step.
        matches: the profile's comparison of an answer with golden.
        decode: one token id -> text.
    """
    proof: WeightsProof = "published"
    if canary[0] is not None:
        wrong = canary[0].disagreement(canary[1], answer["canary_logprob"])
        if wrong is not None:
            message = f"mismatch, not shown: {wrong}; other weights, or another computation"
            return [PreviewResult.failed(one, step, message, backend_type) for one in requests]
        proof = "verified"
    scores = answer["golden_logprobs"] or [None] * len(requests)
    return [
        _result(request, found, score, matches, decode).model_copy(
            update={
                "step": step,
                "weights_id": answer["weights_id"],
                "weights": proof,
                "backend_type": backend_type,
                "visible_s": round(visible_s, 3),
            }
        )
        for request, found, score in zip(requests, answer["results"], scores, strict=True)
    ]


def canary_rows(requests: Sequence[PreviewRequest]) -> tuple[int, ...]:
    """Places of the shortest requests that have CANARY_TOKENS golden tokens between them.

    All that have golden ids, where those are fewer; the mean of many tokens tells weights apart
    that differ by one step, and a single short answer does not.
    """
    usable = sorted(
        (len(one.prompt_token_ids) + len(one.golden_token_ids), len(one.golden_token_ids), index)
        for index, one in enumerate(requests)
        if one.prompt_token_ids and one.golden_token_ids
    )
    rows: list[int] = []
    total = 0
    for _, num_golden, index in usable:
        if total >= CANARY_TOKENS:
            break
        rows.append(index)
        total += num_golden
    return tuple(sorted(rows))


HEALTH = frozenset({"empty", "repeats", "never_stopped", "template_leak", "copies_prompt"})


def _plausible(theirs: PreviewResult) -> PreviewResult:
    """A worker's counts and flags as far as they can be true; the text is data and stays."""
    seconds, rate = theirs.generation_time_sec, theirs.tokens_per_sec
    return theirs.model_copy(
        update={
            "tokens_generated": max(0, theirs.tokens_generated),
            "generation_time_sec": seconds if math.isfinite(seconds) else 0.0,
            "tokens_per_sec": rate if math.isfinite(rate) else 0.0,
            "health": tuple(flag for flag in theirs.health if flag in HEALTH),
        }
    )


def _result(
    request: PreviewRequest,
    found: dict[str, Any],
    score: list[float] | None,
    matches: Callable[[str, str], bool],
    decode: Callable[[int], str],
) -> PreviewResult:
    """One answer: the worker's words about it, our own about everything else."""
    theirs = _plausible(PreviewResult.model_validate(found))
    golden, ids = request.golden_answer, request.golden_token_ids
    is_scored = score is not None and ids is not None and len(score) == len(ids)
    return theirs.model_copy(
        update={
            "prompt": request.prompt,
            "prompt_id": request.prompt_id,
            "held_out": request.held_out,
            "golden_answer": golden,
            "matches": is_match(request, theirs.text, matches) if theirs.ok else None,
            "golden_tokens": tuple(map(decode, ids or ())) if is_scored else None,
            "golden_logprobs": tuple(score or ()) if is_scored else None,
        }
    )
