"""The steps of a run before its first one: checks, folder, rows, weights.

All but the weights fail on the user's mistakes and write nothing but the lock and the cache of
rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from trainer.config.schema import TrainerConfig
from trainer.config.training_sections import ModelSection
from trainer.core.best_step import check_deciding_rows
from trainer.core.checkpoint import clean_staging
from trainer.core.compiling import check_blocks, check_compiler
from trainer.core.early_checks import check_early
from trainer.core.fused_loss import check_loss_kernel
from trainer.core.optim import check_optimizer, check_schedule
from trainer.core.resume import (
    LATEST,
    STREAM,
    ResumePoint,
    check_resumable,
    find_resume_point,
    flat,
)
from trainer.core.run import Job, Prepared, is_main_process
from trainer.core.run_folder import RunFolder, resolved_config
from trainer.core.shared_files import blind_ranks, check_shared, hash_together, shared_tasks
from trainer.core.together import Ask, is_alone, together
from trainer.counts import counted
from trainer.data.batches import EpochOrder
from trainer.data.dataset import RunData, pack_training_rows, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.mixed_order import MixedOrder
from trainer.data.source_shares import with_shares, with_sources
from trainer.data.stream_order import StreamOrder
from trainer.data.stream_rows import StreamedDataset
from trainer.data.streaming import prepare_stream
from trainer.errors import ConfigError, DataError, ModelError
from trainer.files import staged
from trainer.models import resolve_alias
from trainer.models.adapter_files import SAVED_BASE, describe_base
from trainer.models.adapters import add_lora
from trainer.models.attention import AttentionPlan, plan_attention
from trainer.models.chat_template import fix_date
from trainer.models.devices import be_deterministic, bound_kernel_caches, cuda_problem, own_device
from trainer.models.load import (
    check_is_model,
    check_locked,
    check_vocabulary,
    context_length,
    embedding_rows,
    grow_embeddings,
    is_gguf,
    load_tokenizer,
    read_model_config,
)
from trainer.models.precision import (
    ResolvedPrecision,
    fill_precision,
    keep_vectors_wide,
    resolve_device,
    resolve_precision,
)
from trainer.models.quantized import check_trainable, quantization_of, quantized_share
from trainer.models.train_on import (
    adapter_of,
    adapter_options,
    base_section,
    load_base,
    train_on,
)
from trainer.monitoring.events import Observers
from trainer.monitoring.processes import num_processes
from trainer.monitoring.trackers import NOT_HFS, Arguments, shown_config, start_trackers
from trainer.monitoring.tracking import check_trackers
from trainer.net import go_offline, names_without_secrets
from trainer.profiles import DataProfile
from trainer.scores.scorer import check_scores
from trainer.scores.spec import is_function

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Numerics:
    """Where and how precisely a run computes."""

    device: torch.device
    precision: ResolvedPrecision


def check_config(config: TrainerConfig) -> tuple[TrainerConfig, Numerics]:
    """Fill derived values, decide device and precision, set threads and hub mode of the process.

    Raises:
        TrainerError: as `check_early`.
        ConfigError: a package or device is not there.
    """
    config = check_early(config)
    check_trackers(config.monitoring.report_to)
    check_scores(config.monitoring)
    environment, hyper = config.environment, config.hyperparams
    disable_progress_bar()  # transformers' own bars would tear the terminal view
    if environment.num_threads is not None:
        torch.set_num_threads(environment.num_threads)
    if environment.deterministic:
        be_deterministic()
    if environment.offline:
        go_offline()
    device = own_device(resolve_device(environment.device), environment.device)
    config, name = fill_precision(config, device)
    check_optimizer(hyper, device)
    check_loss_kernel(hyper.loss_kernel, device)
    if hyper.compile != "off":
        check_compiler(device)
    precision = resolve_precision(name, hyper.training_mode, device, hyper.masters)
    if device.type == "cpu" and precision.use_bf16:
        bound_kernel_caches()
    return config, Numerics(device, precision)


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse what HF's Trainer cannot call.

    Raises:
        ConfigError: names the first that is no callback.
    """
    for one in callbacks:
        if not isinstance(one, TrainerCallback):
            raise ConfigError(
                f"callbacks: {one!r} is no instance of transformers.TrainerCallback; derive your "
                "class from it, and give an object of it. What only listens is an observer."
            )


