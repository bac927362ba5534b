"""One run: what it is prepared with, what it owns and closes again, and the result it ends in."""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data._utils import signal_handling
from transformers.utils import logging as transformers_logging

from trainer.config.schema import TrainerConfig
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.resume import SEMANTICS, ResumePoint, environment_manifest
from trainer.core.run_folder import RunFolder, resolved_config
from trainer.data.card import card_lines
from trainer.data.dataset import RunData
from trainer.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_USER_INPUT,
    ConfigError,
    RankError,
    StoppedError,
    TrainerError,
)
from trainer.models.attention import AttentionPlan
from trainer.models.devices import DETERMINISTIC_VARIABLES
from trainer.models.precision import ResolvedPrecision
from trainer.monitoring.beats import TO_CONTINUE
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback
from trainer.monitoring.events import Observer, Observers, RunEnded
from trainer.monitoring.ranks import RankWatch
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.net import hub_setting
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
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures and counts: previews, final evaluation, times; `ended_by`: steps, early_stopping,
    control, a signal's name such as SIGINT, given_up, or error; `error_type` after a failure.
    `previews` holds `asked`, `done`, `failed`, `verified` and more; its `all_failed` is true where
    the run has not shown a single answer, whatever `success` says."""


# ---- Ctrl-C, SIGTERM, SIGHUP: the first asks for a stop at the end of the step, a second aborts
#
# The control file asks for a stop too, but of another kind: the run then ends as if it were done.


EXIT_CODES = {
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGTERM: EXIT_SIGTERM,
    signal.SIGHUP: EXIT_SIGHUP,  # the terminal or the connection is gone
}


class StopRequest:
    """Whether somebody asked this process to stop, and whether a signal may abort what is done.

    A signal raises at most once, and only between `work` and the end of its block: closing a run
    is never cut short, however often somebody presses Ctrl-C.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.asked_by: str | None = None
        """Who asked without a signal, in words."""
        self.is_fault = False
        """Another process of the run has failed: nothing is waited for."""
        self.can_wait = False
        """True while training: the stop then waits for the end of the step."""
        self._may_abort = False

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

    def agree(self, number: int) -> None:
        """Stop as all processes of the run do, by a signal; 0: because the control file asks."""
        if number:
            self.signal = self.signal or signal.Signals(number)
        else:
            self.ask("the control file")

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP; 0 without a signal."""
        return EXIT_CODES[self.signal] if self.signal is not None else EXIT_COMPLETED

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """The part of a run that a signal may abort.

        Raises:
            StoppedError: out of whatever is done in the block; also at its start, for a signal
                that came before.
        """
        self._may_abort = True
        try:
            if self.is_signalled:
                self._abort()
            yield
        finally:
            self._may_abort = False

    def settle(self) -> None:
        """The work is done and its result stands: signals that come now are too late to abort."""
        self._may_abort = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first signal, abort at the second or outside a step."""
        if self.is_fault:
            if self._may_abort:
                self._abort()
            return
        is_second = self.is_signalled
        self.signal = self.signal or signal.Signals(number)
        if self._may_abort and (is_second or not self.can_wait):
            self._abort()

    def _abort(self) -> None:
        self._may_abort = False
        raise StoppedError(f"by {self.by}", exit_code=self.exit_code)


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
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: not Python's to give back
    }
    child_handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        _set_child_handler(child_handler)
        _give_back(before)


def _give_back(handlers: dict[signal.Signals, Any]) -> None:
    """Set each; one that is back may raise at once, and the run is over without its help."""
    left = dict(handlers)
    while left:
        with contextlib.suppress(BaseException):
            for number in list(left):
                signal.signal(number, left[number])
                del left[number]


def ignore_dead_workers() -> None:
    """Take away torch's handler of SIGCHLD, for a run that is over.

    Where a DataLoader worker was killed it raises again for every child that ends, out of whatever
    is being done: writing how the run ended, for instance.
    """
    if threading.current_thread() is threading.main_thread():
        _set_child_handler(signal.SIG_DFL)


def _set_child_handler(handler: Any) -> None:
    """Set the handler of SIGCHLD, and let the next DataLoader with workers set torch's again."""
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
        # Private, but torch sets its handler once in the life of a process.
        signal_handling._SIGCHLD_handler_set = False


VARIABLES = ("ACCELERATE_", "FSDP_", "PYTORCH_ENABLE_MPS_FALLBACK", *DETERMINISTIC_VARIABLES)
"""How the variables are called that this program, transformers and accelerate set for a run."""


def process_settings() -> Callable[[], None]:
    """A function that puts back what a run sets in its process, as it is now.

    Environment variables, threads, deterministic algorithms, transformers' progress bars and log
    level, the hub's switch.
    Random states stay where the seeds of a run have brought them.
    """
    put_hub_back = hub_setting()
    environment, num_threads = _variables(), torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_tries = torch.backends.cudnn.benchmark
    had_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()

    def put_back() -> None:
        put_hub_back()
        for name in _variables().keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cudnn.benchmark = cudnn_tries
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()

    return put_back


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


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
        self.trainer: SupervisedTrainer | None = None
        """HF's Trainer, once it is made."""
        self.blocks: CompiledBlocks | None = None
        """The compiled layers of the model; None where `hyperparams.compile` is off."""
        self.result: TrainingResult | None = None
        self.ranks: RankWatch | None = None
        """Tells what the other processes of the run do; None where there are none."""
        self.ending = threading.Lock()
        """Held by the thread that ends the run: the main one, unless it hangs in an exchange."""
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
        is_over = self.stopping is not None and self.stopping.is_over
        is_early = is_over and self.trainer is not None and self.step < self.trainer.state.max_steps
        who = self.stop.asked_by  # a signal that comes by now is too late
        ended_by = "control" if who else "early_stopping" if is_early else "steps"
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
        folder = shlex.quote(str(self.folder.path))
        return f"; continue with: trainer train --resume --output {folder}"

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
            return self._result("failed", more, exit_code=error.exit_code, error_message=message)
        more["traceback"] = "".join(traceback.format_exception(error))
        logger.error("the run failed\n%s", more["traceback"])
        message = f"{type(error).__name__}: {message}"
        return self._result("failed", more, exit_code=EXIT_FAILED, error_message=message)

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
