"""What a run tells its observers (status file, terminal, trackers): plain frozen values.

An observer has one method, `on_event(event)`, and may have two more. No torch and no file access
here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from trainer.preview.base import PreviewResult
from trainer.scores.figures import ScoreFigure

logger = logging.getLogger(__name__)


def plain_values(value: Any, odd: dict[str, str] | None = None, where: str = "") -> Any:
    """Make a value of dicts, lists, strings, finite numbers, booleans and None.

    Args:
        value: an event, a pydantic object, or what they hold; unknown objects become their str().
        odd: takes the place and text of each number that JSON cannot hold; it becomes None.
        where: place of `value`, such as `summary.train_loss`.
    """
    odd = {} if odd is None else odd
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        odd[where] = str(float(value))
        return None
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, BaseModel):
        # As pydantic's own dumps: a field says where it is left out.
        value = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if field.exclude_if is None or not field.exclude_if(getattr(value, name))
        }
    elif is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {
            encodable(str(key)): plain_values(item, odd, f"{where}.{key}" if where else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(item, odd, f"{where}[{i}]") for i, item in enumerate(value)]
    return encodable(str(value))


def encodable(text: str) -> str:
    """The text with lone surrogates (odd file names, broken input) as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON in ASCII, with its line feed."""
    return json.dumps(values, allow_nan=False) + "\n"


# ---- what a run tells its observers (status file, terminal, trackers): plain frozen values


TRAINING = "training"
"""The phase in which steps are made; every other one says in words what keeps it from a step."""

RunState = Literal["loading", "training", "saving", "completed", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The first optimizer step is about to be made."""

    model_name: str
    total_steps: int
    start_step: int
    """Above 0 after a resume."""
    num_epochs: float
    """Passes over the training rows that `total_steps` make."""
    num_train_rows: int
    num_validation_rows: int
    context_window: int
    effective_batch_size: int
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class PhaseChanged:
    """A named stretch of work begins: loading, encoding, training, saving ..."""

    state: RunState
    text: str
    """In words, such as `loading Qwen/Qwen3-0.6B`."""
    is_pause: bool = False
    """Between two steps, as previews and evaluations are, or the end of such a pause."""
    progress: str = ""
    """How far it is. Where this is given, the phase goes on and only that is new; told at most once
    a second."""


@dataclass(frozen=True, kw_only=True)
class CardShown:
    """A card of labelled lines, such as the data card before step 1."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(label, value) pairs."""
    sample: tuple[tuple[str, bool], ...] = ()
    """One row as (text, is trained) stretches."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step was made."""

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    """Mean nats per trained token over the whole step."""
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    """Real tokens (padding excluded) per second of training, previews and evaluation excluded."""
    num_tokens: int
    num_trained_tokens: int
    step_time_s: float
    eta_s: float
    """Until the last step, at the pace of the steps and pauses so far."""
    memory_gib: float
    """Peak device memory, or the resident memory of the process on CPU."""
    source_losses: Mapping[str, float] = field(default_factory=dict)
    """train_loss of the tokens of each source of the step, where rows are of several."""


@dataclass(frozen=True, kw_only=True)
class EvaluationDone:
    """The loss on held-out rows was measured."""

    step: int
    val_loss: float
    """Mean nats per trained token."""
    train_loss: float | None
    num_rows: int
    num_trained_tokens: int
    duration_s: float
    source_losses: Mapping[str, float] = field(default_factory=dict)
    """val_loss of the rows of each source, where they are of several."""


@dataclass(frozen=True, kw_only=True)
class PreviewsDone:
    """Prompts were answered with the weights of `step`."""

    step: int
    results: tuple[PreviewResult, ...]
    duration_s: float
    """Seconds that training waited for them."""

    @property
    def common_error(self) -> str | None:
        """Why nothing was answered, where all prompts have the same reason."""
        reasons = {result.error_message for result in self.results}
        return reasons.pop() if len(reasons) == 1 else None

    @property
    def is_superseded(self) -> bool:
        """Whether a newer step took this one's place: there is nothing to show."""
        return all(result.is_superseded for result in self.results)