def fit_to_model(
    config: TrainerConfig, observers: Observers, numerics: Numerics
) -> tuple[TrainerConfig, Any, AttentionPlan]:
    """Load tokenizer and model config.

    Returns:
        The config with max_length, the tokenizer, and the attention that is planned.
    Raises:
        ModelError: there is no such model, or its attention cannot be had here.
        ConfigError: `locked` or `hyperparams.max_length` does not fit it.
    """
    offline = config.environment.offline
    config = _at_final_model(config)
    if config.hyperparams.training_mode == "full":
        check_is_model(config.model)
    observers.phase("loading", f"loading the tokenizer of {config.model.model_path}")
    base, adapter = saved_base(config) or base_section(config.model), adapter_of(config.model)
    if adapter is not None and config.model.add_tokens:
        raise ConfigError(
            f"model.add_tokens: the adapter {adapter} that is trained on keeps the tokens that it "
            "was trained with; leave add_tokens empty, or merge it first (`trainer export`)."
        )
    own_tokenizer = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(config.model if own_tokenizer else base, offline=offline)
    model_config = read_model_config(base, offline=offline)
    check_locked(config.locked, base, model_config)
    if adapter is not None:
        lora = adapter_options(config.lora, adapter, model_config)
        config = config.model_copy(update={"lora": lora})
    check_trainable(
        model_config,
        f"model.model_path={config.model.model_path}",
        training_mode=config.hyperparams.training_mode,
    )
    if config.hyperparams.compile != "off":
        check_blocks(model_config, f"model.model_path={config.model.model_path}")
    limit, wanted = context_length(model_config), config.hyperparams.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"hyperparams.max_length={wanted} is above the model's context of {limit} tokens; "
            f"give at most {limit}."
        )
    attention = plan_attention(
        config.model,
        model_config,
        device=numerics.device,
        precision=numerics.precision,
        is_compiled=config.hyperparams.compile != "off",
    )
    length = wanted or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    hyper = config.hyperparams.model_copy(update={"max_length": length})
    return config.model_copy(update={"hyperparams": hyper}), tokenizer, attention


def _at_final_model(config: TrainerConfig) -> TrainerConfig:
    """The folder of a run stands for its final model, or adapter.

    Raises:
        ModelError: the run has none.
    """
    run = Path(resolve_alias(config.model.model_path))
    if not (run / RunFolder.RUN_JSON).is_file():
        return config
    final = run / RunFolder.FINAL_MODEL
    if not final.is_dir():
        raise ModelError(
            f"model.model_path={config.model.model_path}: this run has no final model; go on with "
            f"it (--resume), or give one of its checkpoints ({run / RunFolder.CHECKPOINTS})."
        )
    model = config.model.model_copy(update={"model_path": str(final)})
    return config.model_copy(update={"model": model})


def open_run_folder(job: Job, config: TrainerConfig) -> None:
    """Take the run folder for this run, and find what to resume from; all processes at once.

    Raises:
        OutputError: the folder cannot be had.
        ResumeError: there is nothing to resume.
    """
    observers, wanted = job.observers, config.output.resume

    def work(ask: Ask) -> ResumePoint | None:
        if is_main_process():
            job.folder = RunFolder.create(Path(config.output.output_dir), resume=wanted is not None)
            for text in job.folder.notices:
                observers.notice(text, "warning")
            removed = clean_staging(job.folder.checkpoints_dir)
            if removed:
                observers.notice(
                    f"removed {counted(len(removed), 'unfinished checkpoint')} of a killed run"
                )
            if wanted == LATEST and job.folder.begin_anew():
                observers.notice("no checkpoint was written: the run starts again from step 0")
                return None
        if wanted is None:
            return None
        folder = Path(config.output.output_dir)
        # Whole copies may also go on from a copy of the folder on each machine.
        is_shared = is_alone() or not blind_ranks(ask, folder)
        hashing = hash_together(ask, is_shared=is_shared)
        return find_resume_point(wanted, folder / RunFolder.CHECKPOINTS, hashing)

    point = job.resumed_from = together(work, shared_tasks())
    if point is not None:
        job.date = point.date or job.date
        for text in point.problems:
            observers.notice(text, "warning")
        observers.notice(f"resuming from step {point.step} ({point.path})")


def check_folder(prepared: Prepared) -> None:
    """Refuse a run folder that not all processes of a sharded run see.

    Raises:
        OutputError: says which do not, and what to do.
    """
    if prepared.is_sharded and not is_alone():
        folder = Path(prepared.config.output.output_dir)
        together(lambda ask: check_shared(ask, folder), shared_tasks())


