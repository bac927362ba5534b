"""One run: what it is prepared with, what it owns and closes again, and the result it ends in."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from trainer.child import is_first_of_machine
from trainer.config.schema import TrainerConfig
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.process import StopRequest, process_settings
from trainer.core.resume import HISTORY, SEMANTICS, ResumePoint, environment_manifest
from trainer.core.run_folder import RunFolder, resolved_config
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData
from trainer.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_USER_INPUT,
    ConfigError,
    RankError,
    StoppedError,
    TrainerError,
)
from trainer.models.attention import AttentionPlan
from trainer.models.precision import ResolvedPrecision
from trainer.monitoring.beats import TO_CONTINUE
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback
from trainer.monitoring.events import Observer, Observers, RunEnded
from trainer.monitoring.notify import Notifier, notify_trouble
from trainer.monitoring.ranks import RankWatch
from trainer.monitoring.resuming import resume_command
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.monitoring.trackers import Trackers
from trainer.preview.scheduler import PreviewScheduler
from trainer.profiles import DataProfile

if TYPE_CHECKING:
    from trainer.core.compiling import CompiledBlocks

logger = logging.getLogger(__name__)

before_closing: Callable[[str], None] | None = None
"""Called with the name of each step of closing before it is made; None in normal use. A test sets
it to send a signal or to raise, and so reaches every state in which closing can be disturbed."""

GIVEN_UP = "given_up"
"""`ended_by` of a run that was begun in parts and not run."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended."""

    success: bool
    """The model is saved: the run was completed, or its control file asked it to stop."""
    state: Literal["completed", "stopped", "failed"]
    output_dir: Path
    model_path: Path | None = None
    """`final_model/`; None unless `success`."""
    checkpoint_path: Path | None = None
    """The newest verified checkpoint."""
    global_step: int = 0
    train_loss: float | None = None
    """Of the last step, in nats per trained token."""
    val_loss: float | None = None
    """Of the last micro-evaluation."""
    error_message: str | None = None
    """Why it failed or was stopped."""
    exit_code: int = EXIT_FAILED
    """0 completed or stopped by the control file, 1 failed, 2 the user's input, 129, 130 and 143
    stopped by a signal."""
    is_told_elsewhere: bool = False
    """Another process of this machine tells the user of the mistake that ended all of them."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures and counts: previews, final evaluation, times; `ended_by`: steps, early_stopping,
    callback, control, a signal's name such as SIGINT, given_up, or error; `error_type` then.
    `previews` holds `asked`, `done`, `failed`, `verified` and more; its `all_failed` is true where
    the run has not shown a single answer, whatever `success` says."""


# ---- what a run is prepared with


@dataclass(frozen=True)
class Strategy:
    """How the processes of a run share the model."""

    name: str
    """`one` process, `ddp` or `fsdp2`."""
    reason: str
    """In words, for the user."""
    num_processes: int

    def __str__(self) -> str:
        """Name and reason in one line."""
        return self.reason if self.name == "one" else f"{self.name} ({self.reason})"

    def as_json(self, mesh: str | None = None) -> dict[str, Any]:
        """The part `processes` of run.json.

        Args:
            mesh: what shards lie on; None before that is known, and for whole copies.
        """
        return {
            "strategy": self.name,
            "reason": self.reason,
            "world_size": self.num_processes,
            "mesh": mesh,
        }


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything of a run before its weights: fixed from here on."""

    config: TrainerConfig
    """With every derived value filled in."""
    device: torch.device
    precision: ResolvedPrecision
    attention: AttentionPlan
    profile: DataProfile
    tokenizer: Any
    date: dt.date
    """Of the system prompt and of the chat template; a resume keeps the date of its run."""
    resume: ResumePoint | None
    """None: a new run."""
    data: RunData
    num_steps: int
    """Optimizer steps of the whole run."""
    changes: tuple[str, ...] = ()
    """What differs from the checkpoint that is resumed, in words."""
    strategy: Strategy = field(default_factory=lambda: Strategy("one", "one process", 1))
    """How the processes share the model, and why."""

    @property
    def start_step(self) -> int:
        """Optimizer steps that were done before this process."""
        return self.resume.step if self.resume is not None else 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """Each resume of the run that changed something: `step` and `changes`."""
        return self.resume.history(self.changes) if self.resume is not None else []

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.config.distributed.strategy == "fsdp2"


@dataclass(frozen=True)
class LoadedModel:
    """The weights of a run, on its device, with adapters in LoRA mode."""

    model: Any
    use_cache: bool
    """The model config's own value, which training changes."""


# ---- what a run owns


