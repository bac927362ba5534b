"""Previews from the training process itself: between two steps, leaving no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from trainer.models.chat_template import ONE_RENDERING, as_taken, date_options
from trainer.models.load import embedding_rows, harmless_pad_id
from trainer.preview.base import (
    PreviewRequest,
    PreviewResult,
    golden_figures,
    health_flags,
    is_match,
    leak_ids,
    special_texts,
)
from trainer.preview.generate import Generation, GenerationSettings, generate
from trainer.preview.golden import golden_parts
from trainer.preview.neutral import golden_logprobs, undisturbed
from trainer.profiles import DataProfile, Message, get_profile

logger = logging.getLogger(__name__)


class LocalPreviewBackend:
    """Answers prompts with a model that lives in this process."""

    backend_type = "local"

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        profile: DataProfile | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 42,
        stop_ids: frozenset[int] | None = None,
        autocast_dtype: torch.dtype | None = None,
        max_length: int | None = None,
        processors: Sequence[Any] = (),
        with_golden_logprobs: bool = False,
        with_special_tokens: bool = True,
    ) -> None:
        """Take a model in any mode, on any device.

        Args:
            profile: its stop strings, processors and comparison; None: `plain`.
            system_prompt: system turn of prompts that come as text.
            stop_ids: tokens that end an answer; None: the tokenizer's and the model's own.
            autocast_dtype: the run's compute dtype, so that previews compute as training does.
            max_length: prompt and answer together, in tokens.
            processors: run behind the profile's own, at every token.
            with_golden_logprobs: also score golden answers whose ids are known.
            with_special_tokens: show special tokens inside `text`, as golden answers do; False for
                clients that want words only.
        """
        self.with_special_tokens = with_special_tokens
        self.with_golden_logprobs = with_golden_logprobs
        self.processors = tuple(processors)
        self.model, self.tokenizer = model, tokenizer
        self.profile = profile or get_profile("plain")
        self.system_prompt = system_prompt
        self.autocast_dtype = autocast_dtype
        self.settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_strings=self.profile.stop_strings,
            stop_ids=frozenset(stop_ids or ()) | _model_stop_ids(model, tokenizer),
            pad_id=harmless_pad_id(tokenizer, embedding_rows(model)),
            max_length=max_length,
        )
        self._special_texts = special_texts(tokenizer)
        self.skipped_for_memory = 0

    def preview(
        self,
        prompt: str,
        golden_answer: str | None,
        step: int,
        *,
        max_new_tokens: int | None = None,
    ) -> PreviewResult:
        """Answer one user turn, rendered with the system prompt."""
        request = PreviewRequest(prompt=prompt, golden_answer=golden_answer)
        return self.preview_batch([request], step, max_new_tokens=max_new_tokens)[0]

    def preview_batch(
        self, requests: list[PreviewRequest], step: int, *, max_new_tokens: int | None = None
    ) -> list[PreviewResult]:
        """Answer all requests in one batch; out of memory halves it, then skips, and says so."""
        if not requests:
            return []
        settings = self.settings
        if max_new_tokens is not None:
            settings = dataclasses.replace(settings, max_new_tokens=max_new_tokens)
        try:
            return self._answer(requests, step, settings)
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())[:120]
        except Exception as error:  # a preview must never stop training
            logger.exception("previews at step %d failed; training goes on", step)
            message = f"{type(error).__name__}: {error}"
            return [PreviewResult.failed(r, step, message, self.backend_type) for r in requests]
        # Only out here: inside `except` the traceback holds all that the failed attempt allocated.
        return self._answer_less(requests, step, max_new_tokens, reason)

    def close(self) -> None:
        """Nothing to give back: the model belongs to the training process."""

    def render(self, prompt: str) -> list[int]:
        """Token ids of one user turn with system prompt and generation prompt."""
        return self.render_turns(self.turns_of(prompt))

    def turns_of(self, prompt: str) -> list[Message]:
        """One user turn, behind the system prompt where there is one."""
        turns = [Message(role="user", content=prompt)]
        if self.system_prompt is not None:
            turns.insert(0, Message(role="system", content=self.system_prompt))
        return turns

    def render_turns(self, turns: list[Message]) -> list[int]:
        """Token ids of a conversation with the generation prompt behind it."""
        taken = as_taken(self.tokenizer, turns)
        with ONE_RENDERING:
            ids: list[int] = self.tokenizer.apply_chat_template(
                taken,
                add_generation_prompt=True,
                enable_thinking=False,
                return_dict=True,
                **date_options(self.tokenizer),
            )["input_ids"]
        return ids

    def _answer_less(
        self, requests: list[PreviewRequest], step: int, limit: int | None, reason: str
    ) -> list[PreviewResult]:
        release_memory()
        half = len(requests) // 2
        if half:
            logger.warning(
                "previews at step %d: out of memory with %d prompts, trying %d at a time",
                step,
                len(requests),
                half,
            )
            return [
                *self.preview_batch(requests[:half], step, max_new_tokens=limit),
                *self.preview_batch(requests[half:], step, max_new_tokens=limit),
            ]
        self.skipped_for_memory += 1
        message = (
            f"skipped: out of memory even for one prompt ({reason}); "
            "lower monitoring.preview_max_tokens"
        )
        logger.warning("preview at step %d %s", step, message)
        return [PreviewResult.failed(requests[0], step, message, self.backend_type)]

    def _answer(
        self, requests: list[PreviewRequest], step: int, settings: GenerationSettings
    ) -> list[PreviewResult]:
        prompts = [list(r.prompt_token_ids or self.render(r.prompt)) for r in requests]
        device = next(self.model.parameters()).device
        autocast = (
            torch.autocast(device.type, dtype=self.autocast_dtype)
            if self.autocast_dtype is not None
            else contextlib.nullcontext()
        )
        started = time.perf_counter()
        with undisturbed(self.model), autocast:
            answers = generate(
                self.model,
                self.tokenizer,
                prompts,
                settings,
                [
                    *self.profile.logits_processors(self.tokenizer, stop_ids=settings.stop_ids),
                    *self.processors,
                ],
                samples=[request.sample for request in requests],
            )
            seconds = time.perf_counter() - started
            scores = [self._score(request) for request in requests]
        leaks = leak_ids(self._special_texts, (request.golden_answer for request in requests))
        return [
            self._result(request, answer, step, seconds, leaks).model_copy(update=score)
            for request, answer, score in zip(requests, answers, scores, strict=True)
        ]

    def _score(self, request: PreviewRequest) -> dict[str, Any]:
        """The golden answer's tokens and log-probabilities, where they are wanted and known."""
        prompt, golden = request.prompt_token_ids, request.golden_token_ids
        if not (self.with_golden_logprobs and prompt and golden) or request.sample:
            return {}  # one sample has said it
        parts = golden_parts(self.tokenizer, self.profile, golden)
        nats = golden_logprobs(self.model, prompt, golden).tolist()
        return {**parts, **golden_figures(nats, parts["golden_is_frame"])}

    def _result(
        self,
        request: PreviewRequest,
        answer: Generation,
        step: int,
        seconds: float,
        leaks: Collection[int],
    ) -> PreviewResult:
        text = self.tokenizer.decode(
            answer.token_ids,
            skip_special_tokens=not self.with_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        golden = request.golden_answer
        count = len(answer.raw_ids)
        return PreviewResult(
            step=step,
            prompt=request.prompt,
            text=text,
            raw_text=self.tokenizer.decode(answer.raw_ids, clean_up_tokenization_spaces=False),
            golden_answer=golden,
            matches=is_match(request, text, self.profile.matches),
            tokens_generated=count,
            generation_time_sec=seconds,
            tokens_per_sec=count / seconds if seconds > 0 else 0.0,
            finish_reason="stop" if answer.is_stopped else "length",
            weights_id=f"step-{step}",
            weights="in_process",
            backend_type=self.backend_type,
            prompt_id=request.prompt_id,
            held_out=request.held_out,
            health=health_flags(
                text=text,
                token_ids=answer.token_ids,
                prompt=request.prompt,
                golden=golden,
                is_stopped=answer.is_stopped,
                leak_ids=leaks,
            ),
        )


def release_memory() -> None:
    """Give back what an attempt that ran out of memory has left, cycles of objects included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _model_stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text ids that the tokenizer and the model's generation config name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset({tokenizer.eos_token_id, *ids} - {None})