def encode_rows(
    job: Job,
    config: TrainerConfig,
    *,
    profile: DataProfile,
    tokenizer: Any,
    system_prompt: str | None,
) -> RunData:
    """Read, split, transform and encode the rows.

    Raises:
        DataError: bad rows, or nothing to train.
        ConfigError: an option that does not fit these rows.
    """
    hyper = config.hyperparams
    phase = f"encoding {names_without_secrets(config.data.dataset_path)}"
    job.observers.phase("loading", phase)
    started = time.perf_counter()
    fix_date(tokenizer, job.date)
    prepare: Any = prepare_data
    if config.data.streaming:
        resume = job.resumed_from
        prepare = partial(prepare_stream, resume=resume.run_state.get(STREAM) if resume else None)
    data: RunData = prepare(
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
        num_score=config.monitoring.num_score_prompts,
        with_columns=any(map(is_function, config.monitoring.scores)),
        offline=config.environment.offline,
        progress=lambda words: job.observers.phase("loading", phase, words),
    )
    if isinstance(data.train, StreamedDataset):
        job.on_close("rows that are streamed", data.train.close)
    data = with_sources(config.data, data)
    if config.data.enable_packing:
        data = pack_training_rows(data)
    data = with_shares(config.data, data)
    job.durations_s["encoding"] = time.perf_counter() - started
    return data


def check_against_rows(
    config: TrainerConfig, data: RunData, resume: ResumePoint | None
) -> tuple[int, tuple[str, ...]]:
    """What can be told only once the rows are known.

    Returns:
        Optimizer steps of the whole run, and what differs from the checkpoint that is resumed.
    Raises:
        ConfigError: an option that does not fit these rows.
        ResumeError: these are not the rows, or not the config, of the checkpoint.
    """
    hyper = config.hyperparams
    total = num_steps(config, data)
    check_schedule(hyper, total, start=resume.step if resume else 0)
    if hyper.early_stopping_patience and data.validation is None:
        raise ConfigError(
            "hyperparams.early_stopping_patience is set, but no rows are held out "
            f"({data.card.validation}); hold some out or set it to 0."
        )
    if config.monitoring.num_score_prompts and data.validation is None:
        raise ConfigError(
            "monitoring.num_score_prompts is set, but no rows are held out "
            f"({data.card.validation}); hold some out or set it to 0."
        )
    if config.output.final_model == "best" and data.validation is None:
        raise ConfigError(
            "output.final_model=best is set, but no rows are held out by which a step is the best "
            f"({data.card.validation}); hold some out or set it to last."
        )
    check_deciding_rows(config, data)
    if resume is None:
        return total, ()
    return total, tuple(
        check_resumable(resume, config, data.train.fingerprint(), total, num_processes())
    )


def epoch_order(config: TrainerConfig, data: RunData) -> EpochOrder:
    """The order of the training rows; a group is one optimizer step on all devices.

    Raises:
        DataError: `data.mix_probabilities` leave a source without a row.
    """
    world, hyper, section = num_processes(), config.hyperparams, config.data
    options: dict[str, Any] = {
        "group_size": hyper.batch_size * hyper.gradient_accumulation * world,
        "seed": config.environment.seed,
        "shuffle": section.shuffle,
        "group_by_length": section.group_by_length,
        "multiple_of": hyper.batch_size * world if world > 1 else 1,
    }
    if isinstance(data.train, StreamedDataset):
        assert hyper.max_steps is not None, "a rule of the config"
        options.pop("multiple_of")
        return StreamOrder(data.train, num_steps=hyper.max_steps, **options)
    sources = data.train.sources
    if not section.mix_probabilities or sources is None:
        return EpochOrder(data.train.lengths, **options)
    return MixedOrder(
        data.train.lengths,
        sources,
        section.mix_probabilities,
        ends_with=section.mix_epoch,
        names=data.source_names,
        **options,
    )


def num_steps(config: TrainerConfig, data: RunData) -> int:
    """Optimizer steps of the whole run; the last one of an epoch may have fewer rows."""
    hyper, order = config.hyperparams, epoch_order(config, data)
    if hyper.max_steps is not None:
        return hyper.max_steps
    return math.ceil(hyper.num_epochs * order.steps_per_epoch)


def start_run_trackers(job: Job, prepared: Prepared) -> None:
    """Start what monitoring.report_to names, before minutes are spent on the weights.

    Raises:
        ConfigError: one cannot start.
    """
    config = prepared.config
    if not is_main_process() or not set(config.monitoring.report_to) - NOT_HFS:
        return
    values = flat(resolved_config(config))
    arguments = Arguments(
        shown_config(values, with_texts=config.monitoring.tracker_texts),
        read_model_config(
            saved_base(config) or base_section(config.model), offline=config.environment.offline
        ),
        output_dir=Path(config.output.output_dir),
    )
    job.trackers = start_trackers(
        config.monitoring,
        arguments,
        total_steps=prepared.num_steps,
        notice=job.observers.notice,
    )
    if job.trackers is not None:
        job.observers.add(job.trackers)


