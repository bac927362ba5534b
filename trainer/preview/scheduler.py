"""When previews are made and by whom: always the same prompts, at fixed steps.

A lane is a way of getting answers: in the training thread (`local`), in one background thread (any
other PreviewBackend), or elsewhere with published weights (`trainer.publish.lane`). Lanes tell
what became of every step that was asked for; nothing is dropped in silence.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult

logger = logging.getLogger(__name__)

Deliver = Callable[[int, list[PreviewResult], float], None]

WAIT_S = 0.25


@dataclass(frozen=True)
class Finished:
    """What became of one step: answers, or one error per prompt."""

    step: int
    results: list[PreviewResult]
    waited_s: float = 0.0
    """Seconds that training waited for it."""
    is_superseded: bool = False
    """A newer step took its place before it was answered."""


OnFinished = Callable[[Finished], None]


class Lane(Protocol):
    """A way of getting answers."""

    def start(self, on_finished: OnFinished) -> None:
        """Begin; `on_finished` may be called from any thread, once per step that was asked."""
        ...

    def ask(self, step: int, *, is_kept: bool) -> None:
        """Answer with the weights as they are now; kept steps are not superseded."""
        ...

    def pending(self) -> list[int]:
        """Steps that `on_finished` has not been called for."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait until something may have changed; called by the training thread at the end."""
        ...

    def settle(self) -> None:
        """No step is asked for any more, and none is waited for."""
        ...

    def give_up(self, reason: str) -> None:
        """Finish what is pending with this error."""
        ...

    def summary(self) -> dict[str, Any]:
        """Figures of its own for the run's summary."""
        ...

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        ...


class Stall:
    """For how long a preview kept the training thread, or the GPU, from the next step.

    What is asked of a GPU runs when its turn comes, so that the thread is done before it: there
    the time between two events on the stream of training counts. A copy of the weights has a
    stream of its own, and what `optimizer.step()` waits for the end of it is not in here.
    """

    def __init__(self, *, is_on_gpu: bool) -> None:
        """It begins now, or when the GPU comes to this place."""
        self._began, self._ended = time.perf_counter(), 0.0
        self._events: tuple[Any, Any] | None = None
        if is_on_gpu:
            self._events = (
                torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
                torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
            )
            self._events[0].record()

    def end(self) -> None:
        """It ends now, or when the GPU comes to this place."""
        self._ended = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """How long it was; waits for the GPU, so that it is for the end of a run."""
        if self._events is None:
            return self._ended - self._began
        begin, end = self._events
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


@dataclass
class PreviewCounters:
    """Counts of a run's previews, in prompts, and what they cost."""

    asked: int = 0
    done: int = 0
    failed: int = 0
    superseded: int = 0
    matched: int = 0
    verified: int = 0
    newest: tuple[int, int, int] = (-1, 0, 0)
    """Newest step that was answered or failed, its prompts, and how many of them failed."""
    last_error: str | None = None
    """Why the newest prompt without an answer has none."""
    stalls: list[Stall] = field(default_factory=list)
    """How long training stood still, one per preview step."""
    visible_s: list[float] = field(default_factory=list)
    """Seconds from step to visible answer, one value per answered step."""

    def note(self, finished: Finished) -> None:
        """Count what became of a step."""
        results = finished.results
        if finished.is_superseded:
            self.superseded += len(results)
            return
        errors = [result.error_message for result in results if not result.ok]
        self.failed += len(errors)
        self.last_error = errors[-1] if errors else self.last_error
        self.newest = max(self.newest, (finished.step, len(results), len(errors)))
        self.done += sum(result.ok for result in results)
        self.matched += sum(result.matches is True for result in results)
        self.verified += sum(result.weights == "verified" for result in results)
        seen = [one.visible_s for one in results if one.ok and one.visible_s is not None]
        self.visible_s += seen[:1]

    def summary(self) -> dict[str, Any]:
        """Counts, stall and latency figures as JSON values."""
        _, num_newest, num_failed = self.newest
        stalls_s = [one.seconds() for one in self.stalls]
        return {
            "asked": self.asked,
            "done": self.done,
            "failed": self.failed,
            "superseded": self.superseded,
            "matched": self.matched,
            "verified": self.verified,
            "all_failed": self.failed > 0 and self.done == 0,
            "last_step_failed": num_newest > 0 and num_failed == num_newest,
            "last_error": self.last_error,
            "stall_ms_median": _milliseconds(stalls_s, 0.5),
            "stall_ms_p99": _milliseconds(stalls_s, 0.99),
            "stall_s_total": round(sum(stalls_s), 3),
            "visible_s_median": round(statistics.median(self.visible_s), 3)
            if self.visible_s
            else None,
        }


