"""From a run to its previews: backend, fixed prompts, schedule, and the final evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from trainer.core.published import PublishingRun, build_published
from trainer.core.run import Job, Prepared
from trainer.data.rows import golden_text
from trainer.data.sources import HeldOutPrompt
from trainer.data.template import ChatTemplate
from trainer.errors import TemplateError
from trainer.exchange import AwayError
from trainer.models.load import context_length
from trainer.monitoring.preview_backend import create_preview_backend
from trainer.preview.base import PreviewBackend, PreviewRequest, to_json_line
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.openai import OpenAIPreviewBackend
from trainer.preview.scheduler import Deliver, Lane, PreviewScheduler
from trainer.profiles import Message

PROMPTS_AT_ONCE = 50
"""Batch of the final evaluation; previews are one batch of their own."""


def local_backend(prepared: Prepared, model: Any) -> LocalPreviewBackend:
    """A backend on the model in training, computing as training does."""
    config, data = prepared.config, prepared.data
    backend = create_preview_backend(
        "local",
        model=model,
        tokenizer=prepared.tokenizer,
        profile=prepared.profile,
        system_prompt=data.system_prompt,
        max_new_tokens=config.monitoring.preview_max_tokens,
        temperature=config.monitoring.preview_temperature,
        seed=config.environment.seed,
        stop_ids=data.encoder.template.stop_ids,
        autocast_dtype=prepared.precision.autocast_dtype,
        max_length=context_length(model.config),
        with_golden_logprobs=config.monitoring.preview_golden_logprobs,
    )
    assert isinstance(backend, LocalPreviewBackend), "asked for local"
    return backend


def build_scheduler(
    job: Job, prepared: Prepared, model: Any, deliver: Deliver
) -> PreviewScheduler | None:
    """The configured backend with the run's fixed prompts; None where previews are off."""
    monitoring = prepared.config.monitoring
    if not monitoring.inference_interval:
        return None
    local = local_backend(prepared, model)
    requests = held_out_requests(prepared.data.preview_prompts)
    requests += [
        PreviewRequest(
            prompt=text,
            prompt_token_ids=tuple(local.render(text)),
            messages=tuple(dict(turn) for turn in local.turns_of(text)),
            prompt_id=f"user-{index}",
        )
        for index, text in enumerate(monitoring.preview_prompts)
    ]
    backend: PreviewBackend | Lane = local
    if monitoring.preview_backend == "openai":
        backend = openai_backend(prepared, job.observers.notice)
        how = "the exact ids of training" if backend.takes_ids else "whole conversations"
        job.observers.notice(
            f"previews come from {backend.url}, which is asked by {how}, with the weights that "
            "server has, not with this run's: they are marked unverified",
            "warning",
        )
    elif monitoring.preview_backend != "local":
        assert job.folder is not None, "previews are the main process's"
        publishing = PublishingRun(prepared, model, job.folder, job.observers.notice)
        backend = build_published(publishing, requests, local)
    return PreviewScheduler(
        backend, requests, interval=monitoring.inference_interval, deliver=deliver
    )


def openai_backend(prepared: Prepared, notice: Callable[..., None]) -> OpenAIPreviewBackend:
    """A client of any OpenAI-compatible server.

    Raises:
        ConfigError: it refuses the key or a seed that was set, or does not have the model.
    """
    template = prepared.data.encoder.template
    backend = create_preview_backend(
        prepared.config.monitoring,
        stop=prepared.profile.stop_strings,
        system_prompt=prepared.data.system_prompt,
        compare=prepared.profile.matches,
        seed=prepared.config.environment.seed,
        tokenizer=prepared.tokenizer,
        stop_ids=template.stop_ids,
        render_answer=lambda turns, answer: answer_text(template, turns, answer),
        notice=lambda text: notice(text, "warning"),
    )
    assert isinstance(backend, OpenAIPreviewBackend), "asked for openai"
    try:
        backend.check()
    except AwayError as error:
        notice(f"previews: {error}", "warning")
    return backend


def answer_text(
    template: ChatTemplate, turns: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
) -> str | None:
    """An assistant's turn as the template writes it behind a conversation, without its stop token.

    None where the template refuses it, or rewrites the conversation before it.
    """
    before = [cast(Message, dict(turn)) for turn in turns]
    for thinking in (False, True):
        try:
            prompt = template.text(before, ask=True, thinking=thinking)
            whole = template.text([*before, cast(Message, dict(answer))], thinking=thinking)
        except TemplateError:
            return None
        if whole.startswith(prompt):
            [found] = template.encode([whole.removeprefix(prompt)])
            said = list(itertools.takewhile(lambda i: i not in template.stop_ids, found.ids))
            return golden_text(template.tokenizer, said, ())
    return None


def held_out_requests(prompts: Iterable[HeldOutPrompt]) -> list[PreviewRequest]:
    """Held-out prompts as requests, with their exact token ids."""
    return [
        PreviewRequest(
            prompt=held.prompt,
            prompt_token_ids=held.prompt_ids,
            golden_answer=held.golden_answer,
            golden_token_ids=held.golden_ids or None,
            messages=held.messages,
            prompt_id=held.prompt_id,
            held_out=held.is_held_out,
        )
        for held in prompts
    ]


def final_evaluation(
    prepared: Prepared, model: Any, step: int, path: Path
) -> dict[str, Any] | None:
    """Answer every prompt of the final evaluation greedily, and write one line each.

    Returns:
        exact_match (share), matched, num_prompts, failed, and the path of the answers; None
        where none was asked for.
    """
    requests: Sequence[PreviewRequest] = held_out_requests(prepared.data.final_prompts)
    if not requests:
        return None
    backend = local_backend(prepared, model)
    backend.settings = dataclasses.replace(
        backend.settings, temperature=0.0, max_new_tokens=prepared.config.monitoring.max_eval_tokens
    )
    results = []
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(requests), PROMPTS_AT_ONCE):
            batch = backend.preview_batch(list(requests[start : start + PROMPTS_AT_ONCE]), step)
            file.writelines(json.dumps(to_json_line(result)) + "\n" for result in batch)
            results += batch
    matched = sum(result.matches is True for result in results)
    return {
        "exact_match": matched / len(results),
        "matched": matched,
        "num_prompts": len(results),
        "failed": sum(not result.ok for result in results),
        "answers": str(path),
    }
