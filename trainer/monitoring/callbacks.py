"""LiveMonitorCallback: turns what HF's Trainer does into events, previews and evaluations.

It owns every cadence of MonitoringConfig and no training decision but two: early stopping, and
stopping when somebody asked for it. Observers (status files, terminal, trackers) only listen.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import torch
from transformers import TrainerCallback

from trainer.config.schema import MonitoringConfig
from trainer.monitoring.control import ControlFile
from trainer.monitoring.events import (
    TRAINING,
    EvaluationDone,
    Event,
    Notice,
    Observer,
    PhaseChanged,
    PreviewsDone,
    RowShown,
    RunEnded,
    RunState,
    StepDone,
)
from trainer.preview.base import PreviewResult
from trainer.preview.scheduler import PreviewScheduler

logger = logging.getLogger(__name__)

RATE_MEMORY = 0.98
"""Weight of the past in the smoothed step time from which the ETA is made."""


class Observers:
    """Sends each event to every observer; one that fails is reported and goes on being told.

    Previews made elsewhere arrive in a thread of their own: one event is told at a time.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Take the observers in the order in which they are told."""
        self._observers = list(observers)
        self._failed: set[int] = set()
        self._lock = threading.RLock()

    def add(self, observer: Observer) -> None:
        """Tell one more from now on."""
        self._observers.append(observer)

    def emit(self, event: Event) -> None:
        """Tell everybody; never raises."""
        with self._lock:
            self._tell(event)

    def phase(self, state: RunState, text: str) -> None:
        """Tell everybody what happens now."""
        self.emit(PhaseChanged(state=state, text=text))

    def notice(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Tell everybody something they should know."""
        self.emit(Notice(text=text, level=level))

    def _tell(self, event: Event) -> None:
        # At the end not even an interrupt in one of them keeps the others from hearing of it.
        caught = BaseException if isinstance(event, RunEnded) else Exception
        for observer in self._observers:
            try:
                observer.on_event(event)
            except caught as error:
                self._report(observer, f"failed on {type(event).__name__}", error)

    def close(self) -> None:
        """Close everybody; never raises."""
        for observer in self._observers:
            try:
                observer.close()
            except BaseException as error:
                self._report(observer, "could not be closed", error)

    def _report(self, observer: Observer, what: str, error: BaseException) -> None:
        """Say once per observer that it failed; a full disk needs no traceback."""
        if id(observer) in self._failed:
            return
        self._failed.add(id(observer))
        logger.error(
            "%s %s (%s); training goes on, its output may have gaps",
            type(observer).__name__,
            what,
            error,
            exc_info=not isinstance(error, OSError),
        )


@dataclass
class EarlyStopping:
    """Counts micro-evaluations without a lower loss; part of what a resume restores.

    The lowest loss is known without patience too: the checkpoint of its step is kept.
    """

    patience: int = 0
    min_delta: float = 0.0
    best_loss: float | None = None
    """The last one that was lower by `min_delta`: what patience is counted from."""
    best_step: int = 0
    num_without: int = 0
    lowest_loss: float | None = None
    lowest_step: int = 0
    """Whose checkpoint is kept; 0: none yet."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        given = ("patience", "min_delta")
        return {name: value for name, value in asdict(self).items() if name not in given}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; patience and min_delta stay those of the config."""
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.patience <= self.num_without

    def update(self, loss: float, step: int) -> bool:
        """Take a loss; True when it is time to stop."""
        if math.isfinite(loss) and (self.lowest_loss is None or loss < self.lowest_loss):
            self.lowest_loss, self.lowest_step = loss, step
        is_lower = self.best_loss is None or loss < self.best_loss - self.min_delta
        if is_lower and math.isfinite(loss):
            self.best_loss, self.best_step, self.num_without = loss, step, 0
        else:
            self.num_without += 1
        return self.is_over


@dataclass
class StepClock:
    """How long a step takes, pauses for previews, evaluation and checkpoints included."""

    began: float = 0.0
    num_steps: int = 0
    _sum: float = 0.0
    _weight: float = 0.0
    _trained_s: float = 0.0
    _pause_s: float = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Take a step of `seconds` that ended at `now`."""
        self.num_steps += 1
        self._sum = RATE_MEMORY * self._sum + seconds
        self._weight = RATE_MEMORY * self._weight + 1
        self._trained_s += seconds
        self._pause_s = max(0.0, now - self.began - self._trained_s)

    @property
    def seconds_per_step(self) -> float:
        """Recent steps, and the mean pause of a step so far."""
        return self._sum / self._weight + self._pause_s / self.num_steps


@dataclass(frozen=True)
class Asked:
    """What is wanted at the end of a step beside what the config says."""

    stop: bool
    by_signal: bool
    """The stop is a signal's: nothing is made but a checkpoint."""
    preview: bool
    save: bool


class LiveMonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Status, metrics, previews and micro-evaluation of a run, by MonitoringConfig."""

    def __init__(
        self,
        config: MonitoringConfig,
        *,
        observers: Observers,
        scheduler: PreviewScheduler | None = None,
        evaluate: Callable[[Any], Any] | None = None,
        early_stopping: EarlyStopping | None = None,
        checkpoint_interval: int = 0,
        is_stop_requested: Callable[[], bool] = lambda: False,
        request_stop: Callable[[], None] = lambda: None,
        control: ControlFile | None = None,
        row_of_step: Callable[[int], tuple[str, str]] | None = None,
    ) -> None:
        """Take what to do, each part optional.

        Args:
            evaluate: unwrapped model -> an object with loss, num_rows, num_trained_tokens.
            checkpoint_interval: steps between checkpoints; 0 = only at the end.
            is_stop_requested: asked once per step: whether a signal came.
            request_stop: told, on every process, when the control file asks to stop.
            control: the control file; the main process has it.
            row_of_step: step -> (prompt, golden answer) of one row of its batch.
        """
        self.config, self.observers, self.scheduler = config, observers, scheduler
        self.early_stopping = early_stopping or EarlyStopping()
        self.checkpoint_interval = checkpoint_interval
        self.trainer: Any = None
        self.last_val_loss: float | None = None
        self.stop_reason: str | None = None
        self._evaluate, self._row_of_step = evaluate, row_of_step
        self._is_stop_requested, self._request_stop = is_stop_requested, request_stop
        self.control_file = control
        self._step_started = 0.0
        self._clock = StepClock()

    # ---- called by HF's Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step 0: what the model says before it is trained."""
        if state.is_world_process_zero and state.global_step == 0:
            self._preview(0, is_last=False)
        self._step_started = self._clock.began = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step's clock starts behind the checkpoint, which is no training."""
        self._say_phase(TRAINING)
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step, then measure, preview, save or stop where that is due."""
        step, total = state.global_step, state.max_steps
        self._report(state)
        asked = self._asked_for(step, total)
        is_last = asked.stop or step >= total
        is_best = False
        if self._is_evaluation_due(step, is_last=is_last) and not asked.by_signal:
            is_over = self._agree(self._measure(step))
            is_last = is_last or is_over
            is_best = self._agree(self.early_stopping.lowest_step == step)
        if state.is_world_process_zero:
            # A signal leaves no time: the previews of the last weights are not made.
            self._preview(step, is_last=asked.preview or (is_last and not asked.by_signal))
            self._acknowledge(step)
        control.should_training_stop = control.should_training_stop or is_last
        is_nth = bool(self.checkpoint_interval) and step % self.checkpoint_interval == 0
        control.should_save = is_last or is_best or is_nth or asked.save
        if control.should_save:
            self._say_phase(f"writing the checkpoint of step {step}")
        self._step_started = time.perf_counter()

    # ---- parts

    def _report(self, state: Any) -> None:
        """Emit StepDone, and now and then a training row."""
        if not state.is_world_process_zero:
            return
        now = time.perf_counter()
        step, seconds = state.global_step, now - self._step_started
        record = self.trainer.last_step
        self._clock.add(seconds, now)
        self.observers.emit(
            StepDone(
                step=step,
                total_steps=state.max_steps,
                epoch=state.epoch,
                train_loss=record.train_loss,
                learning_rate=record.learning_rate,
                grad_norm=record.grad_norm,
                tokens_per_s=record.num_tokens / seconds if seconds > 0 else 0.0,
                num_tokens=record.num_tokens,
                num_trained_tokens=record.num_trained_tokens,
                step_time_s=seconds,
                eta_s=self._clock.seconds_per_step * (state.max_steps - step),
                memory_gib=memory_gib(),
            )
        )
        interval = self.config.prompt_snapshot_interval
        if self._row_of_step is not None and interval and step % interval == 0:
            prompt, golden = self._row_of_step(step)
            self.observers.emit(RowShown(step=step, prompt=prompt, golden_answer=golden))

    def _is_evaluation_due(self, step: int, *, is_last: bool) -> bool:
        interval = self.config.micro_eval_interval
        return bool(self._evaluate and interval) and (step % interval == 0 or is_last)

    def _measure(self, step: int) -> bool:
        """Micro-evaluation on the main process; True when early stopping says so."""
        if not self.trainer.is_world_process_zero():
            return False
        assert self._evaluate is not None, "no evaluation without held-out rows"
        started = time.perf_counter()
        self._say_phase(f"measuring the validation loss of step {step}")
        found = self._evaluate(self._unwrapped())
        self._say_phase(TRAINING)
        self.last_val_loss = found.loss
        self.observers.emit(
            EvaluationDone(
                step=step,
                val_loss=found.loss,
                train_loss=self.trainer.last_step.train_loss,
                num_rows=found.num_rows,
                num_trained_tokens=found.num_trained_tokens,
                duration_s=time.perf_counter() - started,
            )
        )
        if not self.early_stopping.update(found.loss, step):
            return False
        best = self.early_stopping
        self.stop_reason = (
            f"early stopping: no validation loss below {_shown(best.best_loss)} (step "
            f"{best.best_step}) in {best.num_without} evaluations; the checkpoint of the lowest "
            f"one (step {best.lowest_step}) is kept"
        )
        self.observers.emit(Notice(text=self.stop_reason))
        return True

    def _asked_for(self, step: int, total: int) -> Asked:
        """What a signal and the control file ask for: the same on all processes."""
        file = self.control_file
        commands = file.poll() if file is not None else frozenset()
        by_signal, by_file, preview, save = self._agree_on(
            self._is_stop_requested(),
            "stop" in commands and step < total,  # at the last step there is nothing to stop
            "preview" in commands,
            file is not None and file.is_save_asked(step),
        )
        if by_file:
            self._request_stop()
            self.stop_reason = f"the control file asked to stop after step {step}"
        if by_signal:
            self.stop_reason = "asked to stop"
        return Asked(by_signal or by_file, by_signal, preview, save)

    def _acknowledge(self, step: int) -> None:
        """Say what became of the control file's commands."""
        if self.control_file is None:
            return
        is_previewed = self.scheduler is not None and self.scheduler.is_asked(step)
        self.control_file.acknowledge(step, is_previewed=is_previewed)

    @property
    def protected_steps(self) -> set[int]:
        """Steps whose checkpoints are kept: of the lowest validation loss, and the marked one."""
        marked = self.control_file.marked_step if self.control_file is not None else 0
        return {self.early_stopping.lowest_step, marked} - {0}

    def _preview(self, step: int, *, is_last: bool) -> None:
        if self.scheduler is None:
            return
        self.scheduler.note_step(step)
        if not self.scheduler.is_due(step, is_last=is_last):
            return
        if not self.scheduler.is_waited_for:
            self.scheduler.ask(step, is_last=is_last)
            return
        count, limit = len(self.scheduler.requests), self.config.preview_max_tokens
        self._say_phase(f"making the previews of step {step} ({count} prompts, {limit} tokens)")
        self.scheduler.ask(step, is_last=is_last)
        self._say_phase(TRAINING)

    def _say_phase(self, text: str) -> None:
        """Say what keeps training from the next step, or that it goes on."""
        if self.trainer is None or self.trainer.is_world_process_zero():
            self.observers.emit(PhaseChanged(state="training", text=text, is_pause=True))

    def deliver_previews(self, step: int, results: list[PreviewResult], waited_s: float) -> None:
        """What the scheduler calls with finished previews."""
        self.observers.emit(PreviewsDone(step=step, results=tuple(results), duration_s=waited_s))

    def _unwrapped(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _agree(self, wants: bool) -> bool:
        """True when any process wants it, so that all of them stop at the same step."""
        return self._agree_on(wants)[0]

    def _agree_on(self, *wants: bool) -> list[bool]:
        """For each flag whether any process has it set; one exchange for all of them."""
        if self.trainer.accelerator.num_processes == 1:
            return list(wants)
        flags = torch.tensor([[float(one) for one in wants]])  # (1, N), (P, N) when gathered
        gathered = self.trainer.accelerator.gather(flags.to(self.trainer.accelerator.device))
        return [bool(one) for one in gathered.amax(dim=0) > 0]


def _shown(loss: float | None) -> str:
    return "infinity" if loss is None else f"{loss:.4f}"


def memory_gib() -> float:
    """Peak memory of the GPU that is used, or what the process holds now, in GiB."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
