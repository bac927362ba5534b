"""When previews are made and by whom: always the same prompts, at fixed steps.

A local backend answers between two steps while training waits. Any other backend answers in one
background thread; while it is busy, newer steps wait as "the newest" and replace each other, and
what was replaced is counted as superseded, never dropped in silence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult

Deliver = Callable[[int, list[PreviewResult], float], None]


@dataclass
class PreviewCounters:
    """Counts of a run's previews, in prompts, and what they cost."""

    asked: int = 0
    done: int = 0
    failed: int = 0
    superseded: int = 0
    matched: int = 0
    stalls_s: list[float] = field(default_factory=list)
    """Seconds that training waited, one value per preview step."""

    def note(self, results: list[PreviewResult]) -> None:
        """Count results that came back."""
        self.failed += sum(not result.ok for result in results)
        self.done += sum(result.ok for result in results)
        self.matched += sum(result.matches is True for result in results)

    def summary(self) -> dict[str, Any]:
        """Counts and stall figures as JSON values."""
        stalls = sorted(self.stalls_s)
        return {
            "asked": self.asked,
            "done": self.done,
            "failed": self.failed,
            "superseded": self.superseded,
            "matched": self.matched,
            "stall_ms_median": round(1000 * statistics.median(stalls), 3) if stalls else None,
            "stall_ms_p99": round(1000 * stalls[int(0.99 * (len(stalls) - 1))], 3)
            if stalls
            else None,
            "stall_s_total": round(sum(stalls), 3),
        }


class PreviewScheduler:
    """Asks a backend for the same prompts every `interval` steps."""

    def __init__(
        self,
        backend: PreviewBackend,
        requests: list[PreviewRequest],
        *,
        interval: int,
        deliver: Deliver,
    ) -> None:
        """Take the prompts once; they stay the same for the whole run.

        Args:
            interval: steps between previews; 0 = none at all.
            deliver: called with step, results and the seconds training waited, in the
                training thread, whenever there is something new.
        """
        self.backend, self.requests, self.interval = backend, requests, interval
        self.counters = PreviewCounters()
        self._deliver = deliver
        self._is_local = backend.backend_type == "local"
        self._thread: ThreadPoolExecutor | None = None
        self._running: tuple[int, Future[list[PreviewResult]]] | None = None
        self._next_step: int | None = None
        self._last_asked: int | None = None

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether `step` has a preview: step 0, every `interval` steps, and the last one."""
        if not self.interval or not self.requests or step == self._last_asked:
            return False
        return is_last or step % self.interval == 0

    def is_asked(self, step: int) -> bool:
        """Whether the newest preview asked for is that of `step`."""
        return step == self._last_asked

    def ask(self, step: int) -> None:
        """Make, or start, the preview of `step` with the weights as they are now."""
        self._last_asked = step
        self.counters.asked += len(self.requests)
        started = time.perf_counter()
        if self._is_local:
            results = self.backend.preview_batch(self.requests, step)
            waited = time.perf_counter() - started
            self.counters.stalls_s.append(waited)
            self._hand_over(step, results, waited)
            return
        if self._next_step is not None:
            self.counters.superseded += len(self.requests)
        self._next_step = step
        self.poll()
        self.counters.stalls_s.append(time.perf_counter() - started)

    def poll(self) -> None:
        """Deliver what a background backend has finished, and start what waits; never blocks."""
        if self._is_local:
            return
        if self._running is not None and self._running[1].done():
            step, future = self._running
            self._running = None
            self._hand_over(step, future.result(), 0.0)
        if self._running is None and self._next_step is not None:
            self._thread = self._thread or ThreadPoolExecutor(1, "previews")
            step, self._next_step = self._next_step, None
            future = self._thread.submit(self.backend.preview_batch, self.requests, step)
            self._running = (step, future)

    def drain(self, timeout_s: float) -> None:
        """Wait for what is under way, no longer than `timeout_s`; the rest counts as failed."""
        deadline = time.monotonic() + timeout_s
        while self._running is not None or self._next_step is not None:
            if self._running is not None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._give_up()
                    return
                wait([self._running[1]], timeout=remaining)
            self.poll()

    def _give_up(self) -> None:
        assert self._running is not None, "nothing to give up"
        steps = [self._running[0], *([self._next_step] if self._next_step is not None else [])]
        self._running = self._next_step = None
        for step in steps:
            results = [
                PreviewResult.failed(
                    request, step, "no answer before the run ended", self.backend.backend_type
                )
                for request in self.requests
            ]
            self._hand_over(step, results, 0.0)

    def _hand_over(self, step: int, results: list[PreviewResult], waited: float) -> None:
        self.counters.note(results)
        self._deliver(step, results, waited)

    def close(self) -> None:
        """Let go of the thread and the backend; does not wait."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        self.backend.close()
