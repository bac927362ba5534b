"""When previews are made and by whom: always the same prompts, at fixed steps.

A lane is a way of getting answers: in the training thread (`local`), in one background thread (any
other PreviewBackend), or elsewhere with published weights (`trainer.publish.lane`). Lanes tell
what became of every step that was asked for; nothing is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult
from trainer.preview.drift import Drift
from trainer.preview.measure_drift import LocalDrift
from trainer.preview.samples import joined_samples, sample_requests

logger = logging.getLogger(__name__)

Deliver = Callable[[int, list[PreviewResult], float], None]

WAIT_S = 0.25

COUNTS = ("asked", "done", "failed", "superseded", "verified")
"""What a summary says of evaluations."""


@dataclass(frozen=True)
class Finished:
    """What became of one step: answers, or one error per prompt."""

    step: int
    results: list[PreviewResult]
    """Of the previews, and behind them of the evaluation set where it was asked too."""
    waited_s: float = 0.0
    """Seconds that training waited for it."""
    is_superseded: bool = False
    """A newer step took its place before it was answered."""
    drift: Drift | None = None
    """How far these weights are from those before training, where that is measured."""


OnFinished = Callable[[Finished], None]


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts that are answered for their scores, at steps of their own."""

    requests: list[PreviewRequest]
    interval: int
    """Steps between evaluations; step 0 and the last step always have one."""
    deliver: Deliver
    backend: PreviewBackend | None = None
    """Answers them in the training process; None: the lane knows how."""
    is_deciding: bool = False
    """A score decides by them: no newer step takes the place of one."""


class Lane(Protocol):
    """A way of getting answers."""

    def start(self, on_finished: OnFinished) -> None:
        """Begin; `on_finished` may be called from any thread, once per step that was asked."""
        ...

    def ask(self, step: int, *, is_kept: bool, is_evaluated: bool = False) -> None:
        """Answer with the weights as they are now; kept steps are not superseded.

        Args:
            is_evaluated: the prompts of the evaluation set too.
        """
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