def _milliseconds(values: list[float], share: float) -> float | None:
    if not values:
        return None
    if share == 0.5:
        return round(1000 * statistics.median(values), 3)
    return round(1000 * sorted(values)[math.ceil(share * len(values)) - 1], 3)


class PreviewScheduler:
    """Asks a lane for the same prompts every `interval` steps."""

    def __init__(
        self,
        backend: PreviewBackend | Lane,
        requests: list[PreviewRequest],
        *,
        interval: int,
        deliver: Deliver,
        is_on_gpu: bool = False,
    ) -> None:
        """Take the prompts once; they stay the same for the whole run.

        Args:
            interval: steps between previews; 0 = none at all.
            deliver: called with step, results and the seconds training waited, whenever there is
                something new; by another thread than the training one, unless the backend is
                local.
            is_on_gpu: training is, on the current device.
        """
        self.backend, self.requests, self.interval = backend, requests, interval
        self.counters = PreviewCounters()
        self._deliver, self._is_on_gpu = deliver, is_on_gpu
        self._lock = threading.Lock()
        self._last_asked: int | None = None
        self._now = 0
        self.lane: Lane
        if isinstance(backend, PreviewBackend):
            is_local = backend.backend_type == "local"
            self.lane = (InlineLane if is_local else ThreadLane)(backend, requests)
        else:
            self.lane = backend
        self.lane.start(self._finished)

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether `step` has a preview: step 0, every `interval` steps, and the last one."""
        if not self.interval or not self.requests or step == self._last_asked:
            return False
        return is_last or step % self.interval == 0

    @property
    def is_waited_for(self) -> bool:
        """Whether training stands still until the answers are there."""
        return isinstance(self.lane, InlineLane)

    def is_asked(self, step: int) -> bool:
        """Whether the newest preview asked for is that of `step`."""
        return step == self._last_asked

    def ask(self, step: int, *, is_last: bool = False) -> None:
        """Make, or start, the preview of `step` with the weights as they are now."""
        self._last_asked = self._now = step
        with self._lock:
            self.counters.asked += len(self.requests)
        stall = Stall(is_on_gpu=self._is_on_gpu)
        # Not under the lock: lanes call `_finished` from threads of their own.
        self.lane.ask(step, is_kept=is_last or step == 0)
        stall.end()
        with self._lock:
            self.counters.stalls.append(stall)

    def note_step(self, step: int) -> None:
        """Where training is now: an answer that arrives is so many steps behind."""
        self._now = step

    def drain(self, timeout_s: float, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for what is under way, no longer than `timeout_s`; the rest counts as failed."""
        deadline = time.monotonic() + timeout_s
        while self.lane.pending():
            if should_stop():
                self.lane.give_up("the run was stopped before the answer came")
                return
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self.lane.give_up("no answer before the run ended")
                return
            self.lane.wait(min(WAIT_S, remaining))

    def give_up(self, reason: str) -> None:
        """Finish what is pending with this error; nothing where nothing is."""
        if self.lane.pending():
            self.lane.give_up(reason)

    def summary(self) -> dict[str, Any]:
        """Counts and figures of this run's previews."""
        with self._lock:
            return {**self.counters.summary(), **self.lane.summary()}

    def _finished(self, finished: Finished) -> None:
        results = [
            result.model_copy(update={"received_step": self._now}) for result in finished.results
        ]
        with self._lock:
            self.counters.note(finished)
        self._deliver(finished.step, results, finished.waited_s)

    def close(self) -> None:
        """Let go of the lane."""
        self.lane.close()


