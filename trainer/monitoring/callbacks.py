"""LiveMonitorCallback: what happens around the steps of HF's Trainer, in one order.

Each part does one thing and any of them may be absent: report the step, obey commands, measure the
loss on held-out rows, make previews, decide which steps get a checkpoint. Observers (status files,
terminal, trackers) only listen; two parts decide on training: early stopping, and a stop that
somebody asked for. Scores stop it too (`deciding.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from trainer.counts import counted
from trainer.monitoring.control import ControlFile
from trainer.monitoring.deciding import DecidingScores
from trainer.monitoring.events import (
    TRAINING,
    EvaluationDone,
    Observer,
    Observers,
)
from trainer.monitoring.processes import any_process, highest, wait_for_main
from trainer.monitoring.step_report import LoggedReport, StepReport
from trainer.preview.scheduler import PreviewScheduler

# ---- what is asked for while training runs


@dataclass(frozen=True)
class Asked:
    """What is wanted at the end of a step beside what the config says."""

    stop: bool = False
    by_signal: bool = False
    """The stop is a signal's: nothing is made but a checkpoint."""
    preview: bool = False
    save: bool = False


class Commands:
    """What a signal and the control file ask for: the same on all processes."""

    def __init__(
        self,
        file: ControlFile | None,
        *,
        signal_that_came: Callable[[], int],
        request_stop: Callable[[int], None],
    ) -> None:
        """Ask nobody yet.

        Args:
            file: the control file; the main process has it.
            signal_that_came: asked once per step: the number of one that asks to stop; 0: none.
            request_stop: told, on every process, to stop, by a signal of this number, which another
                process may have got; 0: the control file asks.
        """
        self.file = file
        self.stop_reason: str | None = None
        self._signal_that_came, self._request_stop = signal_that_came, request_stop

    def poll(self, step: int, total: int) -> Asked:
        """Look once at the end of a step."""
        file = self.file
        commands = file.poll() if file is not None else frozenset()
        number, by_file, preview, save = highest(
            self._signal_that_came(),
            "stop" in commands and step < total,  # at the last step there is nothing to stop
            "preview" in commands,
            file is not None and file.is_save_asked(step),
        )
        by_signal = number > 0
        if by_file:
            self._request_stop(0)
            self.stop_reason = f"the control file asked to stop after step {step}"
        if by_signal:
            self._request_stop(number)
            self.stop_reason = "asked to stop"
        return Asked(by_signal or bool(by_file), by_signal, bool(preview), bool(save))

    def acknowledge(self, step: int, *, is_previewed: bool) -> None:
        """Say what became of the control file's commands."""
        if self.file is not None:
            self.file.acknowledge(step, is_previewed=is_previewed)


# ---- the loss on held-out rows


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


class Measured(Protocol):
    """What an evaluation found."""

    @property
    def loss(self) -> float:
        """Mean nats per trained token."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that were measured."""
        ...

    @property
    def num_trained_tokens(self) -> int:
        """Tokens whose loss was taken."""
        ...

    @property
    def source_losses(self) -> Mapping[str, float]:
        """The same mean of the rows of each source, where there are several."""
        ...


