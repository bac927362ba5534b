"""The model of a run: loaded in its dtype, checked, with adapters in LoRA mode."""

from __future__ import annotations

import time
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.context import RunContext
from trainer.errors import DataError
from trainer.models.adapter import SAVED_BASE, describe_base
from trainer.models.added_tokens import grow_embeddings
from trainer.models.load import load_model
from trainer.models.lora import add_lora
from trainer.models.vocabulary import check_vocabulary, embedding_rows


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
        device=run.device,
    )
    if config.model.add_tokens:
        grow_embeddings(run.model, run.tokenizer, config.model.add_tokens)
    check_vocabulary(run.model, run.tokenizer)
    _check_rows(run)
    run.use_cache = bool(getattr(run.model.config, "use_cache", True))
    if config.hyperparams.training_mode == "lora":
        _keep_unsaved_base(run)
        base = describe_base(run.model)
        run.model = add_lora(run.model, config.lora, seed=seed, revision=config.model.revision)
        run.model.base_record = base
        if config.hyperparams.gradient_checkpointing:
            # Inputs of a frozen model need no gradient, and then nothing would be recomputed.
            run.model.enable_input_require_grads()
    run.durations_s["loading"] = time.perf_counter() - started
    run.notice(f"precision: {run.precision.reason}")
    return run.model, run.tokenizer


def _check_rows(run: RunContext) -> None:
    """Rows that spell a padding token out, which the embedding need not have.

    Raises:
        DataError: a row has an id that is not below the embedding's rows.
    """
    rows, tokenizer = embedding_rows(run.model), run.tokenizer
    if max(tokenizer.get_vocab().values()) < rows:
        return
    parts: list[Any] = [part for part in (run.data.train, run.data.validation) if part is not None]
    for part in parts:
        for index in range(len(part)):
            largest = int(part[index]["input_ids"].max())
            if largest >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"a row holds the token {token!r} (id {largest}), and the model's embedding "
                    f"has {rows} rows: it can be padded with, not read. Take it out of the rows."
                )


def _keep_unsaved_base(run: RunContext) -> None:
    """An adapter needs its base again: the built-in model is on no disk, so save it."""
    if run.model.config._name_or_path or run.folder is None:
        return
    base = (run.folder.path / SAVED_BASE).resolve()
    if not base.exists():
        run.model.save_pretrained(base)
        run.tokenizer.save_pretrained(base)
    run.model.config._name_or_path = run.model.name_or_path = str(base)
