"""The steps of a run before its first one: fit to the model, folder, rows, weights."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.arguments import check_schedule
from trainer.core.checkpoint import clean_staging
from trainer.core.resume import check_resumable, find_resume_point
from trainer.core.run import RunContext, is_main_process
from trainer.core.run_folder import RunFolder
from trainer.data.batches import EpochOrder
from trainer.data.card import card_lines
from trainer.data.dataset import RunData, pack_training_rows, prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import ConfigError, DataError
from trainer.models.adapters import SAVED_BASE, add_lora, describe_base
from trainer.models.chat_template import fix_date
from trainer.models.load import (
    check_is_model,
    check_locked,
    check_vocabulary,
    context_length,
    embedding_rows,
    grow_embeddings,
    load_model,
    load_tokenizer,
    read_model_config,
)
from trainer.models.precision import check_trainable
from trainer.monitoring.events import CardShown
from trainer.profiles import DataProfile


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


# ---- the steps of a run before its weights: fit to the model, take the folder, prepare the rows
#
# Each fails on the user's mistakes, and none writes anything but the lock and the cache of rows.


DEFAULT_MAX_LENGTH = 2048


def fit_to_model(run: RunContext, config: TrainerConfig) -> None:
    """Load tokenizer and model config; fill in max_length.

    Raises:
        ModelError: there is no such model.
        ConfigError: `locked` or `hyperparams.max_length` does not fit it.
    """
    offline = config.environment.offline
    check_is_model(config.model)
    run.phase("loading", f"loading the tokenizer of {config.model.model_path}")
    run.tokenizer = load_tokenizer(config.model, offline=offline)
    model_config = read_model_config(config.model, offline=offline)
    check_locked(config.locked, config.model, model_config)
    monitoring = config.monitoring
    check_trainable(
        model_config,
        f"model.model_path={config.model.model_path}",
        training_mode=config.hyperparams.training_mode,
        previews=monitoring.preview_backend if monitoring.inference_interval else None,
    )
    limit, wanted = context_length(model_config), config.hyperparams.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"hyperparams.max_length={wanted} is above the model's context of {limit} tokens; "
            f"give at most {limit}."
        )
    length = wanted or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    hyper = config.hyperparams.model_copy(update={"max_length": length})
    run.config = config.model_copy(update={"hyperparams": hyper})


def open_run_folder(run: RunContext, config: TrainerConfig) -> None:
    """Take the run folder for this process, and find what to resume from.

    Raises:
        OutputError: the folder cannot be had.
        ResumeError: there is nothing to resume.
    """
    is_resume = config.output.resume is not None
    if is_main_process():
        run.folder = RunFolder.create(Path(config.output.output_dir), resume=is_resume)
        for text in run.folder.notices:
            run.notice(text, "warning")
        removed = clean_staging(run.folder.checkpoints_dir)
        if removed:
            run.notice(f"removed {len(removed)} unfinished checkpoints of a killed run")
    if config.output.resume is not None:
        root = Path(config.output.output_dir) / RunFolder.CHECKPOINTS
        run.resume = find_resume_point(config.output.resume, root)
        run.date = run.resume.date or run.date
        for text in run.resume.problems:
            run.notice(text, "warning")
        run.notice(f"resuming from step {run.resume.step} ({run.resume.path})")


def prepare_rows(
    run: RunContext,
    config: TrainerConfig,
    *,
    profile: DataProfile,
    tokenizer: Any,
    system_prompt: str | None,
) -> RunData:
    """Read, split, transform and encode the rows, and show the data card.

    Raises:
        DataError: bad rows, or nothing to train.
        ConfigError: an option that does not fit these rows.
        ResumeError: these are not the rows, or not the config, of the checkpoint.
    """
    hyper = config.hyperparams
    run.phase("loading", f"encoding {config.data.dataset_path}")
    started = time.perf_counter()
    fix_date(tokenizer, run.date)
    data = prepare_data(
        config.data,
        profile=profile,
        encoder=RowEncoder(
            tokenizer,
            hyper.max_length or DEFAULT_MAX_LENGTH,
            truncation=config.data.truncation,
            train_on_thinking=config.data.train_on_thinking,
        ),
        system_prompt=system_prompt,
        is_prompt_configured=config.profile.system_prompt is not None,
        seed=config.environment.seed,
        num_preview=config.monitoring.num_eval_samples,
        num_final=config.monitoring.final_eval_prompts,
        offline=config.environment.offline,
    )
    if config.data.enable_packing:
        data = pack_training_rows(data)
    run.set_data(data)
    run.durations_s["encoding"] = time.perf_counter() - started
    _check_against_rows(run, config, data)
    run.observers.emit(
        CardShown(title="data", lines=tuple(card_lines(data.card)), sample=data.card.sample)
    )
    return data


def _check_against_rows(run: RunContext, config: TrainerConfig, data: RunData) -> None:
    """What can be told only once the rows are known."""
    hyper = config.hyperparams
    total = num_steps(config, data)
    check_schedule(hyper, total, start=run.resume.step if run.resume else 0)
    if hyper.early_stopping_patience and data.validation is None:
        raise ConfigError(
            "hyperparams.early_stopping_patience is set, but no rows are held out "
            f"({data.card.validation}); hold some out or set it to 0."
        )
    if run.resume is not None:
        run.changes = check_resumable(run.resume, config, data.train.fingerprint(), total)
        for change in run.changes:
            run.notice(f"changed since the checkpoint: {change}", "warning")


def epoch_order(config: TrainerConfig, data: RunData) -> EpochOrder:
    """The order of the training rows; a group is one optimizer step on all devices."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    hyper = config.hyperparams
    return EpochOrder(
        data.train.lengths,
        group_size=hyper.batch_size * hyper.gradient_accumulation * world,
        seed=config.environment.seed,
        shuffle=config.data.shuffle,
        group_by_length=config.data.group_by_length,
        multiple_of=hyper.batch_size * world if world > 1 else 1,
    )


def num_steps(config: TrainerConfig, data: RunData) -> int:
    """Optimizer steps of the whole run; the last one of an epoch may have fewer rows."""
    hyper, order = config.hyperparams, epoch_order(config, data)
    if hyper.max_steps is not None:
        return hyper.max_steps
    return math.ceil(hyper.num_epochs * order.steps_per_epoch)
