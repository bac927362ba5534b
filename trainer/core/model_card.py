"""README.md of a final model: what the run knows of it, in place of PEFT's blank form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.core.run import Job, Prepared
from trainer.counts import counted
from trainer.files import SAVED_BASE
from trainer.models.train_on import base_section

CARD_NAME = "README.md"


def model_card(job: Job, prepared: Prepared, evaluation: dict[str, Any] | None) -> str:
    """Markdown with the front matter that the hub reads.

    Texts of rows are not in it.

    Args:
        evaluation: of `final_evaluation`.
    """
    hyper, data = prepared.config.hyperparams, prepared.data
    base = base_section(prepared.config.model).model_path
    is_adapter = hyper.trains_adapters
    kind = f"{hyper.training_mode} adapter" if is_adapter else "model, all weights trained"
    name = job.output_dir.resolve().name
    facts: list[tuple[str, str]] = [
        ("base model", base),
        ("steps", f"{job.step:,} of {prepared.num_steps:,}{_of_which(job)}"),
        ("rows trained on", f"{data.card.num_train_rows:,}"),
        ("profile", prepared.profile.name),
        ("learning rate", f"{hyper.learning_rate:g}, {hyper.lr_scheduler}"),
        ("rows a step", str(_rows_of_step(prepared))),
        ("max_length", f"{hyper.max_length:,} tokens"),
        ("optimizer", hyper.optimizer),
        ("precision", prepared.precision.reason),
        ("seed", str(prepared.config.environment.seed)),
    ]
    if is_adapter:
        lora = prepared.config.lora
        facts.insert(1, ("adapter", f"rank {lora.r}, alpha {lora.alpha:g}"))
    lines = [*_front_matter(base, is_adapter), f"# {name}", "", f"A {kind}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {label} | {_cell(text)} |" for label, text in facts)]
    lines += ["", "## Results", "", *_results(job, evaluation), "", "## Use", ""]
    lines += _use(name, is_adapter)
    lines += ["", f"Made by ultimate-trainer {__version__}. `run.json` of the run has everything."]
    return "\n".join(lines) + "\n"


def _of_which(job: Job) -> str:
    if job.final_step in (None, job.step):
        return ""
    return f"; the weights are those of step {job.final_step:,}, the best"


def write_card(folder: Path, text: str) -> None:
    """Write it beside the weights, over what PEFT has written there."""
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _front_matter(base: str, is_adapter: bool) -> list[str]:
    lines = ["---", f"library_name: {'peft' if is_adapter else 'transformers'}"]
    if not Path(base).exists() and "/" in base:  # a name on the hub
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "pipeline_tag: text-generation", "---", ""]


def _rows_of_step(prepared: Prepared) -> int:
    hyper = prepared.config.hyperparams
    return hyper.batch_size * hyper.gradient_accumulation * prepared.strategy.num_processes


def _results(job: Job, evaluation: dict[str, Any] | None) -> list[str]:
    lines = _last_losses(job)
    if _of_which(job):
        best = job.best or {}
        value = best.get("value")  # None of a step that a person marked
        lines = [f"- {best['by']} at that step: {value:.4f}"] if value is not None else []
    if evaluation is not None:
        share = 100 * evaluation["exact_match"]
        lines.append(
            f"- final evaluation: {evaluation['matched']} of "
            f"{counted(evaluation['num_prompts'], 'answer')} match ({share:.1f} %)"
        )
        lines += [
            f"- {one['name']}: {one['mean']:.4f} (of {one['num_prompts']})"
            for one in evaluation["figures"]
            if one.get("mean") is not None
        ]
    return lines or ["Nothing was measured."]


def _last_losses(job: Job) -> list[str]:
    lines = []
    if job.trainer is not None and job.trainer.last_step is not None:
        lines.append(f"- training loss of the last step: {job.trainer.last_step.train_loss:.4f}")
    found = job.monitor.evaluation if job.monitor is not None else None
    if found is not None and found.last_loss is not None:
        lines.append(f"- validation loss, on rows held out: {found.last_loss:.4f}")
    return lines


def _use(name: str, is_adapter: bool) -> list[str]:
    if not is_adapter:
        code = 'from transformers import pipeline\n\npipe = pipeline("text-generation", "FOLDER")'
    else:
        code = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")'
        )
    lines = ["```python", *code.split("\n"), "```"]
    if is_adapter:
        lines += [
            "",
            "`adapter_config.json` names the base by its place on the machine of the run "
            "(`base_model_name_or_path`). Where it is elsewhere, change that name, or load the "
            "base and `PeftModel.from_pretrained(base, FOLDER)`; `trainer chat`, `export` and "
            f"`serve` take `--base`. A base that is on no hub is in `{SAVED_BASE}/` of the run's "
            "folder: take it along.",
        ]
    return [*lines, "", f"`trainer chat {name}` talks to it."]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