# ---- the weights


def load_for_training(prepared: Prepared, job: Job) -> Any:
    """Load the weights, on the device of the run, with adapters in LoRA mode.

    Raises:
        ModelError: they cannot be loaded, or the tokenizer does not fit the embedding.
        DataError: a row holds an id that the embedding has no row for.
    """
    config, tokenizer, seed = prepared.config, prepared.tokenizer, prepared.config.environment.seed
    section = saved_base(config) or config.model
    doing = "unpacking" if is_gguf(section.model_path) else "loading"
    job.observers.phase("loading", f"{doing} {section.model_path}")
    started = time.perf_counter()
    if prepared.device.type == "cuda":
        torch.cuda.set_device(prepared.device)  # else a context is made on GPU 0 as well
    is_quantized = config.hyperparams.training_mode == "qlora"
    load = partial(
        load_base,
        section,
        dtype=prepared.precision.load_dtype,
        seed=seed,
        offline=config.environment.offline,
        # Shards go to their devices one by one: whole weights need not fit there.
        device=torch.device("cpu") if prepared.is_sharded else prepared.device,
    )
    model, base = load(quantize=is_quantized, is_described=config.hyperparams.trains_adapters)
    added = tokenizer.convert_tokens_to_ids(list(config.model.add_tokens))
    if added:
        grow_embeddings(model, added)
    if prepared.precision.master_dtype == torch.bfloat16:
        keep_vectors_wide(model)
    check_vocabulary(model, tokenizer)
    _check_rows(prepared.data, model, tokenizer)
    if config.hyperparams.trains_adapters:
        if job.folder is not None and not model.config._name_or_path:
            # An adapter needs its base again: the built-in model is on no disk, so save it.
            plain = load(quantize=False)[0] if is_quantized else model
            if added and is_quantized:
                grow_embeddings(plain, added)
            folder = (job.folder.path / SAVED_BASE).resolve()
            _save_base(plain, tokenizer, folder)
            model.config._name_or_path = model.name_or_path = str(folder)
            # With the rows of added tokens, as it was saved.
            base = describe_base(model, is_quantized_copy=is_quantized)
        if quantization_of(model.config) is not None:
            job.observers.notice(quantized_share(model))
        adapter = adapter_of(config.model)
        if adapter is not None:
            model = train_on(model, adapter, config.lora, seed=seed)
        else:
            revision = config.model.revision
            model = add_lora(model, config.lora, seed=seed, revision=revision, token_ids=added)
        model.base_record = base
        if config.hyperparams.gradient_checkpointing:
            # Inputs of a frozen model need no gradient, and then nothing would be recomputed.
            model.enable_input_require_grads()
    job.durations_s["loading"] = time.perf_counter() - started
    job.observers.notice(f"precision: {prepared.precision.reason}")
    problem = cuda_problem() if prepared.device.type == "cpu" else None
    if problem is not None and config.environment.device == "auto":
        job.observers.notice(f"trains on the CPU: the GPU cannot be used ({problem})", "warning")
    return model


def _check_rows(data: RunData, model: Any, tokenizer: Any) -> None:
    """Rows that spell a padding token out, which the embedding need not have.

    Raises:
        DataError: a row has an id that is not below the embedding's rows.
    """
    rows = embedding_rows(model)
    if max(tokenizer.get_vocab().values()) < rows:
        return
    parts: list[Any] = [part for part in (data.train, data.validation) if part is not None]
    if isinstance(data.train, StreamedDataset):
        data.train.refuse_ids_from(rows)  # when they come
        parts = parts[1:]
    for part in parts:
        for index in range(len(part)):
            largest = int(part[index]["input_ids"].max())
            if largest >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"a row holds the token {token!r} (id {largest}), and the model's embedding "
                    f"has {rows} rows: it can be padded with, not read. Take it out of the rows."
                )


def saved_base(config: TrainerConfig) -> ModelSection | None:
    """The unpacked base of an adapter run on a .gguf file that is resumed; None of other runs.

    Unpacking takes minutes, and the run has saved what came out. Added tokens are in it already, so
    with them the file is read again.
    """
    folder = (Path(config.output.output_dir) / SAVED_BASE).resolve()
    is_of_run = config.output.resume is not None and config.hyperparams.trains_adapters
    if not (is_of_run and is_gguf(config.model.model_path)) or config.model.add_tokens:
        return None
    if not (folder / "config.json").is_file():
        return None
    return config.model.model_copy(update={"model_path": str(folder)})


def _save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Whole or not at all: what is there is taken for the base of this run."""
    if not folder.exists():
        with staged(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