class Settling(Protocol):
    """What answers go through on their way to people."""

    @property
    def is_pending(self) -> bool:
        """Whether an answer is on its way."""
        ...

    def settle(self, timeout_s: float, *, should_stop: Callable[[], bool] = ...) -> None:
        """Wait until none is, no longer than this."""
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
    drift: tuple[int, Drift] | None = None
    """Newest step whose drift was measured, and what was found."""
    drift_s: list[float] = field(default_factory=list)
    """Seconds that measuring drift took where it was measured, one value per step after 0."""

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
        if finished.drift is not None and finished.drift.error is None:
            self.drift = finished.step, finished.drift
            if finished.step > 0:  # step 0 is asked to answer, which takes longer
                self.drift_s.append(finished.drift.seconds)
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
            **({"drift": self._drift_summary(*self.drift)} if self.drift is not None else {}),
        }

    def _drift_summary(self, step: int, drift: Drift) -> dict[str, Any]:
        seconds = round(statistics.fmean(self.drift_s), 3) if self.drift_s else None
        return {
            "step": step,
            "kl": drift.mean_kl,
            "num_changed": sum(drift.is_changed),
            "num_prompts": len(drift.kl),
            "s_per_preview_step": seconds,
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
        delivery: Settling | None = None,
        evaluation: EvaluationSet | None = None,
        is_on_gpu: bool = False,
        num_samples: int = 1,
        drift: LocalDrift | None = None,
        deliver_drift: Callable[[int, Drift], None] = lambda step, drift: None,
    ) -> None:
        """Take the prompts once; they stay the same for the whole run.

        Args:
            interval: steps between previews; 0 = none at all.
            deliver: called with step, results and the seconds training waited, whenever there is
                something new; by another thread than the training one, unless the backend is
                local.
            delivery: what `deliver` hands answers on to, where that takes time.
            evaluation: prompts that are answered besides, at some steps.
            is_on_gpu: training is, on the current device.
            num_samples: answers to each prompt of the previews; a lane knows its own number.
            drift: measures it where previews are made in the training thread.
            deliver_drift: called with step and what was measured, like `deliver`.
        """
        self.evaluation, self.evaluations = evaluation, PreviewCounters()
        self.backend, self.requests, self.interval = backend, requests, interval
        self.counters = PreviewCounters()
        self._deliver, self._delivery, self._is_on_gpu = deliver, delivery, is_on_gpu
        self._deliver_drift = deliver_drift
        self._lock = threading.Lock()
        self._last_asked: int | None = None
        self._now = 0
        self.lane: Lane
        if isinstance(backend, PreviewBackend):
            is_local = backend.backend_type == "local"
            self.lane = (
                InlineLane(backend, requests, evaluation, drift, num_samples)
                if is_local
                else ThreadLane(backend, requests, num_samples)
            )
        else:
            self.lane = backend
        self.lane.start(self._finished)

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether `step` has a preview: step 0, every `interval` steps, and the last one.

        A step that is evaluated has one too: whoever answers has its weights then.
        """
        if not self.interval or not self.requests or step == self._last_asked:
            return False
        is_evaluated = self._evaluated(step, is_last=is_last) is not None
        return is_last or is_evaluated or step % self.interval == 0

    def _evaluated(self, step: int, *, is_last: bool) -> EvaluationSet | None:
        """What is evaluated at a step; None where nothing is."""
        one = self.evaluation
        return one if one is not None and (is_last or step % one.interval == 0) else None

    @property
    def is_waited_for(self) -> bool:
        """Whether training stands still until the answers are there."""
        return isinstance(self.lane, InlineLane)

    def is_asked(self, step: int) -> bool:
        """Whether the newest preview asked for is that of `step`."""
        return step == self._last_asked

    def num_prompts(self, step: int, *, is_last: bool) -> int:
        """How many prompts are answered at `step`, where it is due."""
        evaluation = self._evaluated(step, is_last=is_last)
        return len(self.requests) + (len(evaluation.requests) if evaluation is not None else 0)

    def ask(self, step: int, *, is_last: bool = False, is_wanted: bool = False) -> None:
        """Make, or start, the preview of `step` with the weights as they are now.

        Args:
            is_wanted: somebody asked for it: it is kept, as those of the first and last step are.
        """
        self._last_asked = self._now = step
        evaluation = self._evaluated(step, is_last=is_last)
        with self._lock:
            self.counters.asked += len(self.requests)
            if evaluation is not None:
                self.evaluations.asked += len(evaluation.requests)
        stall = Stall(is_on_gpu=self._is_on_gpu)
        # Not under the lock: lanes call `_finished` from threads of their own.
        is_deciding = evaluation is not None and evaluation.is_deciding
        is_kept = is_last or is_wanted or step == 0 or is_deciding
        self.lane.ask(step, is_kept=is_kept, is_evaluated=evaluation is not None)
        stall.end()
        with self._lock:
            self.counters.stalls.append(stall)

    def note_step(self, step: int) -> None:
        """Where training is now: an answer that arrives is so many steps behind."""
        self._now = step

    @property
    def is_pending(self) -> bool:
        """Whether an answer is under way."""
        return bool(self.lane.pending()) or (
            self._delivery is not None and self._delivery.is_pending
        )

    def drain(self, timeout_s: float, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for what is under way, no longer than `timeout_s`; the rest counts as failed."""
        deadline = time.monotonic() + timeout_s
        while self.lane.pending():
            remaining = deadline - time.monotonic()
            if should_stop():
                self.lane.give_up("the run was stopped before the answer came")
            elif remaining <= 0:
                self.lane.give_up("no answer before the run ended")
            else:
                self.lane.wait(min(WAIT_S, remaining))
                continue
            break
        if self._delivery is not None:
            self._delivery.settle(deadline - time.monotonic(), should_stop=should_stop)

    def give_up(self, reason: str) -> None:
        """Finish what is pending with this error; nothing where nothing is."""
        if self.lane.pending():
            self.lane.give_up(reason)
        if self._delivery is not None:
            self._delivery.settle(0.0)

    def summary(self) -> dict[str, Any]:
        """Counts and figures of this run's previews."""
        with self._lock:
            found = {**self.counters.summary(), **self.lane.summary()}
            if self.evaluation is not None:
                counts = self.evaluations.summary()
                found["evaluation"] = {name: counts[name] for name in COUNTS}
            return found

    def _finished(self, finished: Finished) -> None:
        results = [
            result.model_copy(update={"received_step": self._now}) for result in finished.results
        ]
        count = len(self.requests)
        shown, evaluated = results[:count], results[count:]
        with self._lock:
            self.counters.note(dataclasses.replace(finished, results=shown))
            if evaluated:
                self.evaluations.note(dataclasses.replace(finished, results=evaluated))
        self._deliver(finished.step, shown, finished.waited_s)
        if evaluated and self.evaluation is not None:
            self.evaluation.deliver(finished.step, evaluated, finished.waited_s)
        if finished.drift is not None:
            self._deliver_drift(finished.step, finished.drift)

    def close(self) -> None:
        """Let go of the lane."""
        self.lane.close()


