"""TrainerEngine.run_job: a whole run, from a config to a finished model, in about ten steps.

Each step is a method; what would not fit on a screen lives in its own module (`preparation.py`,
`manifest.py`, `loading.py`, `arguments.py`, `previews.py`, ...).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from trainer.config.resolve import required_for_training, resolve
from trainer.config.schema import TrainerConfig
from trainer.core.arguments import build_training_arguments
from trainer.core.checkpoint import save_checkpoint
from trainer.core.context import RunContext, is_main_process
from trainer.core.dry_run import DryRun, finish_dry_run
from trainer.core.evaluate import build_evaluator
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loading import load_for_training
from trainer.core.loss_check import is_loss_equal
from trainer.core.manifest import leave_folder, write_manifest
from trainer.core.optim import build_optimizer
from trainer.core.packing_check import check_documents_apart
from trainer.core.preparation import (
    epoch_order,
    fit_to_model,
    num_steps,
    open_run_folder,
    prepare_rows,
)
from trainer.core.previews import build_scheduler, final_evaluation
from trainer.core.result import TrainingResult
from trainer.core.resume import ResumePoint
from trainer.core.run_folder import package_versions
from trainer.core.saving import save_final_model
from trainer.core.signals import ignore_dead_workers, stop_on_signals
from trainer.data.batches import PadCollator
from trainer.data.dataset import RunData
from trainer.data.packing import PackCollator
from trainer.errors import ConfigError, StoppedError
from trainer.models.hub import go_offline, hub_setting_kept
from trainer.models.precision import (
    DTYPES,
    fill_precision,
    resolve_device,
    resolve_precision,
)
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback, Observers
from trainer.monitoring.control import ControlFile
from trainer.monitoring.events import CheckpointSaved, Observer, RunEnded, RunStarted
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.monitoring.tracking import check_trackers, guard_trackers, tensorboard_callback
from trainer.preview.neutral import undisturbed
from trainer.preview.published import PublishedPreviews
from trainer.profiles import DataProfile, get_profile


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
        with stop_on_signals(run.stop), hub_setting_kept():
            try:
                self.prepare_dataset(config)
                self.load_model(config)
                self.build_callbacks(config)
                trainer = self.create_trainer(config)
                self._execute_training(trainer, run.config)
                result = self._finish(run.config)
            except (Exception, StoppedError) as error:
                ignore_dead_workers()
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
        with stop_on_signals(run.stop), hub_setting_kept():
            try:
                self._prepare(config)
                return finish_dry_run(run)
            finally:
                run.observers.close()
                if run.folder is not None:
                    run.folder.discard_if_empty()
                    run.folder.close()

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
        if environment.offline:
            go_offline()
        device = resolve_device(environment.device)
        run.config, name = fill_precision(config, device)
        run.set_numerics(device, resolve_precision(name, hyper.training_mode, device))

    def _fit_to_model(self, config: TrainerConfig) -> None:
        """Tokenizer and model config: compare `locked` and max_length before weights are read."""
        fit_to_model(self._current, config)

    def _open_run_folder(self, config: TrainerConfig) -> None:
        """Take the run folder for this process, and find what to resume from."""
        open_run_folder(self._current, config)

    def _prepare_dataset(
        self, config: TrainerConfig, profile: DataProfile, tokenizer: Any
    ) -> RunData:
        """Read, split, transform and encode the rows; the data card is part of the result."""
        return prepare_rows(
            self._current,
            config,
            profile=profile,
            tokenizer=tokenizer,
            system_prompt=self._build_system_prompt(config),
        )

    def _write_manifest(self, config: TrainerConfig) -> None:
        """config.resolved.json and run.json: from here on the run is on disk."""
        run = self._current
        if run.folder is None:
            return
        write_manifest(run, run.folder, config)
        self.status_writer.attach(
            run_dir=run.folder.path,
            context_window=config.hyperparams.max_length,
            model_name=config.model.model_path,
            max_output_tokens=config.monitoring.max_output_tokens,
            status_update_interval=config.monitoring.status_update_interval,
        )

    def _load_model_and_tokenizer(self, config: TrainerConfig) -> tuple[Any, Any]:
        """The model in its load dtype, with adapters in LoRA mode, and the tokenizer."""
        return load_for_training(self._current, config)

    def _build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """The live monitor with its preview scheduler, and TensorBoard."""
        run, hyper = self._current, config.hyperparams
        order = epoch_order(config, run.data)
        stopping = EarlyStopping(hyper.early_stopping_patience, hyper.early_stopping_min_delta)
        if run.resume is not None:
            stopping.restore(run.resume.run_state["early_stopping"])
        run.callback = LiveMonitorCallback(
            config.monitoring,
            observers=run.observers,
            evaluate=build_evaluator(run, collate=self._collator()),
            early_stopping=stopping,
            checkpoint_interval=config.output.checkpoint_interval,
            is_stop_requested=lambda: run.stop.is_set,
            request_stop=lambda: run.stop.ask("the control file"),
            control=ControlFile(run.folder.path, run.notice) if run.folder is not None else None,
            row_of_step=lambda step: run.data.train_texts[order.first_row_of_step(step)],
        )
        if is_main_process():
            run.scheduler = build_scheduler(run, run.callback.deliver_previews)
            run.callback.scheduler = run.scheduler
        callbacks: list[Any] = [run.callback]
        if "tensorboard" in config.monitoring.report_to and run.folder is not None:
            start_step = run.resume.step if run.resume else 0
            callback, tracker = tensorboard_callback(run.folder.logs_dir, start_step=start_step)
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
            order=epoch_order(config, run.data),
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
        guard_trackers(trainer)
        run.trainer = trainer
        if run.callback is not None:
            run.callback.trainer = trainer
        if config.data.enable_packing:
            self._check_packing(trainer)
        trainer.use_own_forward = not self._is_loss_equal(trainer)
        return trainer

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """Run the training loop; a stop request now waits for the end of the step."""
        run = self._current
        total = num_steps(config, run.data)
        run.observers.emit(
            RunStarted(
                model_name=config.model.model_path,
                total_steps=total,
                start_step=run.resume.step if run.resume else 0,
                num_epochs=total / trainer.order.steps_per_epoch,
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
            if run.resume is not None and self._is_trained(run.resume, total):
                trainer.restore(run.resume.path)
                run.notice(f"all {run.resume.step} steps are done; nothing is left to train")
            else:
                trainer.train(resume_from_checkpoint=str(run.resume.path) if run.resume else None)
            run.durations_s["training"] = time.perf_counter() - started
            self._drain_previews(config)
        finally:
            run.stop.can_wait = False
            run.durations_s.setdefault("training", time.perf_counter() - started)
            if run.scheduler is not None:  # a run that fails says what became of its previews too
                run.scheduler.give_up("the run ended before the answer came")

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

    def _is_trained(self, resume: ResumePoint, total: int) -> bool:
        """Whether the run had reached its end; HF's loop would make one step more."""
        callback = self._current.callback
        return resume.step >= total or (callback is not None and callback.early_stopping.is_over)

    def _finish(self, config: TrainerConfig) -> TrainingResult:
        """Final evaluation and final model; a stopped run has its checkpoint only."""
        run = self._current
        if run.stop.is_set:
            words = f"by {run.stop.by} after step {run.step}"
            raise StoppedError(words, exit_code=run.stop.exit_code)
        if run.folder is None or run.trainer is None:
            return run.completed(None, None)
        if config.monitoring.final_eval_prompts:
            if run.data.validation is None:
                run.notice(
                    "the final evaluation asks prompts that were trained on: no rows are held out",
                    "warning",
                )
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
        if run.folder is not None:
            leave_folder(run, run.folder, result)

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
        config, name = fill_precision(config, device)
        return build_training_arguments(
            config,
            precision=resolve_precision(name, config.hyperparams.training_mode, device),
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

    def _collator(self, *, is_packed: bool = False) -> PadCollator | PackCollator:
        pad_id = self._current.tokenizer.pad_token_id or 0
        return PackCollator(pad_id) if is_packed else PadCollator(pad_id)

    def _check_packing(self, trainer: SupervisedTrainer) -> None:
        """Refuse packing where documents see each other, before the first step."""
        attention = getattr(trainer.model.config, "_attn_implementation", None)
        is_flash = attention == "flash_attention_2"  # takes half precision only
        is_mixed = len({p.dtype for p in trainer.model.parameters()}) > 1
        needs_autocast = is_flash or is_mixed
        autocast = trainer.accelerator.autocast() if needs_autocast else contextlib.nullcontext()
        with undisturbed(trainer.model), autocast:
            check_documents_apart(trainer.model)

    def _is_loss_equal(self, trainer: SupervisedTrainer) -> bool:
        """Compare our loss with the model's own on one batch; say so loudly where they differ."""
        collate = self._collator(is_packed=self._current.config.data.enable_packing)
        return is_loss_equal(self._current, trainer, collate)

    def _save_checkpoint(self, step: int, write_state: Callable[[Path], None]) -> None:
        run = self._current
        assert run.folder is not None, "only the main process saves"
        started = time.perf_counter()
        run.checkpoint = save_checkpoint(
            run.folder.checkpoints_dir,
            step,
            write_state,
            keep=run.config.output.keep_checkpoints,
            protect=run.callback.protected_steps if run.callback else set(),
            metadata={
                "config": run.config.model_dump(mode="json"),
                "data_fingerprint": run.data.train.fingerprint(),
                "date": run.date.isoformat(),
                "versions": package_versions(),
            },
        )
        seconds = time.perf_counter() - started
        run.observers.emit(CheckpointSaved(step=step, path=str(run.checkpoint), duration_s=seconds))

    def _run_state(self) -> dict[str, Any]:
        callback = self._current.callback
        assert callback is not None, "built before training"
        return {"early_stopping": callback.early_stopping.state()}
