"""TrainerEngine.run_job: a whole run, from a config to a finished model, in about ten steps.

Each step is a method; what it does lives in a module of its own (`preparation.py`, `manifest.py`,
`loading.py`, `assembly.py`, `execution.py`, ...).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from trainer.config.loader import required_for_training, resolve
from trainer.config.schema import TrainerConfig
from trainer.core.arguments import build_training_arguments
from trainer.core.assembly import assemble_callbacks, assemble_trainer
from trainer.core.dry_run import DryRun, finish_dry_run
from trainer.core.execution import execute_training, finish_training
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.manifest import leave_folder, write_manifest
from trainer.core.preparation import fit_to_model, load_for_training, open_run_folder, prepare_rows
from trainer.core.run import (
    RunContext,
    TrainingResult,
    ignore_dead_workers,
    is_main_process,
    stop_on_signals,
)
from trainer.data.dataset import RunData
from trainer.data.sources import check_files
from trainer.errors import ConfigError, StoppedError
from trainer.models.hub import go_offline, hub_setting_kept
from trainer.models.precision import DTYPES, fill_precision, resolve_device, resolve_precision
from trainer.monitoring.callbacks import Observers
from trainer.monitoring.events import Observer, RunEnded
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.monitoring.tracking import check_trackers
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
        check_files(config.data)
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
        return assemble_callbacks(self._current, config)

    def _create_trainer(
        self, config: TrainerConfig, model: Any, datasets: RunData, callbacks: list[Any]
    ) -> SupervisedTrainer:
        """HF's Trainer with our loss, order, optimizer and checkpoints."""
        return assemble_trainer(
            self._current,
            config,
            model=model,
            data=datasets,
            arguments=self._build_training_arguments(config),
            callbacks=callbacks,
        )

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """The training loop, and the last previews that are made elsewhere."""
        execute_training(self._current, trainer, config)

    def _finish(self, config: TrainerConfig) -> TrainingResult:
        """Final evaluation and final model; a stopped run has its checkpoint only."""
        return finish_training(self._current, config)

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
