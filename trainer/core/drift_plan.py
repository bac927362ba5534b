"""The prompts by which a run measures its drift, and where their base answers are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.core.run import Job, Prepared
from trainer.errors import ConfigError
from trainer.preview.canary_set import OFF, read_canary_set
from trainer.preview.drift import load_base
from trainer.preview.local import LocalPreviewBackend


@dataclass(frozen=True)
class DriftPlan:
    """What a run measures drift by."""

    prompts: list[list[int]]
    """Token ids, template included."""
    texts: list[str]
    """The last turns of the same prompts, for people."""
    path: Path
    """Of the base answers."""


def plan_drift(job: Job, prepared: Prepared, local: LocalPreviewBackend) -> DriftPlan | None:
    """Render the prompts of `monitoring.canary_set`; None where nothing is to be measured.

    The run's own system prompt is left out: the question is what the model says elsewhere.

    Raises:
        ConfigError: the chat template refuses one, or it leaves no room for an answer.
    """
    name, folder = prepared.config.monitoring.canary_set, job.folder
    if name == OFF or folder is None:
        return None
    conversations = read_canary_set(name)
    prompts = []
    for turns in conversations:
        try:
            ids = local.render_turns(turns)
        except Exception as error:  # the template's own words
            words = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"monitoring.canary_set={name}: the chat template refuses the prompt "
                f"{turns[-1]['content'][:60]!r} ({words}); give a file of prompts that it takes."
            ) from error
        longest = local.settings.max_length
        if longest is not None and len(ids) >= longest:
            raise ConfigError(
                f"monitoring.canary_set={name}: the prompt {turns[-1]['content'][:60]!r} has "
                f"{len(ids)} tokens, which fill the model's context of {longest}; shorten it."
            )
        prompts.append(ids)
    plan = DriftPlan(prompts, [turns[-1]["content"] for turns in conversations], folder.drift_base)
    if prepared.start_step > 0 and load_base(plan.path, prompts) is None:
        job.observers.notice(
            f"monitoring.canary_set={name}: {plan.path} holds no answers of the weights before "
            "training to these prompts, and only step 0 could give them: drift is not measured",
            "warning",
        )
        return None
    return plan
