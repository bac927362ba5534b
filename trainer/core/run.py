"""One run: what it has gathered so far, who asked it to stop, and the result it ends in."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from trainer.config.schema import TrainerConfig
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.resume import ResumePoint
from trainer.core.run_folder import RunFolder
from trainer.data.dataset import RunData
from trainer.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    StoppedError,
    TrainerError,
)
from trainer.models.precision import ResolvedPrecision
from trainer.monitoring.callbacks import LiveMonitorCallback, Observers
from trainer.monitoring.events import Notice, PhaseChanged, RunState
from trainer.preview.scheduler import PreviewScheduler
from trainer.profiles import DataProfile


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
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures and counts: previews, final evaluation, times; `ended_by`: steps, early_stopping,
    control, a signal's name such as SIGINT, or error; `error_type` after a failure. `previews`
    holds `asked`, `done`, `failed`, `verified` and more; its `all_failed` is true where the run has
    not shown a single answer, whatever `success` says."""


# ---- Ctrl-C, SIGTERM, SIGHUP: the first asks for a stop at the end of the step, a second aborts
#
# The control file asks for a stop too, but of another kind: the run then ends as if it were done.


EXIT_CODES = {
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGTERM: EXIT_SIGTERM,
    signal.SIGHUP: EXIT_SIGHUP,  # the terminal or the connection is gone
}


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        """Nobody asked yet, and no step is being made."""
        self.signal: signal.Signals | None = None
        self.asked_by: str | None = None
        """Who asked without a signal, in words."""
        self.can_wait = False
        """True while training: the stop then waits for the end of the step."""

    @property
    def is_set(self) -> bool:
        """Whether a signal came, or somebody asked in another way."""
        return self.signal is not None or self.asked_by is not None

    @property
    def by(self) -> str:
        """Who asked, such as `SIGINT`."""
        return self.signal.name if self.signal is not None else str(self.asked_by)

    @property
    def is_signalled(self) -> bool:
        """Whether a signal came: there may be little time, so nothing but a checkpoint is made."""
        return self.signal is not None

    def ask(self, who: str) -> None:
        """Ask for a stop at the end of the step, with everything that the end of a run makes."""
        self.asked_by = self.asked_by or who

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP; 0 without a signal."""
        return EXIT_CODES[self.signal] if self.signal is not None else EXIT_COMPLETED

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first signal, abort at the second or outside a step."""
        is_second = self.is_signalled
        self.signal = self.signal or signal.Signals(number)
        if is_second or not self.can_wait:
            raise StoppedError(f"by {self.signal.name}", exit_code=self.exit_code)


