"""TrainerEngine.run_job: a whole run, from a config to a finished model, in about ten steps.

Each step is a method; what would not fit on a screen lives in its own module (`models/load.py`,
`data/dataset.py`, `core/arguments.py`, `core/previews.py`, ...).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from trainer.config.resolve import required_for_training, resolve
from trainer.config.schema import TrainerConfig
from trainer.core.arguments import build_training_arguments, check_trackers
from trainer.core.checkpoint import clean_staging, save_checkpoint
from trainer.core.context import RunContext
from trainer.core.estimate import MemoryEstimate, estimate_memory
from trainer.core.evaluate import Evaluator
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import compare_with_own_loss
from trainer.core.optim import build_optimizer
from trainer.core.packing_check import check_documents_apart
from trainer.core.previews import build_scheduler, final_evaluation
from trainer.core.result import TrainingResult
from trainer.core.resume import check_resumable, find_resume_point
from trainer.core.run_folder import RunFolder, environment_manifest
from trainer.core.saving import save_final_model
from trainer.core.signals import StoppedError, stop_on_signals
from trainer.data.batches import EpochOrder, PadCollator
from trainer.data.card import card_lines
from trainer.data.dataset import RunData
from trainer.data.encode import RowEncoder
from trainer.data.packing import PackCollator, pack_training_rows
from trainer.data.prepare import prepare_data
from trainer.errors import EXIT_USER_INPUT, ConfigError
from trainer.models.added_tokens import grow_embeddings
from trainer.models.load import (
    add_lora,
    check_locked,
    check_vocabulary,
    context_length,
    load_model,
    load_tokenizer,
    read_model_config,
)
from trainer.models.precision import (
    DTYPES,
    ResolvedPrecision,
    resolve_device,
    resolve_precision,
)
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback, Observers
from trainer.monitoring.events import CardShown, CheckpointSaved, Observer, RunEnded, RunStarted
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.neutral import undisturbed
from trainer.preview.published import PublishedPreviews
from trainer.profiles import DataProfile, get_profile

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` found."""

    config: TrainerConfig
    data: RunData
    precision: ResolvedPrecision
    memory: MemoryEstimate
    num_steps: int


