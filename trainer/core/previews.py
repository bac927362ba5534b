"""When previews are made, and by whom.

Those by copies of the weights are made by `publishing.py`, scores and evaluations by `scoring.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from trainer.core.drift_plan import plan_drift
from trainer.core.publishing import PUBLISHED, PublishingRun, build_following, build_published
from trainer.core.run import Job, Prepared, is_main_process
from trainer.core.scoring import build_delivery, build_evaluation, local_backend
from trainer.data.rows import golden_text
from trainer.data.template import ChatTemplate
from trainer.errors import TemplateError
from trainer.exchange import AwayError
from trainer.monitoring.deciding import DecidingScores
from trainer.monitoring.delivery import deliver_drift
from trainer.monitoring.preview_backend import create_preview_backend
from trainer.preview.base import PreviewBackend, PreviewRequest
from trainer.preview.measure_drift import LocalDrift
from trainer.preview.openai import OpenAIPreviewBackend
from trainer.preview.scheduler import Lane, PreviewScheduler
from trainer.profiles import Message
from trainer.publish.lane import PublishedPreviews


def build_scheduler(
    job: Job, prepared: Prepared, model: Any, deciding: DecidingScores | None = None
) -> PreviewScheduler | None:
    """The configured backend with the run's fixed prompts; None where previews are off.

    On the main process; on the others too where its snapshots need all of them.

    Args:
        deciding: takes the evaluations; None: no score decides.
    """
    monitoring, is_main = prepared.config.monitoring, is_main_process()
    is_shared = prepared.is_sharded and monitoring.preview_backend in PUBLISHED
    if not monitoring.inference_interval or not (is_main or is_shared):
        return None
    requests = list(prepared.data.preview_prompts)
    local = local_backend(prepared, model, len(requests) + len(monitoring.preview_prompts))
    requests += [
        PreviewRequest(
            prompt=text,
            prompt_token_ids=tuple(local.render(text)),
            messages=tuple(dict(turn) for turn in local.turns_of(text)),
            prompt_id=f"user-{index}",
        )
        for index, text in enumerate(monitoring.preview_prompts)
    ]
    drift = plan_drift(job, prepared, local)
    backend: PreviewBackend | Lane = local
    if not is_main:
        backend = build_following(prepared, model, requests)
    elif monitoring.preview_backend == "openai":
        backend = openai_backend(prepared, job.observers.notice)
        how = "the exact ids of training" if backend.takes_ids else "whole conversations"
        job.observers.notice(
            f"previews come from {backend.url}, which is asked by {how}, with the weights that "
            "server has, not with this run's: they are marked unverified",
            "warning",
        )
    elif monitoring.preview_backend in PUBLISHED:
        assert job.folder is not None, "previews are the main process's"
        publishing = PublishingRun(prepared, model, job.folder, job.observers.notice, drift)
        backend = build_published(publishing, requests, local, prepared.data.score_prompts)
    elif monitoring.preview_backend != "local":
        backend = create_preview_backend(monitoring)
    if deciding is not None and isinstance(backend, PublishedPreviews):
        deciding.spool = backend
    answered = [*requests, *prepared.data.score_prompts]
    delivery = build_delivery(job, prepared, answered, deciding)
    job.on_close("scores", delivery.close)
    return PreviewScheduler(
        backend,
        requests,
        interval=monitoring.inference_interval,
        deliver=delivery.previews,
        delivery=delivery,
        evaluation=build_evaluation(job, prepared, model, delivery),
        is_on_gpu=prepared.device.type == "cuda",
        num_samples=monitoring.num_preview_samples,
        drift=LocalDrift(local, drift.prompts, drift.path) if drift is not None else None,
        deliver_drift=deliver_drift(job.observers, drift.texts if drift is not None else ()),
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