@contextlib.contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Send the signals to `request` within the block; only the main thread can.

    A signal that is ignored stays so: `nohup` asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, request.handle)
        for number in EXIT_CODES
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_dead_workers() -> None:
    """Take away torch's handler of SIGCHLD, for a run that has failed already.

    Where a DataLoader worker was killed it raises again for every child that ends, out of whatever
    is being done: writing how the run ended, for instance.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# ---- RunContext: what one run has gathered so far, and the result it ends in


logger = logging.getLogger(__name__)


@dataclass
class RunContext:
    """Filled step by step by the engine; a field that is asked for too early is our mistake."""

    config: TrainerConfig
    """As resolved so far."""
    observers: Observers
    stop: StopRequest = field(default_factory=StopRequest)
    started: float = field(default_factory=time.perf_counter)
    date: dt.date = field(default_factory=dt.date.today)
    """Of the system prompt and of the chat template; a resume keeps the date of its run."""
    durations_s: dict[str, float] = field(default_factory=dict)
    use_cache: bool = True
    """The model config's own value, which training changes."""
    tokenizer: Any = None
    model: Any = None
    folder: RunFolder | None = None
    """None on other processes than the main one, and before it is taken."""
    resume: ResumePoint | None = None
    checkpoint: Path | None = None
    changes: list[str] = field(default_factory=list)
    """What differs from the checkpoint that is resumed, in words."""
    is_recorded: bool = False
    """run.json of the folder is this run's."""
    callbacks: list[Any] = field(default_factory=list)
    trainer: SupervisedTrainer | None = None
    callback: LiveMonitorCallback | None = None
    scheduler: PreviewScheduler | None = None
    _device: torch.device | None = None
    _precision: ResolvedPrecision | None = None
    _profile: DataProfile | None = None
    _data: RunData | None = None

    def __post_init__(self) -> None:
        """Remember the config as it was asked for: it tells this run from another."""
        self.asked = self.config

    @property
    def has_data(self) -> bool:
        """Whether the rows are prepared."""
        return self._data is not None

    def set_numerics(self, device: torch.device, precision: ResolvedPrecision) -> None:
        """Fix where and how precisely this run computes."""
        self._device, self._precision = device, precision

    def set_profile(self, profile: DataProfile) -> None:
        """Fix the profile."""
        self._profile = profile

    def set_data(self, data: RunData) -> None:
        """Fix the rows."""
        self._data = data

    @property
    def device(self) -> torch.device:
        """Where this run computes."""
        assert self._device is not None, "set by _check_config"
        return self._device

    @property
    def precision(self) -> ResolvedPrecision:
        """How precisely this run computes."""
        assert self._precision is not None, "set by _check_config"
        return self._precision

    @property
    def profile(self) -> DataProfile:
        """The profile of this run."""
        assert self._profile is not None, "set by run_job"
        return self._profile

    @property
    def data(self) -> RunData:
        """The rows of this run."""
        assert self._data is not None, "set by _prepare_dataset"
        return self._data

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step) if self.trainer is not None else 0

    def phase(self, state: RunState, text: str) -> None:
        """Tell everybody what happens now."""
        self.observers.emit(PhaseChanged(state=state, text=text))

    def notice(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Tell everybody something they should know."""
        self.observers.emit(Notice(text=text, level=level))

    # ---- how it ended

    def ended(
        self, model_path: Path | None, final_evaluation: dict[str, Any] | None
    ) -> TrainingResult:
        """The result of a run that reached its end, or was asked by its control file to end."""
        is_over = self.callback is not None and self.callback.early_stopping.is_over
        is_early = is_over and self.trainer is not None and self.step < self.trainer.state.max_steps
        ended_by = "control" if self.stop.is_set else "early_stopping" if is_early else "steps"
        message = None
        if self.stop.is_set:
            message = f"by {self.stop.by} after step {self.step}; its model is saved"
            message += self._how_to_continue()
        return self._result(
            "stopped" if self.stop.is_set else "completed",
            {"final_evaluation": final_evaluation, "ended_by": ended_by},
            success=True,
            exit_code=EXIT_COMPLETED,
            model_path=model_path,
            error_message=message,
        )

    def _how_to_continue(self) -> str:
        if self.checkpoint is None or self.folder is None:
            return ""
        folder = shlex.quote(str(self.folder.path))
        return f"; continue with: trainer train --resume --output {folder}"

    def failed(self, error: BaseException) -> TrainingResult:
        """The result of a run that was stopped or went wrong; unknown errors keep a traceback."""
        more: dict[str, Any] = {"error_type": type(error).__name__, "ended_by": "error"}
        if isinstance(error, StoppedError):
            message = str(error) + self._how_to_continue()
            more["ended_by"] = self.stop.by
            return self._result("stopped", more, exit_code=error.exit_code, error_message=message)
        message = str(error) or type(error).__name__
        if isinstance(error, TrainerError):
            return self._result("failed", more, exit_code=error.exit_code, error_message=message)
        more["traceback"] = "".join(traceback.format_exception(error))
        logger.error("the run failed\n%s", more["traceback"])
        message = f"{type(error).__name__}: {message}"
        return self._result("failed", more, exit_code=EXIT_FAILED, error_message=message)

    def _result(
        self,
        state: Literal["completed", "stopped", "failed"],
        more: dict[str, Any],
        *,
        success: bool = False,
        **options: Any,
    ) -> TrainingResult:
        callback, trainer = self.callback, self.trainer
        return TrainingResult(
            state=state,
            success=success,
            output_dir=Path(self.config.output.output_dir),
            checkpoint_path=self.checkpoint or (self.resume.path if self.resume else None),
            global_step=self.step,
            train_loss=trainer.last_step.train_loss if trainer and trainer.last_step else None,
            val_loss=callback.last_val_loss if callback else None,
            summary={
                "durations_s": {key: round(value, 3) for key, value in self.durations_s.items()},
                "previews": self.scheduler.summary() if self.scheduler else None,
                "fp16_overflows": trainer.num_overflows if trainer is not None else 0,
                "stop_reason": callback.stop_reason if callback else None,
                **more,
            },
            **options,
        )


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0