class TrainerEngine:
    """Runs fine-tuning jobs, one at a time."""

    def __init__(
        self,
        status_writer: TrainingStatusWriter | None = None,
        *,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Take who is told about the run.

        Args:
            status_writer: writes status.json to its own path and to the run folder; None: to
                the run folder only.
            observers: terminal views, trackers and others.
        """
        self.status_writer = status_writer or TrainingStatusWriter(None)
        self._extra_observers = list(observers)
        self._run: RunContext | None = None

    # ---- the whole run

    def run_job(self, config: TrainerConfig) -> TrainingResult:
        """Train as `config` says. Never raises: what went wrong is in the result."""
        run = self._begin(config)
        with stop_on_signals(run.stop):
            try:
                self.prepare_dataset(config)
                self.load_model(config)
                self.build_callbacks(config)
                trainer = self.create_trainer(config)
                self._execute_training(trainer, run.config)
                result = self._finish(run.config)
            except (Exception, StoppedError) as error:
                result = run.failed(error)
            self._close(result)
            return result

    # ---- the same in parts, for scripts: each does what it needs first, and nothing twice

    def prepare_dataset(self, config: TrainerConfig) -> RunData:
        """Checks, tokenizer, run folder, rows and data card; from here on the run is on disk.

        Raises:
            TrainerError: a user's mistake; nothing was written.
        """
        run = self._begin(config)
        if run.has_data:
            return run.data
        data = self._prepare(config)
        self._write_manifest(run.config)
        return data

    def load_model(self, config: TrainerConfig) -> tuple[Any, Any]:
        """Model and tokenizer."""
        run = self._begin(config)
        self.prepare_dataset(config)
        if run.model is None:
            self._load_model_and_tokenizer(run.config)
        return run.model, run.tokenizer

    def build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """Live monitor and trackers."""
        run = self._begin(config)
        self.load_model(config)
        if not run.callbacks:
            run.callbacks = self._build_callbacks(run.config)
        return run.callbacks

    def create_trainer(self, config: TrainerConfig) -> SupervisedTrainer:
        """The Trainer, ready to run."""
        run = self._begin(config)
        callbacks = self.build_callbacks(config)
        if run.trainer is None:
            self._create_trainer(run.config, run.model, run.data, callbacks)
        assert run.trainer is not None, "made above"
        return run.trainer

    def dry_run(self, config: TrainerConfig) -> DryRun:
        """Everything before the weights: checks, encoding, sums; writes config.resolved.json.

        Raises:
            TrainerError: what would also stop the run.
        """
        run = self._run = RunContext(config, Observers(self._extra_observers))
        with stop_on_signals(run.stop):
            try:
                self._prepare(config)
                estimate = estimate_memory(
                    run.config,
                    read_model_config(run.config.model, offline=run.config.environment.offline),
                    run.precision,
                    longest_row=max(run.data.train.lengths),
                )
                if run.folder is not None:
                    resolved = run.config.model_dump(mode="json")
                    run.folder.write_json(run.folder.config_resolved, resolved)
            finally:
                run.observers.close()
                if run.folder is not None:
                    run.folder.discard_if_empty()
                    run.folder.close()
            return DryRun(
                run.config, run.data, run.precision, estimate, self._num_steps(run.config)
            )

    def inspect_data(self, config: TrainerConfig) -> RunData:
        """The rows as a run would train on them; nothing is written but the cache of rows.

        Raises:
            TrainerError: what would also stop the run.
        """
        run = self._run = RunContext(config, Observers(self._extra_observers))
        try:
            self._check_config(config)
            run.set_profile(get_profile(config.profile.name, dict(config.profile.options)))
            self._fit_to_model(run.config)
            return self._prepare_dataset(run.config, run.profile, run.tokenizer)
        finally:
            run.observers.close()

    def _prepare(self, config: TrainerConfig) -> RunData:
        """The steps before anything is written: they fail on the user's mistakes."""
        run = self._current
        self._check_config(config)
        run.set_profile(get_profile(config.profile.name, dict(config.profile.options)))
        self._fit_to_model(run.config)
        self._open_run_folder(run.config)
        return self._prepare_dataset(run.config, run.profile, run.tokenizer)

    # ---- the steps, in order

    def _check_config(self, config: TrainerConfig) -> None:
        """Fill derived values; decide device and precision; set threads and hub mode."""
        required_for_training(config)
        check_trackers(config.monitoring.report_to)
        run = self._current
        run.config = config = resolve(config)
        environment, hyper = config.environment, config.hyperparams
        disable_progress_bar()  # transformers' own bars would tear the terminal view
        if environment.num_threads is not None:
            torch.set_num_threads(environment.num_threads)
        device = resolve_device(environment.device)
        run.set_numerics(device, resolve_precision(hyper.fp_precision, hyper.training_mode, device))

    def _fit_to_model(self, config: TrainerConfig) -> None:
        """Tokenizer and model config: compare `locked` and max_length before weights are read."""
        run, offline = self._current, config.environment.offline
        run.phase("loading", f"loading the tokenizer of {config.model.model_path}")
        run.tokenizer = load_tokenizer(config.model, offline=offline)
        model_config = read_model_config(config.model, offline=offline)
        check_locked(config.locked, config.model, model_config)
        limit, wanted = context_length(model_config), config.hyperparams.max_length
        if wanted is not None and limit is not None and wanted > limit:
            raise ConfigError(
                f"hyperparams.max_length={wanted} is above the model's context of {limit} tokens; "
                f"give at most {limit}."
            )
        length = wanted or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        hyper = config.hyperparams.model_copy(update={"max_length": length})
        run.config = config.model_copy(update={"hyperparams": hyper})

    def _open_run_folder(self, config: TrainerConfig) -> None:
        """Take the run folder for this process, and find what to resume from."""
        run = self._current
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

    def _prepare_dataset(
        self, config: TrainerConfig, profile: DataProfile, tokenizer: Any
    ) -> RunData:
        """Read, split, transform and encode the rows; the data card is part of the result."""
        run, hyper = self._current, config.hyperparams
        run.phase("loading", f"encoding {config.data.dataset_path}")
        started = time.perf_counter()
        data = prepare_data(
            config.data,
            profile=profile,
            encoder=RowEncoder(
                tokenizer,
                hyper.max_length or DEFAULT_MAX_LENGTH,
                truncation=config.data.truncation,
            ),
            system_prompt=self._build_system_prompt(config),
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
        total = self._num_steps(config)
        if hyper.warmup_steps >= total:
            raise ConfigError(
                f"hyperparams.warmup_steps={hyper.warmup_steps:g} is not below the {total} steps "
                "that these rows and epochs make; lower it or train longer."
            )
        if hyper.early_stopping_patience and data.validation is None:
            raise ConfigError(
                "hyperparams.early_stopping_patience is set, but no rows are held out "
                f"({data.card.validation}); hold some out or set it to 0."
            )
        if run.resume is not None:
            changes = check_resumable(run.resume.metadata, config, data.train.fingerprint())
            for change in changes:
                run.notice(f"changed since the checkpoint: {change}", "warning")
        run.observers.emit(
            CardShown(title="data", lines=tuple(card_lines(data.card)), sample=data.card.sample)
        )
        return data

    def _write_manifest(self, config: TrainerConfig) -> None:
        """config.resolved.json and run.json: from here on the run is on disk."""
        run = self._current
        if run.folder is None:
            return
        resolved = config.model_dump(mode="json")
        run.folder.write_json(run.folder.config_resolved, resolved)
        run.folder.write_json(
            run.folder.run_json,
            {
                "state": "training",
                "config": resolved,
                "date": run.date.isoformat(),
                "system_prompt": run.data.system_prompt,
                "precision": run.precision.reason,
                "device": str(run.device),
                "data_card": run.data.card.as_json(),
                "data_files_sha256": run.data.file_hashes,
                "data_fingerprint": run.data.train.fingerprint(),
                "resumed_from_step": run.resume.step if run.resume else None,
                "environment": environment_manifest(),
            },
        )
        self.status_writer.attach(
            run_dir=run.folder.path,
            context_window=config.hyperparams.max_length,
            model_name=config.model.model_path,
            max_output_tokens=config.monitoring.max_output_tokens,
            status_update_interval=config.monitoring.status_update_interval,
        )

    def _load_model_and_tokenizer(self, config: TrainerConfig) -> tuple[Any, Any]:
        """The model in its load dtype, with adapters in LoRA mode, and the tokenizer."""
        run, seed = self._current, config.environment.seed
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
            self._keep_unsaved_base()
            run.model = add_lora(run.model, config.lora, seed=seed)
            if config.hyperparams.gradient_checkpointing:
                # Inputs of a frozen model need no gradient, and then nothing would be recomputed.
                run.model.enable_input_require_grads()
        run.durations_s["loading"] = time.perf_counter() - started
        run.notice(f"precision: {run.precision.reason}")
        return run.model, run.tokenizer

    def _build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """The live monitor with its preview scheduler, and TensorBoard."""
        run, hyper, order = self._current, config.hyperparams, self._order(config)
        stopping = EarlyStopping(hyper.early_stopping_patience, hyper.early_stopping_min_delta)
        if run.resume is not None:
            stopping.restore(run.resume.run_state["early_stopping"])
        run.callback = LiveMonitorCallback(
            config.monitoring,
            observers=run.observers,
            evaluate=self._evaluator(config),
            early_stopping=stopping,
            checkpoint_interval=config.output.checkpoint_interval,
            is_stop_requested=lambda: run.stop.is_set,
            row_of_step=lambda step: run.data.train_texts[order.first_row_of_step(step)],
        )
        if is_main_process():
            run.scheduler = build_scheduler(run, run.callback.deliver_previews)
            run.callback.scheduler = run.scheduler
        callbacks: list[Any] = [run.callback]
        if "tensorboard" in config.monitoring.report_to and run.folder is not None:
            # TensorBoard takes most of a second to import.
            from trainer.monitoring.tracking import tensorboard_callback

            callback, tracker = tensorboard_callback(run.folder.logs_dir)
            run.observers.add(tracker)
            callbacks.append(callback)
        return callbacks

    def _create_trainer(
        self, config: TrainerConfig, model: Any, datasets: RunData, callbacks: list[Any]
    ) -> SupervisedTrainer:
        """HF's Trainer with our loss, order, optimizer and checkpoints."""
        run = self._current
        trainer = SupervisedTrainer(
            model=model,
            args=self._build_training_arguments(config),
            train_dataset=datasets.train,
            data_collator=self._collator(is_packed=config.data.enable_packing),
            optimizers=(build_optimizer(model, config.hyperparams), None),
            callbacks=callbacks,
            order=self._order(config),
            save_checkpoint=self._save_checkpoint,
            run_state=self._run_state,
            tokenizer=run.tokenizer,
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "this run was started under FSDP or DeepSpeed, whose sharded weights this version "
                "cannot save; start it with plain torchrun (DDP)."
            )
        if run.scheduler is not None and isinstance(run.scheduler.lane, PublishedPreviews):
            run.scheduler.lane.snapshotter.guard(trainer.optimizer)
        trainer.remove_callback(PrinterCallback)  # it prints dicts into the terminal view
        run.trainer = trainer
        if run.callback is not None:
            run.callback.trainer = trainer
        if config.data.enable_packing:
            self._check_packing(trainer)
        trainer.use_own_forward = not self._is_loss_equal(trainer, datasets)
        return trainer

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """Run the training loop; a stop request now waits for the end of the step."""
        run = self._current
        total = self._num_steps(config)
        run.observers.emit(
            RunStarted(
                model_name=config.model.model_path,
                total_steps=total,
                start_step=run.resume.step if run.resume else 0,
                num_epochs=config.hyperparams.num_epochs,
                num_train_rows=run.data.card.num_train_rows,
                num_validation_rows=len(run.data.validation or ()),
                context_window=config.hyperparams.max_length or 0,
                effective_batch_size=trainer.order.group_size,
                output_dir=config.output.output_dir,
            )
        )
        run.phase("training", f"training {total} steps")
        started = time.perf_counter()
        run.durations_s["launch_to_training"] = started - run.started
        run.stop.can_wait = True
        try:
            trainer.train(resume_from_checkpoint=str(run.resume.path) if run.resume else None)
            run.durations_s["training"] = time.perf_counter() - started
            self._drain_previews(config)
        finally:
            run.stop.can_wait = False

    def _drain_previews(self, config: TrainerConfig) -> None:
        """Wait for previews that are made elsewhere; a signal ends the wait, not the run's end."""
        run = self._current
        if run.scheduler is None or not run.scheduler.lane.pending():
            return
        run.phase("training", "waiting for the last previews")
        started = time.perf_counter()
        run.scheduler.drain(
            config.monitoring.preview_drain_timeout, should_stop=lambda: run.stop.is_set
        )
        run.durations_s["preview_drain"] = time.perf_counter() - started

    def _finish(self, config: TrainerConfig) -> TrainingResult:
        """Final evaluation and final model; a stopped run has its checkpoint only."""
        run = self._current
        if run.stop.signal is not None:
            raise StoppedError(
                f"stopped by {run.stop.signal.name} after step {run.step}; continue with --resume"
            )
        if run.folder is None or run.trainer is None:
            return run.completed(None, None)
        if config.monitoring.final_eval_prompts:
            run.phase("training", f"answering {len(run.data.final_prompts)} held-out prompts")
        evaluation = final_evaluation(run, run.folder.final_evaluation_jsonl)
        run.phase("saving", "saving the final model")
        path = save_final_model(
            run.trainer.accelerator.unwrap_model(run.trainer.model),
            run.tokenizer,
            run.folder.final_model_dir,
            dtype=run.precision.compute_dtype,
            stop_ids=run.data.encoder.template.stop_ids,
            use_cache=run.use_cache,
        )
        return run.completed(path, evaluation)

    def _close(self, result: TrainingResult) -> None:
        """Tell everybody, write how it ended, and let go of the folder."""
        run = self._current
        if run.scheduler is not None:
            run.scheduler.close()
        run.observers.emit(
            RunEnded(
                state=result.state,
                step=result.global_step,
                error_type=result.summary.get("error_type"),
                error_message=result.error_message,
                summary=result.summary,
            )
        )
        run.observers.close()
        self._run = None
        if run.folder is None:
            return
        if run.folder.run_json.exists():
            ending = {"exit_code": result.exit_code, "summary": result.summary}
            run.folder.update_json(run.folder.run_json, {"state": result.state, **ending})
        if result.exit_code == EXIT_USER_INPUT and run.resume is None and not run.step:
            run.folder.discard_unstarted_run()
        elif result.exit_code == EXIT_USER_INPUT:
            run.folder.discard_if_empty()
        run.folder.close()

    # ---- helpers whose names users know

    @staticmethod
    def _get_torch_dtype(precision: str) -> torch.dtype:
        """The compute dtype of `hyperparams.fp_precision`."""
        if precision not in DTYPES:
            raise ConfigError(
                f"hyperparams.fp_precision={precision!r} is not one of {', '.join(DTYPES)}."
            )
        return DTYPES[precision]

    def _build_system_prompt(self, config: TrainerConfig) -> str | None:
        """One system prompt for training and previews: flag, then file, then profile."""
        date = self._run.date if self._run is not None else dt.date.today()
        if config.profile.system_prompt is not None:
            return config.profile.system_prompt.replace("{date}", date.isoformat())
        return get_profile(config.profile.name, dict(config.profile.options)).system_prompt(
            date=date
        )

    def _build_training_arguments(self, config: TrainerConfig) -> Any:
        """HF's TrainingArguments for this config."""
        config = resolve(config)
        device = resolve_device(config.environment.device)
        hyper = config.hyperparams
        return build_training_arguments(
            config,
            precision=resolve_precision(hyper.fp_precision, hyper.training_mode, device),
            device=device,
            run_dir=Path(config.output.output_dir),
        )

    # ---- parts of the steps

    def _begin(self, config: TrainerConfig) -> RunContext:
        """The open run of this config, or a new one."""
        if self._run is None or self._run.asked is not config:
            observers = [self.status_writer, *self._extra_observers] if is_main_process() else []
            self._run = RunContext(config, Observers(observers))
        return self._run

    @property
    def _current(self) -> RunContext:
        assert self._run is not None, "only within a run"
        return self._run

    def _keep_unsaved_base(self) -> None:
        """An adapter needs its base again: the built-in model is on no disk, so save it."""
        run = self._current
        if run.model.config._name_or_path or run.folder is None:
            return
        base = (run.folder.path / "base_model").resolve()
        if not base.exists():
            run.model.save_pretrained(base)
            run.tokenizer.save_pretrained(base)
        run.model.config._name_or_path = run.model.name_or_path = str(base)

    def _evaluator(self, config: TrainerConfig) -> Evaluator | None:
        run = self._current
        if run.data.validation is None:
            return None
        return Evaluator(
            run.data.validation,
            collate=self._collator(),
            max_rows=config.monitoring.micro_eval_rows,
            batch_size=config.hyperparams.batch_size,
            autocast_dtype=run.precision.autocast_dtype,
        )

    def _order(self, config: TrainerConfig) -> EpochOrder:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        hyper = config.hyperparams
        return EpochOrder(
            self._current.data.train.lengths,
            group_size=hyper.batch_size * hyper.gradient_accumulation * world,
            seed=config.environment.seed,
            shuffle=config.data.shuffle,
            group_by_length=config.data.group_by_length,
            multiple_of=hyper.batch_size * world if world > 1 else 1,
        )

    def _num_steps(self, config: TrainerConfig) -> int:
        """Optimizer steps of the whole run; the last one of an epoch may have fewer rows."""
        hyper, order = config.hyperparams, self._order(config)
        if hyper.max_steps is not None:
            return hyper.max_steps
        return math.ceil(hyper.num_epochs * math.ceil(len(order) / order.group_size))

    def _collator(self, *, is_packed: bool = False) -> PadCollator | PackCollator:
        pad_id = self._current.tokenizer.pad_token_id or 0
        return PackCollator(pad_id) if is_packed else PadCollator(pad_id)

    def _check_packing(self, trainer: SupervisedTrainer) -> None:
        """Refuse packing where documents see each other, before the first step."""
        attention = getattr(trainer.model.config, "_attn_implementation", None)
        is_flash = attention == "flash_attention_2"  # takes half precision only
        autocast = trainer.accelerator.autocast() if is_flash else contextlib.nullcontext()
        with undisturbed(trainer.model), autocast:
            check_documents_apart(trainer.model)

    def _is_loss_equal(self, trainer: SupervisedTrainer, datasets: RunData) -> bool:
        """Compare our loss with the model's own on one batch; say so loudly where they differ."""
        run = self._current
        size = min(len(datasets.train), trainer.args.per_device_train_batch_size)
        collate = self._collator(is_packed=run.config.data.enable_packing)
        batch = collate([datasets.train[i] for i in range(size)])
        batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
        with undisturbed(trainer.model), trainer.accelerator.autocast():
            check = compare_with_own_loss(trainer.model, batch, run.precision.compute_dtype)
        if not check.is_equal:
            run.notice(
                f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
                f"{check.own:.6f}: this model adds something of its own, so its own forward is "
                "used (right, but slower)",
                "warning",
            )
        return check.is_equal

    def _save_checkpoint(self, step: int, write_state: Callable[[Path], None]) -> None:
        run = self._current
        assert run.folder is not None, "only the main process saves"
        started = time.perf_counter()
        best = run.callback.early_stopping.best_step if run.callback else 0
        run.checkpoint = save_checkpoint(
            run.folder.checkpoints_dir,
            step,
            write_state,
            keep=run.config.output.keep_checkpoints,
            protect={best} - {0},
            metadata={
                "config": run.config.model_dump(mode="json"),
                "data_fingerprint": run.data.train.fingerprint(),
                "date": run.date.isoformat(),
            },
        )
        seconds = time.perf_counter() - started
        run.observers.emit(CheckpointSaved(step=step, path=str(run.checkpoint), duration_s=seconds))

    def _run_state(self) -> dict[str, Any]:
        callback = self._current.callback
        assert callback is not None, "built before training"
        return {"early_stopping": callback.early_stopping.state()}


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0
