"""TrainerEngine.run_job: a whole run, from a config to a finished model, in about ten steps.

Each step is a method that says what it takes and gives; the ones that would not fit on a screen
live in their own modules (`models/load.py`, `data/dataset.py`, `core/arguments.py`, ...).
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.config import resolve
from trainer.config.resolve import required_for_training
from trainer.config.schema import TrainerConfig
from trainer.core.arguments import build_training_arguments
from trainer.core.checkpoint import clean_staging, save_checkpoint
from trainer.core.evaluate import Evaluator
from trainer.core.final_evaluation import evaluate_answers
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import compare_with_own_loss
from trainer.core.optim import build_optimizer
from trainer.core.result import TrainingResult
from trainer.core.resume import ResumePoint, check_resumable, find_resume_point
from trainer.core.run_folder import RunFolder, environment_manifest
from trainer.core.saving import save_final_model
from trainer.core.signals import StoppedError, StopRequest, stop_on_signals
from trainer.data.batches import EpochOrder, PadCollator
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import EXIT_COMPLETED, EXIT_FAILED, ConfigError, TrainerError, UserInputError
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
from trainer.monitoring.events import (
    CheckpointSaved,
    Notice,
    Observer,
    PhaseChanged,
    RunEnded,
    RunStarted,
    RunState,
)
from trainer.monitoring.preview_backend import create_preview_backend
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewRequest
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.neutral import undisturbed
from trainer.preview.scheduler import PreviewScheduler
from trainer.profiles import DataProfile, get_profile

logger = logging.getLogger(__name__)
DEFAULT_MAX_LENGTH = 2048
DRAIN_S = 60.0
"""How long the end of a run waits for previews made elsewhere."""


@dataclass
class _Run:
    """What one run has gathered so far; every field is set once, by the step it is named for."""

    config: TrainerConfig
    observers: Observers
    stop: StopRequest
    started: float = field(default_factory=time.perf_counter)
    folder: RunFolder | None = None
    device: torch.device = torch.device("cpu")
    precision: ResolvedPrecision | None = None
    profile: DataProfile | None = None
    date: dt.date = field(default_factory=dt.date.today)
    tokenizer: Any = None
    model: Any = None
    use_cache: bool = True
    data: RunData | None = None
    resume: ResumePoint | None = None
    trainer: Any = None
    callback: LiveMonitorCallback | None = None
    scheduler: PreviewScheduler | None = None
    checkpoint: Path | None = None
    durations_s: dict[str, float] = field(default_factory=dict)


class TrainerEngine:
    """Runs fine-tuning jobs; one at a time."""

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
        self.status_writer = status_writer
        self._extra_observers = list(observers)
        self._run: _Run | None = None

    # ---- the whole run

    def run_job(self, config: TrainerConfig) -> TrainingResult:
        """Train as `config` says. Never raises: what went wrong is in the result."""
        writer = self.status_writer or TrainingStatusWriter(None)
        observers = Observers([writer, *self._extra_observers])
        with stop_on_signals() as stop:
            self._run = run = _Run(config, observers, stop)
            try:
                run.config = config = self._check_config(config)
                run.profile = get_profile(config.profile.name, dict(config.profile.options))
                self._phase("loading", f"loading the tokenizer of {config.model.model_path}")
                run.tokenizer = load_tokenizer(config.model, offline=config.environment.offline)
                run.config = config = self._fit_to_model(config)
                self._open_run_folder(config)
                datasets = self._prepare_dataset(config, run.profile, run.tokenizer)
                self._write_manifest(config, writer)
                model, _ = self._load_model_and_tokenizer(config)
                callbacks = self._build_callbacks(config)
                trainer = self._create_trainer(config, model, datasets, callbacks)
                self._execute_training(trainer, config)
                result = self._finish(config)
            except (Exception, StoppedError) as error:
                result = self._failed(error)
            self._close(result)
            return result

    # ---- the steps, in order

    def _check_config(self, config: TrainerConfig) -> TrainerConfig:
        """Derived values filled, device and precision decided, threads and hub mode set."""
        required_for_training(config)
        config = resolve(config)
        environment = config.environment
        if environment.num_threads is not None:
            torch.set_num_threads(environment.num_threads)
        if environment.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        run = self._current
        run.device = resolve_device(environment.device)
        hyper = config.hyperparams
        run.precision = resolve_precision(hyper.fp_precision, hyper.training_mode, run.device)
        return config

    def _fit_to_model(self, config: TrainerConfig) -> TrainerConfig:
        """Compare `locked` and max_length with the model's config, before its weights are read."""
        model_config = read_model_config(config.model, offline=config.environment.offline)
        check_locked(config.locked, config.model, model_config)
        limit = context_length(model_config)
        wanted = config.hyperparams.max_length
        if wanted is not None and limit is not None and wanted > limit:
            raise ConfigError(
                f"hyperparams.max_length={wanted} is above the model's context of {limit} tokens; "
                f"give at most {limit}."
            )
        length = wanted or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        hyper = config.hyperparams.model_copy(update={"max_length": length})
        return config.model_copy(update={"hyperparams": hyper})

    def _open_run_folder(self, config: TrainerConfig) -> None:
        """Take the run folder for this process; find what to resume from."""
        run = self._current
        if not is_main_process():
            return
        output = Path(config.output.output_dir)
        run.folder = folder = RunFolder.create(output, resume=config.output.resume is not None)
        for notice in folder.notices:
            self._notice(notice, "warning")
        if config.output.resume is None:
            return
        removed = clean_staging(folder.checkpoints_dir)
        if removed:
            self._notice(f"removed {len(removed)} unfinished checkpoints of a killed run")
        run.resume = find_resume_point(config.output.resume, folder)
        run.date = run.resume.date or run.date
        for problem in run.resume.problems:
            self._notice(problem, "warning")
        self._notice(f"resuming from step {run.resume.step} ({run.resume.path})")

    def _prepare_dataset(
        self, config: TrainerConfig, profile: DataProfile, tokenizer: Any
    ) -> RunData:
        """Read, split, transform and encode the rows; the data card is in the result."""
        run = self._current
        self._phase("loading", f"encoding {config.data.dataset_path}")
        started = time.perf_counter()
        assert config.hyperparams.max_length is not None, "filled by _fit_to_model"
        run.data = prepare_data(
            config.data,
            profile=profile,
            encoder=RowEncoder(tokenizer, config.hyperparams.max_length),
            system_prompt=self._build_system_prompt(config),
            is_prompt_configured=config.profile.system_prompt is not None,
            seed=config.environment.seed,
            num_preview=config.monitoring.num_eval_samples,
            num_final=config.monitoring.final_eval_prompts,
        )
        run.durations_s["encoding"] = time.perf_counter() - started
        if config.hyperparams.early_stopping_patience and run.data.validation is None:
            raise ConfigError(
                "hyperparams.early_stopping_patience is set, but no rows are held out "
                f"({run.data.card.validation}); hold some out or set it to 0."
            )
        if run.resume is not None:
            fingerprint = run.data.train.fingerprint()
            for change in check_resumable(run.resume.metadata, config, fingerprint):
                self._notice(f"changed since the checkpoint: {change}", "warning")
        return run.data

    def _write_manifest(self, config: TrainerConfig, writer: TrainingStatusWriter) -> None:
        """config.resolved.json and run.json; from here on the run is on disk."""
        run = self._current
        if run.folder is None:
            return
        data, precision = run.data, run.precision
        assert data is not None and precision is not None, "prepared before"
        run.folder.write_json(run.folder.config_resolved, config.model_dump(mode="json"))
        run.folder.write_json(
            run.folder.run_json,
            {
                "state": "training",
                "config": config.model_dump(mode="json"),
                "date": run.date.isoformat(),
                "system_prompt": data.system_prompt,
                "precision": precision.reason,
                "data_card": data.card.as_json(),
                "data_files_sha256": data.file_hashes,
                "data_fingerprint": data.train.fingerprint(),
                "resumed_from_step": run.resume.step if run.resume else None,
                "environment": environment_manifest(),
            },
        )
        writer.attach(
            run_dir=run.folder.path,
            context_window=config.hyperparams.max_length,
            model_name=config.model.model_path,
            max_output_tokens=config.monitoring.max_output_tokens,
            status_update_interval=config.monitoring.status_update_interval,
        )

    def _load_model_and_tokenizer(self, config: TrainerConfig) -> tuple[Any, Any]:
        """Model in its load dtype (with adapters in LoRA mode) and tokenizer."""
        run = self._current
        self._phase("loading", f"loading {config.model.model_path}")
        started = time.perf_counter()
        seed, offline = config.environment.seed, config.environment.offline
        if run.tokenizer is None:
            run.tokenizer = load_tokenizer(config.model, offline=offline)
        precision = run.precision
        assert precision is not None, "decided by _check_config"
        model: Any = load_model(
            config.model, dtype=precision.load_dtype, seed=seed, offline=offline
        )
        check_vocabulary(model, run.tokenizer)
        run.use_cache = bool(getattr(model.config, "use_cache", True))
        if config.hyperparams.training_mode == "lora":
            self._keep_unsaved_base(model, run.tokenizer)
            model = add_lora(model, config.lora, seed=seed)
            if config.hyperparams.gradient_checkpointing:
                # Inputs of a frozen model need no gradient, and then nothing would be recomputed.
                model.enable_input_require_grads()
        run.model = model
        run.durations_s["loading"] = time.perf_counter() - started
        self._notice(f"precision: {precision.reason}")
        return model, run.tokenizer

    def _keep_unsaved_base(self, model: Any, tokenizer: Any) -> None:
        """An adapter needs its base again: the built-in model is nowhere on disk, so save it."""
        folder = self._current.folder
        if model.config._name_or_path or folder is None:
            return
        base = (folder.path / "base_model").resolve()
        if not base.exists():
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        model.config._name_or_path = str(base)
        model.name_or_path = str(base)

    def _build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """The live monitor with its preview scheduler, and trackers."""
        run = self._current
        data, stops = (
            run.data,
            EarlyStopping(
                config.hyperparams.early_stopping_patience,
                config.hyperparams.early_stopping_min_delta,
            ),
        )
        assert data is not None, "prepared before"
        if run.resume is not None:
            stops.__dict__.update(run.resume.run_state.get("early_stopping", {}))
        order = self._order(config)
        evaluate = None
        if data.validation is not None:
            evaluate = Evaluator(
                data.validation,
                collate=self._collator(),
                max_rows=config.monitoring.micro_eval_rows,
                batch_size=config.hyperparams.batch_size,
                autocast_dtype=run.precision.autocast_dtype if run.precision else None,
            )
        run.callback = LiveMonitorCallback(
            config.monitoring,
            observers=run.observers,
            evaluate=evaluate,
            early_stopping=stops,
            checkpoint_interval=config.output.checkpoint_interval,
            is_stop_requested=lambda: run.stop.is_set,
            row_of_step=lambda step: data.train_texts[order.first_row_of_step(step)],
        )
        run.callback.scheduler = run.scheduler = self._build_scheduler(config, run.callback)
        callbacks: list[Any] = [run.callback]
        if "tensorboard" in config.monitoring.report_to and run.folder is not None:
            # TensorBoard takes most of a second to import.
            from trainer.monitoring.tracking import tensorboard_callback

            callback, tracker = tensorboard_callback(run.folder.logs_dir)
            run.observers.add(tracker)
            callbacks.append(callback)
        return callbacks

    def _build_scheduler(
        self, config: TrainerConfig, callback: LiveMonitorCallback
    ) -> PreviewScheduler | None:
        """The preview backend and its fixed prompts; None where nothing is to be shown."""
        run, monitoring = self._current, config.monitoring
        if not monitoring.inference_interval or not is_main_process():
            return None
        assert run.data is not None and run.profile is not None, "prepared before"
        local = self._local_backend(config)
        requests = [
            PreviewRequest(
                prompt=held.prompt,
                prompt_token_ids=held.prompt_ids,
                golden_answer=held.golden_answer,
                prompt_id=held.prompt_id,
                held_out=held.is_held_out,
            )
            for held in run.data.preview_prompts
        ]
        requests += [
            PreviewRequest(
                prompt=text, prompt_token_ids=tuple(local.render(text)), prompt_id=f"user-{index}"
            )
            for index, text in enumerate(monitoring.preview_prompts)
        ]
        backend: Any = local
        if monitoring.preview_backend != "local":
            backend = create_preview_backend(
                monitoring,
                stop=run.profile.stop_strings,
                system_prompt=run.data.system_prompt,
                compare=run.profile.matches,
            )
            self._notice(
                f"previews come from {monitoring.remote_3090_host}:{monitoring.remote_3090_port} "
                "with the weights that server holds, not with this run's: marked unverified",
                "warning",
            )
        return PreviewScheduler(
            backend,
            requests,
            interval=monitoring.inference_interval,
            deliver=callback.deliver_previews,
        )

    def _local_backend(self, config: TrainerConfig) -> LocalPreviewBackend:
        run = self._current
        assert run.data is not None and run.precision is not None, "prepared before"
        return LocalPreviewBackend(
            model=run.model,
            tokenizer=run.tokenizer,
            profile=run.profile,
            system_prompt=run.data.system_prompt,
            max_new_tokens=config.monitoring.preview_max_tokens,
            temperature=config.monitoring.preview_temperature,
            seed=config.environment.seed,
            stop_ids=run.data.encoder.template.stop_ids,
            autocast_dtype=run.precision.autocast_dtype,
            max_length=context_length(run.model.config),
        )

    def _create_trainer(
        self, config: TrainerConfig, model: Any, datasets: RunData, callbacks: list[Any]
    ) -> SupervisedTrainer:
        """HF's Trainer with our loss, order, optimizer and checkpoints."""
        run = self._current
        trainer = SupervisedTrainer(
            model=model,
            args=self._build_training_arguments(config),
            train_dataset=datasets.train,
            data_collator=self._collator(),
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
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)  # it prints dicts into the terminal view
        run.trainer = trainer
        assert run.callback is not None, "built before"
        run.callback.trainer = trainer
        trainer.use_own_forward = not self._is_loss_equal(trainer, datasets)
        return trainer

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """Run the training loop; a stop request now waits for the end of the step."""
        run = self._current
        assert run.data is not None, "prepared before"
        total = trainer.num_steps()
        run.observers.emit(
            RunStarted(
                model_name=config.model.model_path,
                total_steps=total,
                start_step=run.resume.step if run.resume else 0,
                num_epochs=config.hyperparams.num_epochs,
                num_train_rows=len(run.data.train),
                num_validation_rows=len(run.data.validation or ()),
                context_window=config.hyperparams.max_length or 0,
                effective_batch_size=trainer.order.group_size,
                output_dir=config.output.output_dir,
            )
        )
        self._phase("training", f"training {total} steps")
        started = time.perf_counter()
        run.durations_s["launch_to_first_step"] = started - run.started
        run.stop.can_wait = True
        try:
            trainer.train(resume_from_checkpoint=str(run.resume.path) if run.resume else None)
        finally:
            run.stop.can_wait = False
            run.durations_s["training"] = time.perf_counter() - started
        if run.scheduler is not None:
            run.scheduler.drain(DRAIN_S)

    def _finish(self, config: TrainerConfig) -> TrainingResult:
        """Final evaluation and final model; or only the checkpoint, if the run was stopped."""
        run = self._current
        if run.stop.is_set:
            raise StoppedError(
                f"stopped by {run.stop.signal.name if run.stop.signal else 'request'} after step "
                f"{run.trainer.state.global_step}; continue with --resume"
            )
        if not is_main_process() or run.folder is None:
            return self._result("completed")
        evaluation = self._final_evaluation(config)
        self._phase("saving", "saving the final model")
        assert run.data is not None and run.precision is not None, "prepared before"
        model_path = save_final_model(
            run.trainer.accelerator.unwrap_model(run.trainer.model),
            run.tokenizer,
            run.folder.final_model_dir,
            dtype=run.precision.compute_dtype,
            stop_ids=run.data.encoder.template.stop_ids,
            use_cache=run.use_cache,
        )
        return self._result("completed", model_path=model_path, final_evaluation=evaluation)

    # ---- helpers with names that users know

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
        if config.profile.system_prompt is not None:
            return config.profile.system_prompt.replace("{date}", self._date().isoformat())
        profile = get_profile(config.profile.name, dict(config.profile.options))
        return profile.system_prompt(date=self._date())

    def _build_training_arguments(self, config: TrainerConfig) -> Any:
        """HF's TrainingArguments for this config."""
        config = resolve(config)
        device = resolve_device(config.environment.device)
        hyper = config.hyperparams
        precision = resolve_precision(hyper.fp_precision, hyper.training_mode, device)
        return build_training_arguments(
            config, precision=precision, device=device, run_dir=Path(config.output.output_dir)
        )

    # ---- parts of the steps

    @property
    def _current(self) -> _Run:
        assert self._run is not None, "only within run_job"
        return self._run

    def _date(self) -> dt.date:
        return self._run.date if self._run is not None else dt.date.today()

    def _order(self, config: TrainerConfig) -> EpochOrder:
        data = self._current.data
        assert data is not None, "prepared before"
        hyper = config.hyperparams
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return EpochOrder(
            data.train.lengths,
            group_size=hyper.batch_size * hyper.gradient_accumulation * world,
            seed=config.environment.seed,
            shuffle=config.data.shuffle,
            group_by_length=config.data.group_by_length,
        )

    def _collator(self) -> PadCollator:
        pad_id = self._current.tokenizer.pad_token_id
        return PadCollator(0 if pad_id is None else pad_id)

    def _is_loss_equal(self, trainer: SupervisedTrainer, datasets: RunData) -> bool:
        """Compare our loss with the model's own on one batch; say so loudly where they differ."""
        run = self._current
        assert run.precision is not None, "decided before"
        size = min(len(datasets.train), trainer.args.per_device_train_batch_size)
        batch = self._collator()([datasets.train[i] for i in range(size)])
        batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
        with undisturbed(trainer.model), trainer.accelerator.autocast():
            check = compare_with_own_loss(trainer.model, batch, run.precision.compute_dtype)
        if not check.is_equal:
            self._notice(
                f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
                f"{check.own:.6f}: this model adds something of its own, so its own forward is "
                "used (right, but slower)",
                "warning",
            )
        return check.is_equal

    def _save_checkpoint(self, step: int, write_state: Any) -> None:
        run = self._current
        assert run.folder is not None and run.data is not None, "only the main process saves"
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
        run.observers.emit(
            CheckpointSaved(
                step=step, path=str(run.checkpoint), duration_s=time.perf_counter() - started
            )
        )

    def _run_state(self) -> dict[str, Any]:
        callback = self._current.callback
        assert callback is not None, "built before"
        return {"early_stopping": vars(callback.early_stopping)}

    def _final_evaluation(self, config: TrainerConfig) -> dict[str, Any] | None:
        run = self._current
        if not config.monitoring.final_eval_prompts or run.data is None or run.folder is None:
            return None
        self._phase("training", f"answering {len(run.data.final_prompts)} held-out prompts")
        return evaluate_answers(
            self._local_backend(config),
            run.data.final_prompts,
            step=run.trainer.state.global_step,
            max_new_tokens=config.monitoring.max_eval_tokens,
            path=run.folder.final_evaluation_jsonl,
        )

    def _phase(self, state: RunState, text: str) -> None:
        self._current.observers.emit(PhaseChanged(state=state, text=text))

    def _notice(self, text: str, level: Any = "info") -> None:
        self._current.observers.emit(Notice(text=text, level=level))

    # ---- the end

    def _result(self, state: Any, **extra: Any) -> TrainingResult:
        """Gather what is known about the run, however far it came."""
        run = self._current
        trainer, callback = run.trainer, run.callback
        step = trainer.state.global_step if trainer is not None else 0
        summary: dict[str, Any] = {
            "durations_s": {key: round(value, 3) for key, value in run.durations_s.items()},
            "previews": run.scheduler.counters.summary() if run.scheduler else None,
            "final_evaluation": extra.pop("final_evaluation", None),
            "fp16_overflows": trainer.num_overflows if trainer is not None else 0,
            "stop_reason": callback.stop_reason if callback else None,
            **extra.pop("more", {}),
        }
        options: dict[str, Any] = {"exit_code": EXIT_COMPLETED, "success": True, **extra}
        return TrainingResult(
            state=state,
            output_dir=Path(run.config.output.output_dir),
            checkpoint_path=run.checkpoint or (run.resume.path if run.resume else None),
            global_step=step,
            train_loss=trainer.last_step.train_loss if trainer is not None and step else None,
            val_loss=callback.last_val_loss if callback else None,
            summary=summary,
            **options,
        )

    def _failed(self, error: BaseException) -> TrainingResult:
        """A result for what went wrong; unknown errors keep their traceback in logs/."""
        run = self._current
        more: dict[str, Any] = {"error_type": type(error).__name__}
        if isinstance(error, StoppedError):
            return self._result(
                "stopped",
                success=False,
                exit_code=run.stop.exit_code or EXIT_FAILED,
                error_message=str(error),
                more=more,
            )
        code = error.exit_code if isinstance(error, TrainerError) else EXIT_FAILED
        message = str(error) or type(error).__name__
        if not isinstance(error, TrainerError):
            message = f"{type(error).__name__}: {message}"
            more["traceback"] = "".join(traceback.format_exception(error))
            logger.error("the run failed\n%s", more["traceback"])
        return self._result(
            "failed", success=False, exit_code=code, error_message=message, more=more
        )

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
        if run.folder is None:
            return
        if run.folder.run_json.exists():
            run.folder.update_json(
                run.folder.run_json,
                {"state": result.state, "exit_code": result.exit_code, "summary": result.summary},
            )
        if result.exit_code == UserInputError.exit_code:
            run.folder.discard_if_empty()
        run.folder.close()


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0
