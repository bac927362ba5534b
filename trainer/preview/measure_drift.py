"""Measuring drift: base answers with their distributions, and one forward pass a prompt later on.

Used where the weights are: in the training process and by a preview server alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.preview.drift import (
    ANSWER_TOKENS,
    DIGITS,
    TEXT_CHARS,
    TOP,
    BaseAnswer,
    Drift,
    load_base,
    of_base,
    save_base,
)
from trainer.preview.generate import GenerationSettings, generate
from trainer.preview.local import LocalPreviewBackend, release_memory
from trainer.preview.neutral import undisturbed

logger = logging.getLogger(__name__)

LEAST = 1e-12
"""Probability below which all tokens but the kept ones count as this one."""


def base_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[BaseAnswer]:
    """Answer greedily, and keep how likely which tokens were at each place.

    Args:
        prompts: token ids.
        settings: of the answers; temperature 0 and no stop strings, as nothing of a profile
            belongs to general prompts.
    """
    with undisturbed(model):
        try:
            answers = generate(model, tokenizer, prompts, settings)
        except torch.OutOfMemoryError:
            answers = []
        if not answers:  # outside of `except`, which holds what the failed attempt allocated
            release_memory()
            answers = [generate(model, tokenizer, [one], settings)[0] for one in prompts]
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            logprobs, _ = _logprobs(model, prompt, answer.raw_ids)
            top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
            kept = top.values.clamp(min=-100.0).double().cpu().tolist()
            found.append(
                BaseAnswer(
                    answer_ids=answer.raw_ids,
                    text=_text(tokenizer, answer.token_ids),
                    top_ids=top.indices.cpu().tolist(),
                    top_logprobs=[[min(0.0, round(v, DIGITS)) for v in row] for row in kept],
                )
            )
    return found


def drift_from(
    model: Any, prompts: Sequence[Sequence[int]], base: Sequence[BaseAnswer]
) -> tuple[list[float], list[bool]]:
    """KL(base || now) along each base answer, and whether the greedy answer is another one now.

    The tokens that were not kept are one token here, on both sides, so that the number is a lower
    bound of the KL over the whole vocabulary. Where the likeliest token changes anywhere along the
    base answer, so does the greedy answer, from the first such place on. Tokens that are as likely
    as each other, as far as the logits' dtype can tell, are a toss-up before and now: that is none.

    Returns:
        (num_prompts,) nats per token, and as many flags.
    """
    found: list[float] = []
    changed: list[bool] = []
    with undisturbed(model):
        for prompt, one in zip(prompts, base, strict=True):
            now, resolution = _logprobs(model, prompt, one.answer_ids)
            ids = torch.tensor(one.top_ids, device=now.device)
            before = torch.tensor(one.top_logprobs, dtype=torch.float64)
            after = now.gather(1, ids).double().cpu()
            rests = [(1 - kept.exp().sum(-1)).clamp(min=LEAST) for kept in (before, after)]
            rest = rests[0] * (rests[0].log() - rests[1].log())
            kl = (before.exp() * (before - after)).sum(-1) + rest  # (T,)
            found.append(max(0.0, float(kl.mean())))
            behind = now.amax(-1) - now.gather(1, ids[:, :1])[:, 0]
            changed.append(bool((behind > resolution).any()))
    return found, changed


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text[:TEXT_CHARS]


def _logprobs(
    model: Any, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next token at each place of an answer.

    One prompt at a time: nothing is padded, and the logits of one answer are all that is held.

    Returns:
        (T, V) float32, and (T,) float32: differences that the rounding of two logits can make.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    resolution = 2 * torch.finfo(logits.dtype).eps * logits.abs().amax(-1).float()
    return torch.log_softmax(logits.float(), -1), resolution


def base_settings(settings: GenerationSettings, limit: int = ANSWER_TOKENS) -> GenerationSettings:
    """How base answers are made: greedily, and without what a profile stops at."""
    return dataclasses.replace(settings, max_new_tokens=limit, temperature=0.0, stop_strings=())


class LocalDrift:
    """Measures in the training process, between two steps."""

    def __init__(
        self, backend: LocalPreviewBackend, prompts: Sequence[Sequence[int]], path: Path
    ) -> None:
        """Take the base answers of an earlier process, if they are there.

        Args:
            backend: on the model in training.
            prompts: token ids.
            path: where the base answers are kept.
        """
        self.backend, self.prompts, self.path = backend, prompts, path
        self.base = load_base(path, prompts)

    def measure(self, step: int) -> Drift:
        """At step 0 make the base answers, later measure against them; never raises."""
        started = time.perf_counter()
        try:
            found = self._measure(step)
        except Exception as error:  # a figure must never stop training
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            is_memory = isinstance(error, torch.OutOfMemoryError)
            logger.error("drift at step %d: %s", step, words, exc_info=not is_memory)
            found = Drift(error=words)
        if found.error is not None:
            release_memory()
        return found.model_copy(update={"seconds": time.perf_counter() - started})

    def _measure(self, step: int) -> Drift:
        model, dtype = self.backend.model, self.backend.autocast_dtype
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=dtype) if dtype else contextlib.nullcontext():
            if step == 0:
                tokenizer, settings = self.backend.tokenizer, base_settings(self.backend.settings)
                self.base = base_answers(model, tokenizer, self.prompts, settings)
                save_base(self.path, self.prompts, self.base)
                return of_base(self.base)
            if self.base is None:
                return Drift(error="the weights before training were not asked")
            kl, is_changed = drift_from(model, self.prompts, self.base)
        return Drift(kl=kl, is_changed=is_changed)
