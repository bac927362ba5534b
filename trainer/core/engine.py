"""TrainerEngine.run_job: a whole run, from a config to a finished model, by values.

    prepare(config) -> Prepared -> load -> LoadedModel -> callbacks, Trainer -> train -> finish

What a run opens (folder, lock, previews, settings of the process) is its Job's, which closes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainer.config.loader import resolve
from trainer.config.schema import TrainerConfig
from trainer.core.dry_run import DryRun, finish_dry_run
from trainer.core.hf_trainer import SupervisedTrainer, build_training_arguments
from trainer.core.preparation import (
    check_against_rows,
    check_config,
    encode_rows,
    fit_to_model,
    load_for_training,
    open_run_folder,
)
from trainer.core.run import (
    Job,
    LoadedModel,
    Prepared,
    StopRequest,
    TrainingResult,
    ignore_dead_workers,
    is_main_process,
    stop_on_signals,
)
from trainer.core.training import (
    assemble_callbacks,
    assemble_trainer,
    execute_training,
    finish_training,
)
from trainer.data.card import card_lines
from trainer.data.dataset import RunData
from trainer.errors import ConfigError
from trainer.models.precision import (
    DTYPES,
    fill_precision,
    resolve_device,
    resolve_precision,
)
from trainer.monitoring.events import CardShown, Observer
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.profiles import DataProfile, get_profile


class TrainerEngine:
    """Runs fine-tuning jobs, one at a time."""

    def __init__(
        self,
        status_writer: TrainingStatusWriter | None = None,
        *,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Say who is told about the runs.

        Args:
            status_writer: writes status.json to its own path and to the run folder; None: to
                the run folder only.
            observers: terminal views, trackers and others.
        """
        self.status_writer = status_writer or TrainingStatusWriter(None)
        self._extra_observers = list(observers)
        self._open: _Stages | None = None
        self._job: Job | None = None

    # ---- the whole run

    def run_job(self, config: TrainerConfig) -> TrainingResult:
        """Train as `config` says. Never raises: what went wrong is in the result.

        What `prepare_dataset`, `load_model` and the others made for an equal config is used.
        """
        stop = StopRequest()
        with stop_on_signals(stop):
            stages = self._stages(config)
            job = stages.job
            job.stop = stop
            try:
                with stop.work():
                    self._execute_training(stages.trainer, stages.prepared.config)
                    result = finish_training(job, stages.prepared, stages.loaded, stages.trainer)
            except BaseException as error:  # a signal's StoppedError, and what libraries raise
                ignore_dead_workers()
                result = job.failed(error)
            self._open = self._job = None
            job.end(result)
        return result

    # ---- the same in parts, for scripts: each does what it needs first, and nothing twice

    def prepare_dataset(self, config: TrainerConfig) -> RunData:
        """Checks, tokenizer, run folder, rows and data card; from here on the run is on disk.

        Raises:
            TrainerError: a user's mistake; nothing was written.
        """
        with self._given_up_on_error():
            return self._stages(config).recorded.data

    def load_model(self, config: TrainerConfig) -> tuple[Any, Any]:
        """Model and tokenizer."""
        with self._given_up_on_error():
            stages = self._stages(config)
            return stages.loaded.model, stages.prepared.tokenizer

    def build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """Live monitor and trackers."""
        with self._given_up_on_error():
            return self._stages(config).callbacks

    def create_trainer(self, config: TrainerConfig) -> SupervisedTrainer:
        """The Trainer, ready to run."""
        with self._given_up_on_error():
            return self._stages(config).trainer

    def close(self) -> None:
        """Give up what the parts above have opened; the folder is left as if nothing had been."""
        if self._open is not None:
            self._open.job.close()
        self._open = self._job = None

    @contextlib.contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _stages(self, config: TrainerConfig) -> _Stages:
        """What was made for this config and is still open, or a beginning."""
        if self._open is None or not self._open.is_of(config):
            self.close()
            observers = [self.status_writer, *self._extra_observers] if is_main_process() else []
            self._open = _Stages(self, config, Job(config, observers))
        self._job = self._open.job
        return self._open

    # ---- without training

    def dry_run(self, config: TrainerConfig) -> DryRun:
        """Everything before the weights: checks, encoding, sums; writes config.resolved.json.

        Raises:
            TrainerError: what would also stop the run.
        """
        with self._dropped_job(config) as job, stop_on_signals(job.stop), job.stop.work():
            return finish_dry_run(self._prepare(config, job), job.folder)

    def inspect_data(self, config: TrainerConfig) -> RunData:
        """The rows as a run would train on them; nothing is written but the cache of rows.

        Raises:
            TrainerError: what would also stop the run.
        """
        with self._dropped_job(config) as job:
            return self._prepare(config, job, has_folder=False).data

    @contextlib.contextmanager
    def _dropped_job(self, config: TrainerConfig) -> Iterator[Job]:
        """A job of its own, closed without a result; what is open for scripts stays open."""
        before, self._job = self._job, Job(config, self._extra_observers)
        try:
            yield self._job
        finally:
            self._job.close()
            self._job = before

    # ---- the steps, in order

    def _prepare(self, config: TrainerConfig, job: Job, *, has_folder: bool = True) -> Prepared:
        """The steps before the weights: they fail on the user's mistakes."""
        config, numerics = check_config(config)
        profile = get_profile(config.profile.name, dict(config.profile.options))
        config, tokenizer = fit_to_model(config, job.observers)
        if has_folder:
            open_run_folder(job, config)
        data = self._prepare_dataset(config, profile, tokenizer)
        num_steps, changes = check_against_rows(config, data, job.resumed_from)
        for change in changes:
            job.observers.notice(f"changed since the checkpoint: {change}", "warning")
        lines = tuple(card_lines(data.card))
        job.observers.emit(CardShown(title="data", lines=lines, sample=data.card.sample))
        return Prepared(
            config=config,
            device=numerics.device,
            precision=numerics.precision,
            profile=profile,
            tokenizer=tokenizer,
            date=job.date,
            resume=job.resumed_from,
            data=data,
            num_steps=num_steps,
            changes=changes,
        )

    def _prepare_dataset(
        self, config: TrainerConfig, profile: DataProfile, tokenizer: Any
    ) -> RunData:
        """Read, split, transform and encode the rows; the data card is part of the result."""
        return encode_rows(
            self._job or Job(config, self._extra_observers),
            config,
            profile=profile,
            tokenizer=tokenizer,
            system_prompt=self._build_system_prompt(config),
        )

    def _load_model_and_tokenizer(self, config: TrainerConfig) -> tuple[Any, Any]:
        """The model in its load dtype, with adapters in LoRA mode, and the tokenizer."""
        stages = self._stages(config)
        model = load_for_training(stages.recorded, stages.job)
        return model, stages.prepared.tokenizer

    def _build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """The live monitor with its preview scheduler, and TensorBoard."""
        stages = self._stages(config)
        return assemble_callbacks(stages.job, stages.prepared, stages.loaded)

    def _create_trainer(
        self, config: TrainerConfig, model: Any, datasets: RunData, callbacks: list[Any]
    ) -> SupervisedTrainer:
        """HF's Trainer with our loss, order, optimizer and checkpoints."""
        stages = self._stages(config)
        return assemble_trainer(
            stages.job,
            dataclasses.replace(stages.prepared, data=datasets),
            model,
            arguments=self._build_training_arguments(stages.prepared.config),
            callbacks=callbacks,
        )

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """The training loop, and the last previews that are made elsewhere."""
        stages = self._stages(config)
        execute_training(stages.job, stages.prepared, trainer)

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
        date = self._job.date if self._job is not None else dt.date.today()
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


