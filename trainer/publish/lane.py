"""PublishedPreviews: previews made elsewhere, with the weights of the step they are shown for."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.drift import Drift
from trainer.preview.local import release_memory
from trainer.preview.samples import joined_samples, sample_requests
from trainer.preview.scheduler import Finished, OnFinished
from trainer.publish.children import PublisherProcess, Worker
from trainer.publish.identity import Canary, GoldenParts, results_of
from trainer.publish.snapshot import Arena, Snapshotter, read_later


@dataclass
class Staged:
    """A snapshot of one step and where it lies."""

    step: int
    slot: int
    is_kept: bool
    copied: Callable[[], None]
    canary: Callable[[], float] | None
    asked_at: float
    canary_value: float | None = None


@dataclass
class LaneState:
    """Where the snapshots are, and how the publisher and the server do."""

    free: list[int]
    staged: list[Staged] = field(default_factory=list)
    """In order of steps; more than one only of those that are spooled."""
    feeding: Staged | None = None
    given: list[Staged] = field(default_factory=list)
    delivering: list[int] = field(default_factory=list)
    """Steps whose answers are there and are being told."""
    committed: int | None = None
    """Slot that a server reads from until newer weights are there (transport `dir`)."""
    last_wanted: int | None = None
    """The last step found no free slot; its weights stay, so it is copied while draining."""
    is_away: bool = False
    away_since: float | None = None
    is_open: bool = False
    away_error: str = ""
    respawns: int = 0
    dead: str = ""
    is_closing: bool = False


# ---- PublishedPreviews: previews made elsewhere, with the weights of the step they are shown for
#
# In the training thread there is one thing: a copy of the weights into an arena, and the forward
# pass of the canary. A publisher process does the rest; two threads here sleep on its pipe and feed
# it. Newest wins: one snapshot is with the publisher, one is staged and replaced by newer ones;
# what was replaced is reported as superseded. First and last step are kept, and evaluations by
# which a score decides: these are answered in order of steps, and the training thread waits for
# room for them (`has_room`).


logger = logging.getLogger(__name__)

MAX_RESPAWNS = 3

CLOSE_TIMEOUT_S = 5.0

HURRY_EVERY_S = 5.0
"""How often the drain at the end has the publisher try again at once."""


class PublishedPreviews:
    """A lane of the scheduler: `ask` copies, a process elsewhere answers."""

    def __init__(
        self,
        *,
        worker: Worker,
        setup: dict[str, Any],
        snapshotter: Snapshotter,
        folder: Path,
        num_slots: int,
        requests: Sequence[PreviewRequest],
        canary: Canary | None,
        matches: Callable[[str, str], bool],
        parts_of: GoldenParts,
        backend_type: str,
        evaluation: Sequence[PreviewRequest] = (),
        is_spooled: bool = False,
        notice: Callable[[str], None] = logger.warning,
        log: Path | None = None,
    ) -> None:
        """Make the arenas; nothing is started yet.

        Args:
            setup: the publisher's first line, without `url`.
            folder: private folder of the arenas; removed at the end.
            num_slots: arenas: 2, and 1 more for transport `dir`.
            evaluation: prompts that are asked besides, at some steps.
            is_spooled: no evaluation gives way to a newer step.
            notice: told once when the server goes away and when it is back.
            log: where the publisher's own complaints go; None: nowhere.
        """
        self.log = log
        self.worker, self.setup, self.snapshotter = worker, setup, snapshotter
        self.folder, self.requests, self.canary = folder, list(requests), canary
        self.matches, self.parts_of, self.backend_type = matches, parts_of, backend_type
        self.notice = notice
        self.arenas: list[Arena] = [
            snapshotter.arena(folder / f"arena-{slot}") for slot in range(num_slots)
        ]
        self.bytes_sent = 0
        self.times: list[dict[str, float]] = []
        self.evaluation, self._is_spooled = list(evaluation), is_spooled
        self._evaluated: set[int] = set()
        self._state = LaneState(free=list(range(num_slots)))
        self._changed = threading.Condition(threading.RLock())
        self._publisher: PublisherProcess | None = None
        self._hurried_at = 0.0
        self._on_finished: OnFinished | None = None
        self._feeder: threading.Thread | None = None

    # ---- called by the training thread

    def start(self, on_finished: OnFinished) -> None:
        """Start the worker if it is ours, and the thread that feeds the publisher."""
        self._on_finished = on_finished
        self._feeder = threading.Thread(target=self._feed, name="preview-feed", daemon=True)
        self._feeder.start()
        self.worker.start(self._worker_is_ready)

    def ask(self, step: int, *, is_kept: bool, is_evaluated: bool = False) -> None:
        """Copy the weights of `step`; what cannot be taken now is reported, not waited for."""
        asked_at = time.monotonic()
        if is_evaluated:
            self._evaluated.add(step)
        with self._changed:
            is_spooled = is_evaluated and self._is_spooled
            slot = self._slot_for(step, is_kept=is_kept or is_spooled, is_spooled=is_spooled)
        if slot is None:
            self.snapshotter.leave_out()
            return
        try:
            copied = self.snapshotter.copy(self.arenas[slot])
            value = read_later(self.canary.score()) if self.canary is not None else None
        except Exception as error:  # a preview must never stop training
            if self.snapshotter.is_shared:
                raise  # but other processes wait in an exchange that this one has left
            reason = self._failure(step, error)
        else:
            with self._changed:
                is_kept = is_kept or is_spooled
                staged = Staged(step, slot, is_kept, copied, value, asked_at)
                self._state.staged.append(staged)
                self._changed.notify_all()
            return
        # Only out here: inside `except` the traceback holds what the failed attempt allocated.
        release_memory()
        with self._changed:
            self._settle(slot, is_linked=False)
            self._finish(step, error=reason)
            self._changed.notify_all()

    def _failure(self, step: int, error: Exception) -> str:
        """Say what went wrong on this side; out of memory needs no traceback."""
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        logger.error(
            "the weights of step %d were not copied (%s); training goes on",
            step,
            words,
            exc_info=None if is_memory else error,
        )
        return f"the weights of this step were not copied ({words})"

    def _slot_for(self, step: int, *, is_kept: bool, is_spooled: bool) -> int | None:
        """A slot that may be overwritten now, or why there is none."""
        state = self._state
        if state.last_wanted not in (None, step):  # its weights are gone
            self._finish(state.last_wanted, superseded_by=step)
            state.last_wanted = None
        if state.dead or (state.is_open and not is_kept):
            self._finish(step, error=state.dead or state.away_error)
            return None
        older = state.staged[-1] if state.staged else None
        if older is not None and not older.is_kept:
            state.staged.pop()
            self._finish(older.step, superseded_by=step)
            return older.slot
        if state.free and (older is None or is_spooled):
            return state.free.pop()
        if is_spooled:
            self._finish(step, error=state.away_error or "no room for a copy of these weights")
        elif is_kept:
            state.last_wanted = step
        else:
            self._finish(step, superseded_by=step)
        return None

    def pending(self) -> list[int]:
        """Steps that are neither shown nor given up."""
        state = self._state
        with self._changed:
            waiting = [*state.staged, state.feeding, *state.given]
            last = [] if state.last_wanted is None else [state.last_wanted]
            steps = [one.step for one in waiting if one is not None]
            return steps + last + state.delivering

    def has_room(self) -> bool:
        """Whether the weights of an evaluation can be copied now."""
        with self._changed:
            state = self._state
            is_replaced = bool(state.staged) and not state.staged[-1].is_kept
            return bool(state.dead or state.free or is_replaced)

    def away_s(self) -> float:
        """For how many seconds the server has not answered; 0 while it does, or is being asked."""
        with self._changed:
            if self.worker.is_lost:
                return math.inf
            since = self._state.away_since
            return 0.0 if since is None else time.monotonic() - since

    def hurry(self) -> None:
        """Have a server that does not answer be asked again at once."""
        with self._changed:
            self._send({"op": "hurry"})

    def wait(self, timeout_s: float) -> None:
        """Wait for something to happen; in the drain at the end only."""
        with self._changed:
            if time.monotonic() - self._hurried_at > HURRY_EVERY_S:
                self._hurried_at = time.monotonic()
                self._send({"op": "hurry"})
            state = self._state
            wanted = state.last_wanted
            if wanted is None or state.staged or not state.free:
                self._changed.wait(timeout_s)
                return
            state.last_wanted = None
        self.ask(wanted, is_kept=True, is_evaluated=wanted in self._evaluated)

    def settle(self) -> None:
        """Nothing is copied any more."""
        self.snapshotter.settle()

    def give_up(self, reason: str) -> None:
        """Report everything that is pending as failed."""
        with self._changed:
            steps = [step for step in self.pending() if step not in self._state.delivering]
            self._state.feeding = self._state.last_wanted = None
            self._state.staged, self._state.given = [], []
            self._state.dead = reason
            for step in steps:
                self._finish(step, error=reason)

    def close(self) -> None:
        """End publisher and worker, give the memory back; may be called twice."""
        with self._changed:
            self._state.is_closing = True
            self._changed.notify_all()
            publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()
        self.worker.close()
        if publisher is not None:
            publisher.join(CLOSE_TIMEOUT_S)
        if self._feeder is not None:
            self._feeder.join(CLOSE_TIMEOUT_S)
        for arena in self.arenas:
            arena.close()
        self.arenas = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """Bytes and times of this run's publications."""
        names = sorted({name for times in self.times for name in times})
        return {
            "bytes_sent": self.bytes_sent,
            "stages_s_mean": {
                name: round(sum(t.get(name, 0.0) for t in self.times) / len(self.times), 4)
                for name in names
            },
        }

    # ---- the feeding thread

    def _feed(self) -> None:
        """Give what is staged as soon as the publisher may take it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._state.is_closing or self._can_give())
                if self._state.is_closing:
                    return
                one = self._state.feeding = self._state.staged.pop(0)
            reason = None
            try:
                one.copied()  # waits for the device, on a GPU, without holding anything up
                if one.canary is not None:
                    one.canary_value = one.canary()
            except Exception as error:  # the device's own errors come as late as this
                reason = self._failure(one.step, error)
            with self._changed:
                if self._state.feeding is not one:
                    continue  # it was given up meanwhile
                self._state.feeding = None
                if reason is None:
                    self._give(one)
                else:
                    self._settle(one.slot, is_linked=False)
                    self._finish(one.step, error=reason)
                    self._changed.notify_all()

    def _can_give(self) -> bool:
        state = self._state
        if not state.staged or state.dead or self.worker.url is None:
            return False
        if not state.given:
            return True
        return state.is_away and len(state.given) == 1 and not state.given[0].is_kept

    def _give(self, one: Staged) -> None:
        self._state.given.append(one)
        self._send(
            {
                "op": "give",
                "step": one.step,
                "slot": one.slot,
                "path": str(self.arenas[one.slot].path),
                "is_kept": one.is_kept,
                "is_evaluated": one.step in self._evaluated,
            }
        )

    # ---- the publisher process

    def _send(self, values: dict[str, Any]) -> None:
        """Tell the publisher; only something to publish starts one. Under the lock."""
        if self._publisher is None:
            if values["op"] != "give":
                return
            self._publisher = PublisherProcess(
                {**self.setup, "url": self.worker.url},
                log=self.log,
                on_event=self._on_event,
                on_end=self._publisher_ended,
            )
        self._publisher.send(values)

    def _publisher_ended(self, publisher: PublisherProcess) -> None:
        """Start another one for what it left, a few times."""
        with self._changed:
            state = self._state
            if state.is_closing or self._publisher is not publisher:
                return
            self._publisher = None
            left, state.given = state.given, []
            state.is_away = state.is_open = False
            state.away_since = None
            state.respawns += 1
            if state.respawns > MAX_RESPAWNS:
                state.dead = f"the publisher process ended {state.respawns} times"
                self.notice(f"{state.dead}; no more previews in this run, training goes on")
                for one in left:
                    self._settle(one.slot, is_linked=False)
                    self._finish(one.step, error=state.dead)
                return
            logger.warning(
                "the publisher process ended (%s); starting it again", publisher.returncode
            )
            for one in left:
                self._give(one)

    # ---- its events, in the reading thread

    def _on_event(self, event: dict[str, Any]) -> None:
        getattr(self, f"_on_{event.pop('event')}")(**event)

    def _on_idle(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _on_away(self, step: int, error: str, retry_s: float, is_open: bool) -> None:
        with self._changed:
            if is_open and not self._state.is_open:
                self.notice(f"previews: {error}")
            self._state.is_away, self._state.is_open = True, is_open
            self._state.away_since = self._state.away_since or time.monotonic()
            self._state.away_error = error
            self._changed.notify_all()
        self.worker.look_after()

    def _on_superseded(self, step: int, slot: int) -> None:
        with self._changed:
            newer = [one.step for one in self._state.given if one.step != step]
            self._take(step)
            self._settle(slot, is_linked=False)
            self._finish(step, superseded_by=max(newer, default=step))

    def _on_failed(self, step: int, slot: int, error: str, is_linked: bool, bytes: int) -> None:
        with self._changed:
            self.bytes_sent += bytes
            self._is_back()
            self._settle(slot, is_linked=is_linked)
            if self._take(step) is not None:
                self._finish(step, error=error)

    def _on_done(self, step: int, slot: int, **answer: Any) -> None:
        with self._changed:
            self.bytes_sent += answer["bytes"]
            self.times.append(answer["times"])
            self._is_back()
            self._settle(slot, is_linked=answer["is_linked"])
            one = self._take(step)
            if one is None:
                return  # given up meanwhile
            self._state.delivering.append(step)
        try:
            results = self._judged(one, answer)
            # Weights that are not proved say nothing of drift either.
            drift = answer.get("drift") if any(result.ok for result in results) else None
            found = Drift.model_validate(drift) if drift is not None else None
            self._hand_over(Finished(step, results, drift=found))
        finally:
            with self._changed:
                self._state.delivering.remove(step)
                self._changed.notify_all()

    def _judged(self, one: Staged, answer: dict[str, Any]) -> list[PreviewResult]:
        """The worker's answers as results; a comparison that fails is an error of its prompts."""
        count, num_samples = len(self.requests), self.setup.get("num_samples", 1)
        shown, evaluated = self.requests, self._requests(one.step)[count:]
        asked = [sample_requests(shown, sample) for sample in range(num_samples)]
        try:
            found = results_of(
                answer,
                [*itertools.chain(*asked), *evaluated],
                one.step,
                canary=(self.canary, one.canary_value),
                matches=self.matches,
                parts_of=self.parts_of,
                backend_type=self.backend_type,
                visible_s=time.monotonic() - one.asked_at,
            )
            batches = [found[count * n : count * (n + 1)] for n in range(num_samples)]
            return joined_samples(batches) + found[count * num_samples :]
        except Exception as error:  # the profile's own code, or an answer that nobody thought of
            logger.exception("the previews of step %d cannot be used; training goes on", one.step)
            message = f"the answer cannot be used ({type(error).__name__}: {error})"
            return [
                PreviewResult.failed(request, one.step, message, self.backend_type)
                for request in self._requests(one.step)
            ]

    def _requests(self, step: int) -> list[PreviewRequest]:
        """The prompts that are asked with the weights of a step."""
        return self.requests + (self.evaluation if step in self._evaluated else [])

    def _is_back(self) -> None:
        if self._state.is_open:
            self.notice("previews: the server answers again")
        self._state.is_away = self._state.is_open = False
        self._state.away_since = None

    def _take(self, step: int) -> Staged | None:
        """Out of the list of what the publisher has."""
        found = next((one for one in self._state.given if one.step == step), None)
        if found is not None:
            self._state.given.remove(found)
        self._changed.notify_all()
        return found

    def _settle(self, slot: int, *, is_linked: bool) -> None:
        """A slot comes back; with transport `dir` the newest stays with the server."""
        state = self._state
        if slot == state.committed:
            return
        if is_linked:
            slot, state.committed = state.committed if state.committed is not None else -1, slot
        if slot >= 0:
            state.free.append(slot)

    def _worker_is_ready(self) -> None:
        with self._changed:
            self._send({"op": "hurry"})
            self._changed.notify_all()

    # ---- what the scheduler is told

    def _finish(self, step: int, *, error: str = "", superseded_by: int | None = None) -> None:
        """Every prompt of a step as an error, so that nothing is lost in silence."""
        if superseded_by is not None:
            error = (
                f"superseded by the weights of step {superseded_by}"
                if superseded_by != step
                else "superseded: older weights were still on their way"
            )
        results = [
            PreviewResult.failed(request, step, error, self.backend_type).model_copy(
                update={"is_superseded": superseded_by is not None}
            )
            for request in self._requests(step)
        ]
        self._hand_over(Finished(step, results, is_superseded=superseded_by is not None))

    def _hand_over(self, finished: Finished) -> None:
        assert self._on_finished is not None, "start() comes first"
        self._on_finished(finished)
