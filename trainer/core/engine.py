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
from transformers import TrainerCallback

from trainer.config.loader import resolve
from trainer.config.schema import TrainerConfig
from trainer.core.batch_size import fit_batch_size, keep_found_batch_size
from trainer.core.dry_run import DryRun, finish_dry_run, memory_warning
from trainer.core.evaluation import with_eval_interval
from trainer.core.faults import watch_ranks
from trainer.core.hf_trainer import SupervisedTrainer, build_training_arguments
from trainer.core.optim import rate_words
from trainer.core.preparation import (
    check_against_rows,
    check_callbacks,
    check_config,
    check_folder,
    encode_rows,
    fit_to_model,
    load_for_training,
    num_steps,
    open_run_folder,
    start_run_trackers,
)
from trainer.core.preview_choice import with_preview_backend
from trainer.core.process import StopRequest, ignore_dead_workers, process_settings, stop_on_signals
from trainer.core.resume import is_of_schedule
from trainer.core.run import Job, LoadedModel, Prepared, TrainingResult, is_main_process
from trainer.core.strategy import check_launcher, with_strategy
from trainer.core.together import join_processes, true_for_all
from trainer.core.training import (
    assemble_callbacks,
    assemble_trainer,
    execute_training,
    finish_training,
)
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData
from trainer.errors import ConfigError
from trainer.models.devices import own_device
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
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Say who is told about the runs; `trainer.run_job` shows them as well.

        Args:
            status_writer: writes status.json to its own path and to the run folder; None: to
                the run folder only.
            observers: terminal views, trackers and others.
            callbacks: of transformers, called before ours at each point.
        """
        self.status_writer = status_writer or TrainingStatusWriter(None)
        self._extra_observers, self._callbacks = list(observers), list(callbacks)
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
            if stages.job.step:  # its trainer was run by hand: that run is over
                self.close()
                stages = self._stages(config)
            job, stages.is_busy = stages.job, True
            job.stop = stop
            try:
                with stop.work():
                    watch_ranks(job, config)
                    self._execute_training(stages.trainer, stages.prepared.config)
                    result = finish_training(job, stages.prepared, stages.loaded, stages.trainer)
                job.ending.acquire()
            except BaseException as error:  # a signal's StoppedError, and what libraries raise
                job.ending.acquire()
                result = job.failed(error)
            ignore_dead_workers()
            self._open = self._job = None
            job.end(result)
        return result

    # ---- the same in parts, for scripts: each does what it needs first, and nothing twice

    def prepare_dataset(self, config: TrainerConfig) -> RunData:
        """Checks, tokenizer, run folder, rows and data card; from here on the run is on disk.

        Raises:
            TrainerError: a user's mistake; nothing was written.
        """
        with self._part(config) as stages:
            return stages.recorded.data

    def load_model(self, config: TrainerConfig) -> tuple[Any, Any]:
        """Model and tokenizer."""
        with self._part(config) as stages:
            return stages.loaded.model, stages.prepared.tokenizer

    def build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """Live monitor and trackers."""
        with self._part(config) as stages:
            return stages.callbacks

    def create_trainer(self, config: TrainerConfig) -> SupervisedTrainer:
        """The Trainer, ready to run."""
        with self._part(config) as stages:
            return stages.trainer

    def close(self) -> None:
        """Give up what the parts above have opened; the folder is left as if nothing had been."""
        if self._open is not None:
            self._open.job.give_up()
        self._open = self._job = None

    @contextlib.contextmanager
    def _part(self, config: TrainerConfig) -> Iterator[_Stages]:
        """The stages of a config, for one part of a run; if it fails, so has the run."""
        stages = self._stages(config)
        if stages.is_busy:  # called by a part, or by `run_job`, whose failure it is
            yield stages
            return
        stages.is_busy = True
        try:
            yield stages
        except BaseException as error:
            self._open = self._job = None
            stages.job.end(stages.job.failed(error))
            raise
        finally:
            stages.is_busy = False

    def _stages(self, config: TrainerConfig) -> _Stages:
        """What was made for this config and is still open, or a beginning.

        While a run is at work it is that run's, whatever a replaced step has made of its config.
        """
        if self._open is None or not (self._open.is_busy or self._open.is_of(config)):
            self.close()
            observers = [self.status_writer, *self._extra_observers] if is_main_process() else []
            self._open = _Stages(self, config, Job(config, observers))
            if is_main_process():
                self._open.job.notify()
        self._job = self._open.job
        return self._open

    # ---- without training

    def dry_run(self, config: TrainerConfig) -> DryRun:
        """Everything before the weights: checks, encoding, sums; writes config.resolved.json.

        What was begun in parts is given up: it may hold the folder.

        Raises:
            TrainerError: what would also stop the run.
        """
        self.close()
        with self._dropped_job(config) as job, stop_on_signals(job.stop), job.stop.work():
            prepared = self._prepare(config, job, is_dry=True)
            job.observers.phase("loading", "reckoning what a step needs")
            # One process makes it, whatever the others see.
            prepared = with_strategy(prepared, job.observers.notice, agree=lambda mine: mine)
            prepared = with_preview_backend(prepared, job.observers.notice)
            return finish_dry_run(prepared, job.folder)

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

    def _prepare(
        self, config: TrainerConfig, job: Job, *, has_folder: bool = True, is_dry: bool = False
    ) -> Prepared:
        """The steps before the weights: they fail on the user's mistakes."""
        check_callbacks(self._callbacks)
        config, numerics = check_config(config)
        if has_folder:
            check_launcher(config)
        profile = get_profile(config.profile.name, dict(config.profile.options))
        config, tokenizer, attention = fit_to_model(config, job.observers, numerics)
        if has_folder:
            if not is_dry:  # which is made by the main process alone
                join_processes(numerics.device, config.distributed.timeout_s)
            open_run_folder(job, config)
            config = keep_found_batch_size(config, job.resumed_from)
        data = self._prepare_dataset(config, profile, tokenizer)
        total, changes = check_against_rows(config, data, job.resumed_from)
        config = with_eval_interval(config, total, len(data.validation or ()))
        for change in changes:
            job.observers.notice(f"changed since the checkpoint: {change}", "warning")
        if job.resumed_from is not None and any(map(is_of_schedule, changes)):
            told = rate_words(config.hyperparams, total, start=job.resumed_from.step)
            job.observers.notice(told, "warning")
        lines = tuple(card_lines(data.card))
        job.observers.emit(CardShown(title="data", lines=lines, sample=data.card.sample))
        return Prepared(
            config=config,
            device=numerics.device,
            precision=numerics.precision,
            attention=attention,
            profile=profile,
            tokenizer=tokenizer,
            date=job.date,
            resume=job.resumed_from,
            data=data,
            num_steps=total,
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
        with self._part(config) as stages:
            prepared = stages.under(config, stages.recorded)
            return load_for_training(prepared, stages.job), prepared.tokenizer

    def _build_callbacks(self, config: TrainerConfig) -> list[Any]:
        """The user's own, the live monitor with its preview scheduler, and TensorBoard."""
        with self._part(config) as stages:
            prepared = stages.under(config, stages.prepared)
            return [*self._callbacks, *assemble_callbacks(stages.job, prepared, stages.loaded)]

    def _create_trainer(
        self, config: TrainerConfig, model: Any, datasets: RunData, callbacks: list[Any]
    ) -> SupervisedTrainer:
        """HF's Trainer with our loss, order, optimizer and checkpoints."""
        with self._part(config) as stages:
            prepared = stages.under(config, dataclasses.replace(stages.prepared, data=datasets))
            return assemble_trainer(
                stages.job,
                prepared,
                model,
                arguments=self._build_training_arguments(prepared.config),
                callbacks=callbacks,
            )

    def _execute_training(self, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
        """The training loop, and the last previews that are made elsewhere."""
        with self._part(config) as stages:
            prepared = stages.under(config, stages.prepared)
            execute_training(stages.job, prepared, trainer)

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
        asked = config.environment.device
        device = own_device(resolve_device(asked), asked)
        config, name = fill_precision(config, device)
        hyper = config.hyperparams
        put_back = process_settings()  # the device that accelerate is told
        try:
            return build_training_arguments(
                config,
                precision=resolve_precision(name, hyper.training_mode, device, hyper.masters),
                device=device,
                run_dir=Path(config.output.output_dir),
            )
        finally:
            if self._job is None:  # a job puts it back itself, after its Trainer
                put_back()


class _Stages:
    """What a config has led to so far: each value is made once, by a method of the engine."""

    def __init__(self, engine: TrainerEngine, config: TrainerConfig, job: Job) -> None:
        self._engine, self._asked, self.job = engine, config, job
        self.is_busy = False
        """A part of the run is being made; steps that it calls are its own."""

    def is_of(self, config: TrainerConfig) -> bool:
        """Whether this is the run of `config`, as it was asked for or as it was resolved."""
        if config == self._asked:
            return True
        made = vars(self).get("prepared")
        return made is not None and config == made.config

    def under(self, config: TrainerConfig, prepared: Prepared) -> Prepared:
        """The same run with the config, and the rows, that a replaced step has handed on."""
        if self.is_of(config):
            config = self.prepared.config
        if config == self.prepared.config and prepared.data is self.prepared.data:
            return prepared
        total = num_steps(config, prepared.data)
        return dataclasses.replace(prepared, config=config, num_steps=total)

    @cached_property
    def prepared(self) -> Prepared:
        """The run before its weights; nothing is recorded yet."""
        prepared = self._engine._prepare(self._asked, self.job)
        prepared = with_strategy(prepared, self.job.observers.notice, agree=true_for_all)
        check_folder(prepared)
        return with_preview_backend(prepared, self.job.observers.notice)

    @cached_property
    def recorded(self) -> Prepared:
        """The same, once it is on disk and its trackers have begun."""
        start_run_trackers(self.job, self.prepared)
        told = memory_warning(self.prepared) if is_main_process() else None
        if told is not None:
            self.job.observers.notice(told, "warning")
        self.job.record(self.prepared, self._engine.status_writer)
        return self.prepared

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
        trainer = self._engine._create_trainer(
            self.prepared.config, self.loaded.model, self.prepared.data, self.callbacks
        )
        self.prepared = fit_batch_size(self.job, self.prepared, trainer)
        return trainer