PROMPTS_AT_ONCE = 50
"""Batch of an evaluation; previews are one batch of their own."""


def batches_of(requests: Sequence[PreviewRequest]) -> list[list[PreviewRequest]]:
    """An evaluation's prompts, cut into batches."""
    return [
        list(requests[start : start + PROMPTS_AT_ONCE])
        for start in range(0, len(requests), PROMPTS_AT_ONCE)
    ]


def samples_of(
    backend: PreviewBackend, requests: list[PreviewRequest], step: int, num_samples: int
) -> list[PreviewResult]:
    """A backend's answers with further samples in them, which are batches of their own."""
    batches = [answers_of(backend, requests, step)]
    for sample in range(1, num_samples):
        if not any(result.ok for result in batches[0]):
            break  # whoever is away is not asked again
        batches.append(answers_of(backend, sample_requests(requests, sample), step))
    return joined_samples(batches)


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

    def __init__(
        self,
        backend: PreviewBackend,
        requests: list[PreviewRequest],
        evaluation: EvaluationSet | None = None,
        drift: LocalDrift | None = None,
        num_samples: int = 1,
    ) -> None:
        """Take who answers what, and what else is measured with the same weights."""
        self.backend, self.requests, self.num_samples = backend, requests, num_samples
        self.evaluation, self.drift = evaluation, drift

    def start(self, on_finished: OnFinished) -> None:
        """Remember whom to tell."""
        self._on_finished = on_finished

    def ask(self, step: int, *, is_kept: bool, is_evaluated: bool = False) -> None:
        """Answer now."""
        started = time.perf_counter()
        results = samples_of(self.backend, self.requests, step, self.num_samples)
        if is_evaluated and self.evaluation is not None and self.evaluation.backend is not None:
            for batch in batches_of(self.evaluation.requests):
                results += answers_of(self.evaluation.backend, batch, step)
        waited = time.perf_counter() - started
        results = [one.model_copy(update={"visible_s": round(waited, 3)}) for one in results]
        drift = self.drift.measure(step) if self.drift is not None else None
        waited = time.perf_counter() - started
        self._on_finished(Finished(step, results, waited, drift=drift))

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

    def __init__(
        self, backend: PreviewBackend, requests: list[PreviewRequest], num_samples: int = 1
    ) -> None:
        """Take who answers what."""
        self.backend, self.requests, self.num_samples = backend, requests, num_samples
        self._changed = threading.Condition()
        self._next: tuple[int, float] | None = None
        self._running: tuple[int, float] | None = None
        self._is_closing = False

    def start(self, on_finished: OnFinished) -> None:
        """Start the thread."""
        self._on_finished = on_finished
        threading.Thread(target=self._run, name="previews", daemon=True).start()

    def ask(self, step: int, *, is_kept: bool, is_evaluated: bool = False) -> None:
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
            results = samples_of(self.backend, self.requests, step, self.num_samples)
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
