"""The model of a run: loaded in its dtype, checked, with adapters in LoRA mode."""

from __future__ import annotations

import time
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.context import RunContext
from trainer.models.added_tokens import grow_embeddings
from trainer.models.load import SAVED_BASE, add_lora, check_vocabulary, load_model


def load_for_training(run: RunContext, config: TrainerConfig) -> tuple[Any, Any]:
    """Load the weights; returns model and tokenizer.

    Raises:
        ModelError: they cannot be loaded, or the tokenizer does not fit the embedding.
    """
    seed = config.environment.seed
    run.phase("loading", f"loading {config.model.model_path}")
    started = time.perf_counter()
    run.model = load_model(
        config.model,
        dtype=run.precision.load_dtype,
        seed=seed,
        offline=config.environment.offline,
    )
    if config.model.add_tokens:
        grow_embeddings(run.model, run.tokenizer, config.model.add_tokens)
    check_vocabulary(run.model, run.tokenizer)
    run.use_cache = bool(getattr(run.model.config, "use_cache", True))
    if config.hyperparams.training_mode == "lora":
        _keep_unsaved_base(run)
        run.model = add_lora(run.model, config.lora, seed=seed, revision=config.model.revision)
        if config.hyperparams.gradient_checkpointing:
            # Inputs of a frozen model need no gradient, and then nothing would be recomputed.
            run.model.enable_input_require_grads()
    run.durations_s["loading"] = time.perf_counter() - started
    run.notice(f"precision: {run.precision.reason}")
    return run.model, run.tokenizer


def _keep_unsaved_base(run: RunContext) -> None:
    """An adapter needs its base again: the built-in model is on no disk, so save it."""
    if run.model.config._name_or_path or run.folder is None:
        return
    base = (run.folder.path / SAVED_BASE).resolve()
    if not base.exists():
        run.model.save_pretrained(base)
        run.tokenizer.save_pretrained(base)
    run.model.config._name_or_path = run.model.name_or_path = str(base)