@dataclass(frozen=True, kw_only=True)
class DriftMeasured:
    """How far the weights of `step` are from those before training, on general prompts."""

    step: int
    kl: float
    """KL(base || now) of the next token along the base model's own answers: nats per token, the
    mean over the prompts."""
    num_changed: int
    """Prompts whose greedy answer is another one than before training."""
    num_prompts: int
    worst_prompt: str
    """The prompt whose answer drifted most."""
    worst_kl: float
    duration_s: float
    """What measuring took, where the weights are."""


@dataclass(frozen=True, kw_only=True)
class ScoresDone:
    """Answers by the weights of `step` were scored: means over the prompts."""

    step: int
    source: Literal["previews", "evaluation"]
    """The few prompts that people read, or those of `monitoring.num_score_prompts`."""
    figures: tuple[ScoreFigure, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreDecided:
    """An evaluation was taken by the rule that chooses the best step, or stops the run."""

    step: int
    """The step training was at when it was taken."""
    evaluation_step: int
    """The step whose weights answered."""
    metric: str
    """Such as `score.exact`."""
    mean: float | None
    """Mean over the prompts; None: the evaluation is missing and decides nothing."""
    is_best: bool
    """Whether it is clearly above the best one before."""
    best_step: int
    """The best step whose weights are kept; 0: none yet."""
    reference_step: int | None
    """The step that later ones must rise above; None: nothing was taken."""
    num_without: int
    """Evaluations since that step."""
    patience: int
    """Evaluations without a clear rise after which the run stops; 0: it does not."""
    missing: str | None
    """Why the evaluation decides nothing, in words."""
    num_missing: int
    """Such evaluations so far."""
    waited_s: float
    """Seconds that training has waited for scores so far."""


@dataclass(frozen=True, kw_only=True)
class RowShown:
    """A copy of one row of the batch just trained, without generation."""

    step: int
    prompt: str
    golden_answer: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint was written and verified."""

    step: int
    path: str
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know: a warning, a choice made, a thing not done."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """The run is over; the last event."""

    state: RunState
    step: int
    error_type: str | None = None
    error_message: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)


Event = (
    RunStarted
    | PhaseChanged
    | CardShown
    | StepDone
    | EvaluationDone
    | PreviewsDone
    | DriftMeasured
    | ScoresDone
    | ScoreDecided
    | RowShown
    | CheckpointSaved
    | Notice
    | RunEnded
)


class Observer(Protocol):
    """Receives every event in order, in the training process; must be quick.

    A method `close()` is called too where there is one, after the last event; maybe twice. So is
    `on_wait(text)`, when a phase such as loading goes on and nothing was told for two seconds or
    more: with the phase and its seconds.
    """

    def on_event(self, event: Event) -> None:
        """Take note of one event; an exception is logged and does not stop training."""
        ...


class ClosingObserver(Observer, Protocol):
    """An observer that holds something."""

    def close(self) -> None:
        """Flush and let go; may be called twice."""
        ...


class Observers:
    """Sends each event to every observer; one that fails is reported and goes on being told.

    Previews made elsewhere arrive in a thread of their own: one event is told at a time.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Take the observers in the order in which they are told."""
        self._observers = list(observers)
        self._failed: set[int] = set()
        self._lock = threading.RLock()
        self._waits = Waits(self._tell_wait)

    def add(self, observer: Observer) -> None:
        """Tell one more from now on."""
        self._observers.append(observer)

    def emit(self, event: Event) -> None:
        """Tell everybody; never raises."""
        with self._lock:
            self._waits.note(event)
            self._tell(event)
        if isinstance(event, PhaseChanged) and any(hasattr(o, "on_wait") for o in self._observers):
            self._waits.start()

    def phase(self, state: RunState, text: str, progress: str = "") -> None:
        """Tell everybody what happens now, or how far it is."""
        self.emit(PhaseChanged(state=state, text=text, progress=progress))

    def pause(self, text: str) -> None:
        """Tell everybody what keeps training from the next step, or that it goes on."""
        self.emit(PhaseChanged(state="training", text=text, is_pause=True))

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

    def _tell_wait(self, text: str) -> None:
        with self._lock:
            for observer in self._observers:
                try:
                    getattr(observer, "on_wait", _nothing)(text)
                except Exception as error:
                    self._report(observer, "failed on a wait", error)

    def close(self) -> None:
        """Close everybody; never raises."""
        self._waits.stop()
        for observer in self._observers:
            try:
                getattr(observer, "close", _nothing)()
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


def _nothing(*_: object) -> None: ...


class Waits:
    """Says again what is being done, while nothing else is told: within 2 s, and ever more rarely.

    A thread of its own, because what is waited for holds the one that trains.
    """

    FIRST_S = 1.5
    SHARE = 0.1
    """Later words come when a tenth of the time so far has passed."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        """Take who tells of a wait."""
        self._tell, self._clock = tell, clock
        self._phase: PhaseChanged | None = None
        self._began = self._told_at = clock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, event: Event) -> None:
        """Something was told: a new phase, the end of one, or anything else."""
        if isinstance(event, PhaseChanged) and event.progress and self._phase is not None:
            self._phase = event  # told with the next words of the wait
            return
        self._told_at = self._clock()
        if isinstance(event, PhaseChanged):
            self._began = self._told_at
            self._phase = None if event.text == TRAINING else event
        elif isinstance(event, StepDone | RunStarted | RunEnded):
            self._phase = None

    def words(self) -> str | None:
        """What is to be told now."""
        now, phase = self._clock(), self._phase
        elapsed = now - self._began
        if phase is None or now - self._told_at < max(self.FIRST_S, self.SHARE * elapsed):
            return None
        self._told_at = now
        if phase.progress:
            return f"{phase.text}, {elapsed:.0f} s: {phase.progress}"
        return f"{phase.text}: {elapsed:.0f} s"

    def start(self) -> None:
        """Begin to look, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="waits", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        self._tell = _nothing  # who tells holds this

    @classmethod
    @contextlib.contextmanager
    def of(cls, text: str, tell: Callable[[str], None]) -> Iterator[None]:
        """Tell of what is done in the block, which has no observers yet."""
        waits = cls(tell)
        tell(text)
        waits.note(PhaseChanged(state="loading", text=text))
        waits.start()
        try:
            yield
        finally:
            waits.stop()

    def _run(self) -> None:
        while not self._over.wait(self.FIRST_S / 8):
            words = self.words()
            if words is not None:
                self._tell(words)


ELISION = " ... "

_NAMES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Format characters that stay: Persian and Indian words, and many emoji, are written with them."""


def printable(text: str, limit: int) -> str:
    r"""Text of unknown origin on one line that cannot drive a terminal or forge a line.

    Control characters, escape sequences, line separators and invisible format characters
    (text direction among them) become escapes such as \n and \x1b.

    Args:
        limit: longest result in characters; the middle goes first, as answers end with what counts.
    """
    tail = max(0, limit - len(ELISION)) // 3
    head = max(0, limit - len(ELISION)) - tail
    if len(text) > limit + 1:  # do not escape what is not shown; keep it too long, so it is cut
        text = text[: limit + 1] if tail == 0 else text[: head + 1] + ELISION + text[-tail:]
    shown = "".join(_shown(char) for char in text)
    if len(shown) <= limit:
        return shown
    if tail == 0:
        return shown[: max(0, limit)]
    return shown[:head] + ELISION + shown[-tail:]


def _shown(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    category = unicodedata.category(char)
    if char == " " or category in ("Zs", "Co", "Cn"):  # unassigned: new emoji
        return char
    return _NAMES.get(char) or char.encode("unicode_escape", "surrogatepass").decode("ascii")