class _Stages:
    """What a config has led to so far: each value is made once, by a method of the engine."""

    def __init__(self, engine: TrainerEngine, config: TrainerConfig, job: Job) -> None:
        self._engine, self._asked, self.job = engine, config, job

    def is_of(self, config: TrainerConfig) -> bool:
        """Whether this is the run of `config`, as it was asked for or as it was resolved."""
        if config == self._asked:
            return True
        made = vars(self).get("prepared")
        return made is not None and config == made.config

    @cached_property
    def prepared(self) -> Prepared:
        """The run before its weights; nothing is recorded yet."""
        return self._engine._prepare(self._asked, self.job)

    @cached_property
    def recorded(self) -> Prepared:
        """The same, once it is on disk."""
        prepared = self.prepared
        self.job.record(prepared)
        if self.job.folder is not None:
            monitoring = prepared.config.monitoring
            self._engine.status_writer.attach(
                run_dir=self.job.folder.path,
                context_window=prepared.config.hyperparams.max_length,
                model_name=prepared.config.model.model_path,
                max_output_tokens=monitoring.max_output_tokens,
                status_update_interval=monitoring.status_update_interval,
            )
        return prepared

    @cached_property
    def loaded(self) -> LoadedModel:
        """The weights."""
        model, _ = self._engine._load_model_and_tokenizer(self.recorded.config)
        return LoadedModel(model, use_cache=bool(getattr(model.config, "use_cache", True)))

    @cached_property
    def callbacks(self) -> list[Any]:
        """What HF's Trainer calls."""
        return self._engine._build_callbacks(self.prepared.config)

    @cached_property
    def trainer(self) -> SupervisedTrainer:
        """HF's Trainer, ready to run."""
        return self._engine._create_trainer(
            self.prepared.config, self.loaded.model, self.prepared.data, self.callbacks
        )
