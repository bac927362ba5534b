"""Answers by the training process, their scores, and the evaluations that are made for scores.

What previews are and when they are made is in `previews.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from trainer.config.monitoring_section import MonitoringConfig
from trainer.core.early_checks import measures_golden
from trainer.core.run import Job, Prepared, is_main_process
from trainer.counts import counted
from trainer.files import append_lines
from trainer.models.load import context_length
from trainer.monitoring.deciding import DecidingScores
from trainer.monitoring.delivery import Delivery, Source
from trainer.monitoring.events import json_line, plain_values
from trainer.monitoring.preview_backend import create_preview_backend
from trainer.monitoring.status_reader import EVALUATIONS_NAME, RESUMED, TrainingStatusReader
from trainer.preview.base import PreviewRequest, PreviewResult, to_json_line
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.scheduler import EvaluationSet, batches_of
from trainer.scores.figures import SCORE, ScoreHistory
from trainer.scores.scorer import Scorer
from trainer.scores.spec import parse_scores

TOLD_EVERY_S = 2.0
"""Seconds between words about a final evaluation that goes on."""


def local_backend(prepared: Prepared, model: Any, num_prompts: int) -> LocalPreviewBackend:
    """A backend on the model in training, computing as training does.

    Args:
        num_prompts: how many it will be asked.
    """
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
        with_golden_logprobs=measures_golden(config, num_prompts),
    )
    assert isinstance(backend, LocalPreviewBackend), "asked for local"
    return backend


def greedy_backend(
    prepared: Prepared, model: Any, num_prompts: int, max_tokens: int
) -> LocalPreviewBackend:
    """A backend on the model in training for evaluations, which are without noise."""
    backend = local_backend(prepared, model, num_prompts)
    backend.settings = dataclasses.replace(
        backend.settings, temperature=0.0, max_new_tokens=max_tokens
    )
    return backend


def build_scorer(job: Job, monitoring: MonitoringConfig) -> Scorer | None:
    """What computes `monitoring.scores`; None where there are none."""
    if not monitoring.scores:
        return None
    return Scorer(
        parse_scores(monitoring.scores),
        columns=monitoring.score_columns,
        timeout_s=monitoring.score_timeout,
        log=job.folder.log("scores") if job.folder is not None else None,
    )


def build_delivery(
    job: Job,
    prepared: Prepared,
    requests: Sequence[PreviewRequest],
    deciding: DecidingScores | None = None,
) -> Delivery:
    """Who scores the answers and tells of them; a resumed run knows those of before.

    Args:
        deciding: takes the evaluations.
    """
    known: dict[Source, list[PreviewResult]] = {}
    path = job.folder.path / EVALUATIONS_NAME if job.folder is not None else None
    if prepared.resume is not None and path is not None:
        reader, step = TrainingStatusReader(path.parent), prepared.resume.step
        known["previews"] = [one for one in reader.previews() if one.step <= step]
        known["evaluation"] = [one for one in reader.evaluations() if one.step <= step]
        if path.exists():
            append_lines(path, json_line({"type": RESUMED, "step": step}))

    def keep(results: list[PreviewResult]) -> None:
        if path is not None:
            append_lines(path, "".join(json_line(plain_values(one)) for one in results))

    return Delivery(
        job.observers,
        # Other processes take part in copies of the weights only.
        scorer=build_scorer(job, prepared.config.monitoring) if is_main_process() else None,
        requests=requests,
        known=known,
        keep=keep,
        **({"decide": deciding.arrive} if deciding is not None else {}),
    )


def build_evaluation(
    job: Job, prepared: Prepared, model: Any, delivery: Delivery
) -> EvaluationSet | None:
    """The prompts of monitoring.num_score_prompts; None where there are none."""
    monitoring, requests = prepared.config.monitoring, list(prepared.data.score_prompts)
    if not monitoring.num_score_prompts:
        return None
    if len(requests) < monitoring.num_score_prompts:
        job.observers.notice(
            f"scores are of {len(requests)} prompts, not {monitoring.num_score_prompts}: no more "
            "rows are held out besides those of the previews",
            "warning",
        )
    is_local = monitoring.preview_backend == "local"
    return EvaluationSet(
        requests,
        monitoring.micro_eval_interval,
        delivery.evaluation,
        greedy_backend(prepared, model, len(requests), monitoring.preview_max_tokens)
        if is_local
        else None,
        is_deciding=bool(prepared.config.deciding_scores),
    )


def final_evaluation(job: Job, prepared: Prepared, model: Any, step: int) -> dict[str, Any] | None:
    """Answer every prompt of the final evaluation greedily, score it, and write one line each.

    Args:
        step: whose weights the model has.
    Returns:
        exact_match (share), matched, num_prompts, failed, the path of the answers, the figures of
        the scores, and why a score has none; None where no evaluation was asked for.
    """
    requests, monitoring = prepared.data.final_prompts, prepared.config.monitoring
    if not requests or job.folder is None:
        return None
    path = job.folder.final_evaluation_jsonl
    backend = greedy_backend(prepared, model, len(requests), monitoring.max_eval_tokens)
    scorer, by_id = build_scorer(job, monitoring), {one.prompt_id: one for one in requests}
    results: list[PreviewResult] = []
    errors: dict[str, str] = {}
    told_at = time.monotonic()
    try:
        with path.open("w", encoding="utf-8") as file:
            for batch in batches_of(requests):
                answered = backend.preview_batch(batch, step)
                if scorer is not None:
                    answered, failed = scorer.score(answered, by_id)
                    errors |= failed
                file.writelines(json.dumps(to_json_line(result)) + "\n" for result in answered)
                results += answered
                if time.monotonic() - told_at > TOLD_EVERY_S and len(results) < len(requests):
                    told_at = time.monotonic()
                    words = f"{len(results)} of {counted(len(requests), 'prompt')} answered"
                    job.observers.phase("training", f"final evaluation: {words}")
    finally:
        if scorer is not None:
            scorer.close()
    for name, words in errors.items():
        job.observers.notice(f"score {name}: no value in the final evaluation: {words}", "warning")
    matched = sum(result.matches is True for result in results)
    share = 100 * matched / len(results)
    job.observers.notice(
        f"final evaluation: {matched} of {counted(len(results), 'answer')} match ({share:.1f} "
        f"%), all in {path}"
    )
    history = ScoreHistory()
    history.add(results)
    # A score that some of the prompts lack is the mean of others than the rest of the scores.
    missing = {SCORE + name for name in errors}
    figures = [one for one in history.figures(step) if one.name not in missing]
    return {
        "exact_match": matched / len(results),
        "matched": matched,
        "num_prompts": len(results),
        "failed": sum(not result.ok for result in results),
        "answers": str(path),
        "figures": [one.model_dump(mode="json") for one in figures],
        "score_errors": errors,
    }