def answers_of(
    backend: PreviewBackend, requests: list[PreviewRequest], step: int
) -> list[PreviewResult]:
    """A backend's answers; backends return errors, and one that raises must not end training."""
    try:
        return backend.preview_batch(requests, step)
    except Exception as error:
        logger.exception("the preview of step %d failed; training goes on", step)
        message, kind = f"{type(error).__name__}: {error}", backend.backend_type
        return [PreviewResult.failed(one, step, message, kind) for one in requests]


class InlineLane:
    """Answers in the training thread, between two steps, while training waits."""

    def __init__(self, backend: PreviewBackend, requests: list[PreviewRequest]) -> None:
        """Take who answers what."""
        self.backend, self.requests = backend, requests

    def start(self, on_finished: OnFinished) -> None:
        """Remember whom to tell."""
        self._on_finished = on_finished

    def ask(self, step: int, *, is_kept: bool) -> None:
        """Answer now."""
        started = time.perf_counter()
        results = answers_of(self.backend, self.requests, step)
        waited = time.perf_counter() - started
        results = [one.model_copy(update={"visible_s": round(waited, 3)}) for one in results]
        self._on_finished(Finished(step, results, waited))

    def pending(self) -> list[int]:
        """Never anything."""
        return []

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    def settle(self) -> None:
        """Nothing to part with."""

    def give_up(self, reason: str) -> None:
        """Nothing to give up."""

    def summary(self) -> dict[str, Any]:
        """Nothing beside the counters."""
        return {}

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()


class ThreadLane:
    """Asks a backend with weights of its own in one thread; newer steps replace waiting ones."""

    def __init__(self, backend: PreviewBackend, requests: list[PreviewRequest]) -> None:
        """Take who answers what."""
        self.backend, self.requests = backend, requests
        self._changed = threading.Condition()
        self._next: tuple[int, float] | None = None
        self._running: tuple[int, float] | None = None
        self._is_closing = False

    def start(self, on_finished: OnFinished) -> None:
        """Start the thread."""
        self._on_finished = on_finished
        threading.Thread(target=self._run, name="previews", daemon=True).start()

    def ask(self, step: int, *, is_kept: bool) -> None:
        """Put the step in line; the backend's weights are its own, so no step is special."""
        one, older = (step, time.monotonic()), None
        with self._changed:
            if self._running is None:
                self._running = one
            else:
                older, self._next = self._next, one
            self._changed.notify_all()
        if older is not None:
            self._fail(older[0], f"superseded by step {step}", is_superseded=True)

    def pending(self) -> list[int]:
        """What runs and what waits."""
        with self._changed:
            return [one[0] for one in (self._running, self._next) if one is not None]

    def wait(self, timeout_s: float) -> None:
        """Wait for the thread."""
        with self._changed:
            self._changed.wait(timeout_s)

    def settle(self) -> None:
        """Nothing to part with."""

    def give_up(self, reason: str) -> None:
        """Fail what is pending; an answer that still comes is left aside."""
        with self._changed:
            steps = [one[0] for one in (self._running, self._next) if one is not None]
            self._running = self._next = None
        for step in steps:
            self._fail(step, reason)

    def summary(self) -> dict[str, Any]:
        """Nothing beside the counters."""
        return {}

    def close(self) -> None:
        """Let the thread end when it can; does not wait."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self.backend.close()

    def _fail(self, step: int, reason: str, *, is_superseded: bool = False) -> None:
        kind = self.backend.backend_type
        results = [
            PreviewResult.failed(one, step, reason, kind).model_copy(
                update={"is_superseded": is_superseded}
            )
            for one in self.requests
        ]
        self._on_finished(Finished(step, results, is_superseded=is_superseded))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._running is not None)
                if self._is_closing:
                    return
                current = self._running
            assert current is not None, "waited for"
            step, asked_at = current
            results = answers_of(self.backend, self.requests, step)
            seconds = round(time.monotonic() - asked_at, 3)
            results = [one.model_copy(update={"visible_s": seconds}) for one in results]
            with self._changed:
                is_wanted = self._running is current
            if is_wanted:
                self._on_finished(Finished(step, results))
            with self._changed:
                if self._running is current:
                    self._running, self._next = self._next, None
                self._changed.notify_all()