class MicroEvaluation:
    """Measures the loss on held-out rows on the main process, and stops early by it."""

    def __init__(
        self,
        evaluate: Callable[[Any], Measured] | None,
        observers: Observers,
        *,
        interval: int,
        stopping: EarlyStopping | None = None,
        is_shared: bool = False,
    ) -> None:
        """Measure nothing yet.

        Args:
            evaluate: unwrapped model -> what it found; None: nothing is held out.
            interval: steps between evaluations; 0 = none.
            is_shared: all processes measure together, each its share of the rows.
        """
        self.is_shared = is_shared
        self.stopping = stopping or EarlyStopping()
        self.last_loss: float | None = None
        self.stop_reason: str | None = None
        self._evaluate, self._observers, self._interval = evaluate, observers, interval

    def use(self, evaluate: Callable[[Any], Measured] | None) -> None:
        """Measure by another function from here on."""
        self._evaluate = evaluate

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether `step` is measured: every `interval` steps, and the last one."""
        is_on = bool(self._evaluate and self._interval)
        return is_on and (step % self._interval == 0 or is_last)

    def measure(self, model: Any, step: int, train_loss: float | None) -> bool:
        """Measure and tell; True when early stopping says that it is time to stop."""
        assert self._evaluate is not None, "no evaluation without held-out rows"
        started = time.perf_counter()
        self._observers.pause(f"measuring the validation loss of step {step}")
        found = self._evaluate(model)
        self._observers.pause(TRAINING)
        self.last_loss = found.loss
        self._observers.emit(
            EvaluationDone(
                step=step,
                val_loss=found.loss,
                train_loss=train_loss,
                num_rows=found.num_rows,
                num_trained_tokens=found.num_trained_tokens,
                duration_s=time.perf_counter() - started,
                source_losses=found.source_losses,
            )
        )
        if not self.stopping.update(found.loss, step):
            return False
        best = self.stopping
        lowest = "infinity" if best.best_loss is None else f"{best.best_loss:.4f}"
        self.stop_reason = (
            f"early stopping: no validation loss below {lowest} (step {best.best_step}) in "
            f"{counted(best.num_without, 'evaluation')}; the checkpoint of the lowest one (step "
            f"{best.lowest_step}) is kept"
        )
        self._observers.notice(self.stop_reason)
        return True


# ---- previews


class Previews:
    """Has previews made at the steps where they are due, and says when training waits for them.

    The main process has it, and the others where they have a part in the copies of the weights.
    """

    def __init__(
        self, scheduler: PreviewScheduler, observers: Observers, *, max_tokens: int
    ) -> None:
        """Take who decides when, and the longest answer in tokens, which is only told."""
        self.scheduler, self._observers, self._max_tokens = scheduler, observers, max_tokens

    def make(self, step: int, *, is_last: bool, is_wanted: bool = False) -> None:
        """Make, or have made, those of `step` if they are due, or somebody asked for them."""
        self.scheduler.note_step(step)
        if not self.scheduler.is_due(step, is_last=is_last or is_wanted):
            return
        if not self.scheduler.is_waited_for:
            self.scheduler.ask(step, is_last=is_last, is_wanted=is_wanted)
            return
        count = self.scheduler.num_prompts(step, is_last=is_last)
        self._observers.pause(
            f"making the previews of step {step} ({counted(count, 'prompt')}, "
            f"{counted(self._max_tokens, 'token')})"
        )
        self.scheduler.ask(step, is_last=is_last, is_wanted=is_wanted)
        self._observers.pause(TRAINING)


# ---- all of it, in HF's Trainer


class LiveMonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Status, metrics, previews and micro-evaluation around the steps of an HF Trainer.

    In any Trainer, `LiveMonitorCallback([TrainingStatusWriter(None, run_dir=folder)])` is enough
    for `trainer watch`, `trainer monitor` and `trainer report` to show the run.
    """

    def __init__(
        self,
        observers: Observers | Sequence[Observer],
        *,
        report: StepReport | None = None,
        commands: Commands | None = None,
        evaluation: MicroEvaluation | None = None,
        previews: Previews | None = None,
        deciding: DecidingScores | None = None,
        checkpoint_interval: int | None = None,
    ) -> None:
        """Take what to do; what is None is not done.

        Args:
            observers: told of everything.
            report: what is told of a step; None: what HF's log says.
            deciding: the scores that choose the best step or stop the run.
            checkpoint_interval: steps between checkpoints; 0 = only at the end, where a command
                asks, and at the lowest loss; None: HF's own arguments decide.
        """
        self.observers = observers if isinstance(observers, Observers) else Observers(observers)
        self.report = report or LoggedReport(self.observers)
        self.commands, self.evaluation, self.previews = commands, evaluation, previews
        self.deciding = deciding
        self.checkpoint_interval = checkpoint_interval
        self.callback_stop: str | None = None
        """That a callback of the user has stopped the run, in words."""
        self._step_started = 0.0

    @property
    def stop_reason(self) -> str | None:
        """Why training ended before its last step; None where it did not."""
        parts = (self.commands, self.evaluation, self.deciding)
        reasons = [part.stop_reason for part in parts if part]
        return next((reason for reason in reasons if reason), self.callback_stop)

    @property
    def protected_steps(self) -> set[int]:
        """Steps whose checkpoints are kept: the best one, what may be it, and the marked one."""
        file, deciding = self.commands.file if self.commands is not None else None, self.deciding
        kept = {file.marked_step if file is not None else 0}
        if deciding is not None:
            kept |= deciding.protected_steps
        if self.evaluation is not None and (deciding is None or deciding.best_rule is None):
            kept.add(self.evaluation.stopping.lowest_step)
        return kept - {0}

    @property
    def is_over(self) -> bool:
        """Whether early stopping, by loss or score, says that it is time to stop."""
        evaluation, deciding = self.evaluation, self.deciding
        by_score = deciding is not None and deciding.is_over
        return by_score or (evaluation is not None and evaluation.stopping.is_over)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step 0: what the model says before it is trained."""
        if state.is_world_process_zero:
            self.report.begin(args, state, kwargs)
        if state.global_step == 0:
            if self.previews is not None:
                self.previews.make(0, is_last=False)
            if self._is_evaluated(0, is_last=False):
                self._decide(0, state.max_steps, state.is_world_process_zero)
        wait_for_main()
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step, then measure, preview, save or stop where that is due."""
        step, total, is_main = state.global_step, state.max_steps, state.is_world_process_zero
        if is_main:
            self.report.step_ended(state, time.perf_counter() - self._step_started)
        asked = self.commands.poll(step, total) if self.commands is not None else Asked()
        if control.should_training_stop and step < total:
            self.callback_stop = f"a callback asked to stop after step {step}"
        is_last = asked.stop or step >= total or control.should_training_stop
        is_best = False
        if self.evaluation is not None and not asked.by_signal:
            is_over, is_best = self._measure(kwargs.get("model"), step, is_main, is_last=is_last)
            is_last = is_last or is_over
        is_evaluated = self._is_evaluated(step, is_last=is_last) and not asked.by_signal
        if is_evaluated and is_main and self.deciding is not None:
            self.deciding.make_room(step)
        if self.previews is not None:
            # A signal leaves no time: the previews of the last weights are not made.
            is_end = is_last and not asked.by_signal
            self.previews.make(step, is_last=is_end, is_wanted=asked.preview)
        if is_main and self.commands is not None:
            scheduler = self.previews.scheduler if self.previews is not None else None
            is_previewed = scheduler is not None and scheduler.is_asked(step)
            self.commands.acknowledge(step, is_previewed=is_previewed)
        if is_evaluated:
            is_last = self._decide(step, total, is_main) or is_last
        wait_for_main()
        control.should_training_stop = control.should_training_stop or is_last
        if self.checkpoint_interval is not None:
            is_nth = bool(self.checkpoint_interval) and step % self.checkpoint_interval == 0
            # Any step that is evaluated may be the best one, once its score is there.
            control.should_save = is_last or is_best or is_nth or asked.save or is_evaluated
        if control.should_save and is_main:
            if self.deciding is not None and 0 in self.deciding.pending:
                self.deciding.wait_for(0)  # a resume could not ask the weights before training
            self.observers.pause(f"writing the checkpoint of step {step}")
        self._step_started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """HF's figures, for a report made of them."""
        if state.is_world_process_zero:
            self.report.logged(state, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step's clock starts behind the checkpoint, which is no training."""
        if state.is_world_process_zero:
            self.report.saved(args, state, time.perf_counter() - self._step_started)
            self.observers.pause(TRAINING)
        self._step_started = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind HF's own evaluation, too."""
        self._step_started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """HF's loop is over."""
        if state.is_world_process_zero:
            self.report.ended(state)

    def _measure(self, model: Any, step: int, is_main: bool, *, is_last: bool) -> tuple[bool, bool]:
        """(whether to stop, whether this step has the lowest loss), alike on all processes."""
        evaluation = self.evaluation
        assert evaluation is not None, "asked for"
        if not evaluation.is_due(step, is_last=is_last):
            return False, False
        is_over = False
        if is_main or evaluation.is_shared:
            record = self.report.record
            train_loss = record.train_loss if record is not None else None
            is_over = evaluation.measure(extract_model_from_parallel(model), step, train_loss)
        wait_for_main()
        is_over, is_best = any_process(is_over, evaluation.stopping.lowest_step == step)
        return is_over, is_best

    def _is_evaluated(self, step: int, *, is_last: bool) -> bool:
        """Whether a score decides by an evaluation of `step`."""
        return self.deciding is not None and self.deciding.is_due(step, is_last=is_last)

    def _decide(self, step: int, total: int, is_main: bool) -> bool:
        """Take the evaluation whose turn it is; whether to stop, alike on all processes."""
        deciding = self.deciding
        assert deciding is not None, "asked for"
        deciding.note_asked(step)
        is_over = is_ready = False
        if is_main:
            is_ready = deciding.catch_up(step)
            is_over = deciding.is_over and step < total
        wait_for_main()
        is_over, is_ready = any_process(is_over, is_ready)
        if not is_ready and self.commands is not None:
            # A signal came while the score was waited for: here, as nothing was decided yet.
            return self.commands.poll(step, total).stop
        if is_over and is_main:
            deciding.stop(step)
        return is_over