class Job:
    """What one run has open: settings of its process, folder and lock, observers, previews.

    `close` closes all of it, the last first, each guarded against the others: no exception and no
    signal keeps the rest from being closed.
    """

    def __init__(self, config: TrainerConfig, observers: Sequence[Observer]) -> None:
        """Open nothing but the record of the process's settings.

        Args:
            config: as it was asked for.
            observers: told of the run; closed with it.
        """
        self.config = config
        self.output_dir = Path(config.output.output_dir)
        self.observers = Observers(observers)
        self.stop = StopRequest()
        self.started = time.perf_counter()
        self.durations_s: dict[str, float] = {}
        self.date = dt.date.today()
        """A resume takes that of its run."""
        self.folder: RunFolder | None = None
        """None on other processes than the main one, and for what is not recorded."""
        self.is_recorded = False
        """Files of this run are in the folder, or being written."""
        self._attach: Callable[[], None] | None = None
        """Lets status.json be written into the folder; None once that is so."""
        self.resumed_from: ResumePoint | None = None
        self.checkpoint: Path | None = None
        """The newest that this process wrote."""
        self.monitor: LiveMonitorCallback | None = None
        """The live monitor, once it is built."""
        self.trackers: Trackers | None = None
        """Those that are transformers'; None where there are none, and on other processes."""
        self.trainer: SupervisedTrainer | None = None
        """HF's Trainer, once it is made."""
        self.blocks: CompiledBlocks | None = None
        """The compiled layers of the model; None where `hyperparams.compile` is off."""
        self.best: dict[str, Any] | None = None
        """The best step of the run, by what, and its value; None before that is known."""
        self.final_step: int | None = None
        """Whose weights the final model gets; None before that is known."""
        self.result: TrainingResult | None = None
        self.ranks: RankWatch | None = None
        """Tells what the other processes of the run do; None where there are none."""
        self.ending = threading.Lock()
        """Held by the thread that ends the run: the main one, unless it hangs in an exchange."""
        self.notifier: Notifier | None = None
        """Tells somebody how the run ends; None where nobody asked for it."""
        self._closing = contextlib.ExitStack()
        # In the order of opening: run.json is written after every observer has told the end, and
        # nobody else may take the folder before that.
        self.on_close("settings of the process", process_settings())
        self.on_close("lock of the run folder", self._release_folder)
        self.on_close("run.json", self._leave_folder)
        self.on_close("observers", self.observers.close)
        self.on_close("end of the run", self._tell_end)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step) if self.trainer is not None else 0

    @property
    def scheduler(self) -> PreviewScheduler | None:
        """Who has previews made; None before it is built and where there are none."""
        previews = self.monitor.previews if self.monitor is not None else None
        return previews.scheduler if previews is not None else None

    @property
    def stopping(self) -> EarlyStopping | None:
        """What early stopping knows; None before it is built."""
        evaluation = self.monitor.evaluation if self.monitor is not None else None
        return evaluation.stopping if evaluation is not None else None

    def on_close(self, name: str, close: Callable[[], Any]) -> None:
        """Have something closed at the end, before whatever is open already.

        Args:
            name: what it is, in words, for the message when it cannot be closed.
            close: bounded in time: a signal does not end it.
        """
        self._closing.callback(self._guarded, name, close)

    def end(self, result: TrainingResult) -> None:
        """Say how the run ended, to observers and in run.json, and close everything."""
        self.result = result
        self.close()
        if self.ranks is not None:
            self.ranks.close()
        if self.notifier is not None:
            self.notifier.finish()

    def notify(self) -> None:
        """Have somebody told how the run ends, where `monitoring.notify` says whom."""
        monitoring = self.config.monitoring
        if not monitoring.notify or notify_trouble(monitoring.notify):  # which the checks refuse
            return
        try:
            self.notifier = Notifier(
                monitoring.notify,
                silence_s=monitoring.notify_silence,
                folder=self.output_dir.expanduser(),
                warn=partial(self.observers.notice, level="warning"),
                num_processes=int(os.environ.get("WORLD_SIZE", "1")),
            )
        except OSError as error:  # no more processes here: that is no reason not to train
            self.observers.notice(f"monitoring.notify: nobody will be told ({error})", "warning")
            return
        self.observers.add(self.notifier)

    def give_up(self) -> None:
        """End a run that somebody began in parts and does not want any more."""
        when = f"after step {self.step}" if self.step else "before its first step"
        more = {"ended_by": GIVEN_UP}
        self.end(self._result("stopped", more, error_message=f"given up {when}"))

    def close(self) -> None:
        """Close everything; never raises. Without a result nobody is told of an end."""
        self._closing.close()

    def record(self, prepared: Prepared, status_writer: TrainingStatusWriter) -> None:
        """Write status.json, config.resolved.json and run.json: from here on the run is on disk.

        Raises:
            OutputError: the disk is full.
        """
        if self.folder is None:
            return
        self.folder.clear_unsaved()
        monitoring = prepared.config.monitoring
        self._attach = partial(
            status_writer.attach,
            run_dir=self.folder.path,
            context_window=prepared.config.hyperparams.max_length,
            model_name=prepared.config.model.model_path,
            max_output_tokens=monitoring.max_output_tokens,
            status_update_interval=monitoring.status_update_interval,
        )
        self.is_recorded = True
        self._attach()
        self._attach = None
        data, resolved = prepared.data, resolved_config(prepared.config)
        self.folder.write_json(self.folder.config_resolved, resolved)
        self.folder.write_json(
            self.folder.run_json,
            {
                "state": "training",
                "semantics": SEMANTICS,
                "config": resolved,
                "date": prepared.date.isoformat(),
                "system_prompt": data.system_prompt,
                "precision": prepared.precision.reason,
                "attention": prepared.attention.reason,
                "device": str(prepared.device),
                "processes": prepared.strategy.as_json(),
                "data_card": data.card.as_json(),
                "data_card_lines": card_lines(data.card),
                "data_files_sha256": data.file_hashes,
                "data_fingerprint": data.train.fingerprint(),
                "resumed_from_step": prepared.resume.step if prepared.resume else None,
                "changed_since_checkpoint": list(prepared.changes),
                HISTORY: prepared.history,
                "environment": environment_manifest(prepared.device),
            },
        )

    def record_config(self, prepared: Prepared) -> None:
        """Write a config again that has changed since `record`."""
        if self.folder is None or not self.is_recorded:
            return
        resolved = resolved_config(prepared.config)
        self.folder.write_json(self.folder.config_resolved, resolved)
        self.folder.update_json(self.folder.run_json, {"config": resolved})

    @staticmethod
    def _guarded(name: str, close: Callable[[], Any]) -> None:
        for step in (lambda: before_closing and before_closing(name), close):
            try:
                step()
            except BaseException as error:  # what is still open must be closed as well
                words = _words_of(error)
                logger.error("%s: could not be closed (%s: %s)", name, type(error).__name__, words)

    def _tell_end(self) -> None:
        if self.is_recorded and self._attach is not None:  # a signal came just before it
            self._attach()
        if self.result is not None:
            self.observers.emit(
                RunEnded(
                    state=self.result.state,
                    step=self.result.global_step,
                    error_type=self.result.summary.get("error_type"),
                    error_message=self.result.error_message,
                    summary=self.result.summary,
                )
            )

    def _leave_folder(self) -> None:
        """run.json says how it ended; who was refused or gave up leaves a folder as it was."""
        folder, result = self.folder, self.result
        if folder is None:
            return
        if result is None or not self.is_recorded:  # what is there is an earlier run's, if anything
            folder.discard_if_empty()
            return
        is_refused = result.exit_code == EXIT_USER_INPUT or result.summary["ended_by"] == GIVEN_UP
        is_half = not folder.run_json.exists()  # stopped while it was being recorded
        if (is_refused or is_half) and not self.step and self.resumed_from is None:
            folder.discard_unstarted_run()
        else:
            ending = {"exit_code": result.exit_code, "summary": result.summary}
            folder.update_json(folder.run_json, {"state": result.state, **ending})

    def _release_folder(self) -> None:
        if self.folder is not None:
            self.folder.close()

    # ---- how it ended

    def ended(
        self, model_path: Path | None, final_evaluation: dict[str, Any] | None
    ) -> TrainingResult:
        """The result of a run that reached its end, or was asked by its control file to end."""
        deciding = self.monitor.deciding if self.monitor is not None else None
        is_over = self.stopping is not None and self.stopping.is_over
        is_over = is_over or (deciding is not None and deciding.stop_reason is not None)
        is_early = is_over and self.trainer is not None and self.step < self.trainer.state.max_steps
        who = self.stop.asked_by  # a signal that comes by now is too late
        ended_by = "control" if who else "early_stopping" if is_early else "steps"
        if ended_by == "steps" and self.monitor is not None and self.monitor.callback_stop:
            ended_by = "callback"
        message = None
        if who:
            message = f"by {who} after step {self.step}; its model is saved"
            message += self._how_to_continue()
        return self._result(
            "stopped" if who else "completed",
            {"final_evaluation": final_evaluation, "ended_by": ended_by},
            success=True,
            exit_code=EXIT_COMPLETED,
            model_path=model_path,
            error_message=message,
        )

    def _how_to_continue(self) -> str:
        if self.checkpoint is None or self.folder is None:
            return ""
        if self.ranks is not None:
            return TO_CONTINUE
        command = resume_command(str(self.folder.path), self.config.model_dump())
        return f"; continue with: {command}"

    def failed(self, error: BaseException) -> TrainingResult:
        """The result of a run that was stopped or went wrong; unknown errors keep a traceback."""
        error = self._first_fault(error)
        more: dict[str, Any] = {"error_type": type(error).__name__, "ended_by": "error"}
        if isinstance(error, KeyboardInterrupt):  # not from our handler: a script has its own
            self.stop.signal = self.stop.signal or signal.SIGINT
            error = StoppedError(f"by {self.stop.by}", exit_code=self.stop.exit_code)
        if isinstance(error, StoppedError):
            message = str(error) + self._how_to_continue()
            more["ended_by"] = self.stop.by
            return self._result("stopped", more, exit_code=error.exit_code, error_message=message)
        message = _words_of(error) or type(error).__name__
        if "use_deterministic_algorithms" in message:  # torch's words
            error = ConfigError(
                f"environment.deterministic=true: {' '.join(message.split())[:400]} Set it to "
                "false, or use another model or attention."
            )
            message = str(error)
        if isinstance(error, RankError):
            message += self._how_to_continue()
            more |= {"traceback": error.traceback} if error.traceback else {}
        if isinstance(error, TrainerError):
            return self._result(
                "failed",
                more,
                exit_code=error.exit_code,
                error_message=message,
                is_told_elsewhere=self._is_told_elsewhere(error),
            )
        more["traceback"] = "".join(traceback.format_exception(error))
        logger.error("the run failed\n%s", more["traceback"])
        message = f"{type(error).__name__}: {message}"
        return self._result("failed", more, exit_code=EXIT_FAILED, error_message=message)

    def _is_told_elsewhere(self, error: TrainerError) -> bool:
        """Whether the first process of this machine tells the same mistake of the user."""
        if self.ranks is None or error.exit_code != EXIT_USER_INPUT or is_first_of_machine():
            return False
        return isinstance(error, RankError) or self.ranks.is_told_by_main

    def _first_fault(self, error: BaseException) -> BaseException:
        """The error, or what another rank did that led to it; the others hear of this one."""
        if self.ranks is None:
            return error
        number = self.stop.signal if isinstance(error, StoppedError) else None
        fault = self.ranks.answer(error, number.name if number is not None else None)
        if fault is None or (fault.signal is not None and self.stop.is_signalled):
            return error
        if fault.signal is None:
            return RankError(str(fault), fault.exit_code, fault.traceback)
        self.stop.signal = signal.Signals[fault.signal]
        return StoppedError(f"by {fault.signal} of rank {fault.rank}", exit_code=fault.exit_code)

    def _result(
        self,
        state: Literal["completed", "stopped", "failed"],
        more: dict[str, Any],
        *,
        success: bool = False,
        **options: Any,
    ) -> TrainingResult:
        trainer = self.trainer
        evaluation = self.monitor.evaluation if self.monitor is not None else None
        deciding = self.monitor.deciding if self.monitor is not None else None
        return TrainingResult(
            state=state,
            success=success,
            output_dir=self.output_dir,
            checkpoint_path=self.checkpoint
            or (self.resumed_from.path if self.resumed_from is not None else None),
            global_step=self.step,
            train_loss=trainer.last_step.train_loss if trainer and trainer.last_step else None,
            val_loss=evaluation.last_loss if evaluation else None,
            summary={
                "durations_s": {key: round(value, 3) for key, value in self.durations_s.items()},
                "previews": self._preview_counts(),
                "compile": self.blocks.summary() if self.blocks is not None else None,
                "fp16_overflows": trainer.num_overflows if trainer is not None else 0,
                "stop_reason": self.monitor.stop_reason if self.monitor else None,
                "best": self.best,
                "final_model_step": self.final_step,
                "deciding": deciding.summary() if deciding is not None else None,
                **more,
            },
            **options,
        )

    def _preview_counts(self) -> dict[str, Any] | None:
        if self.scheduler is None:
            return None
        try:
            return self.scheduler.summary()
        except StoppedError:
            raise
        except BaseException as error:  # a run ends without figures rather than not at all
            logger.error("previews: no figures (%s: %s)", type(error).__name__, _words_of(error))
            return None


def _words_of(error: BaseException) -> str:
    """The message of any exception, also of one that fails to say it."""
    try:
        return str(error)
    except Exception as another:
        return f"its message cannot be had ({type(another).__name__})"


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0
