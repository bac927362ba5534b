"""The bounded queue before the engine: one job at a time, one ending for every job.

Every job says which weights must answer it; `active` are those of the last commit and the ones
that the model's plain name means. What the engine holds at a moment is nobody's business but
`_activate`'s.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.errors import ModelError
from trainer.server.inference_process import EngineDiedError, EngineProcess
from trainer.server.job_book import FairQueue, Job, JobBook, body_digest

logger = logging.getLogger(__name__)

MAX_QUEUED = 64
"""Jobs of one kind (weights, previews, chat) that wait."""

MAX_QUEUED_BYTES = 64 << 20

SMALL_BODY = 256 << 10
"""A body up to this size is always taken where there is a place: large ones keep out no chat."""

RESTART_PAUSE_S = 5.0

MAX_TRIES = 2
"""A job that the engine died on is tried again once; a load only after somebody's kill."""

REQUEST_TIMEOUT_S = 600.0

LOAD_TIMEOUT_S = 600.0
"""At least; a load takes as long as the file is large."""

GIVE_UP_S = 30.0
"""How long an engine may take to notice that a message was cancelled."""

KEYED_GRACE_S = 10.0
"""How long a job with an Idempotency-Key goes on for a client whose connection broke."""

WATCH_S = 1.0

SILENT_POLLS = 10
"""An engine process without a sign of life for so many polls is replaced."""

NO_WEIGHTS: dict[str, Any] = {"weights_id": None, "run": None, "step": None}

Reply = dict[str, Any]


class QueueFullError(Exception):
    """No room: the client should come back later."""


class JobQueue:
    """Feeds the engine, with fair shares for weights, previews and chat."""

    def __init__(
        self,
        engine: EngineProcess,
        find_weights: Callable[[str], dict[str, Any] | None],
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Take an engine, and a function that gives the `load_weights` of a kept weights_id."""
        self.engine, self.find_weights = engine, find_weights
        self.request_timeout_s = request_timeout_s
        self.active = dict(NO_WEIGHTS)
        """Weights that answer where a request names none: those of the last commit."""
        self.loaded: str | None = None
        """Weights that the engine holds now."""
        self.book = JobBook()
        self.is_ready = False
        self.restarts = 0
        self.ended: collections.Counter[str] = collections.Counter()
        self._queue: FairQueue[Job] = FairQueue()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._is_broken = self._is_gone = self._is_up = False
        self._running: Job | None = None
        self._asked_at: float | None = None
        self._limit_s = request_timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def waiting(self) -> int:
        """Jobs that wait for the engine."""
        return len(self._queue)

    def engine_started(self) -> None:
        """Take jobs: the engine is there, with the weights that it loaded by itself."""
        self.loaded = self.engine.hello["weights_id"]
        self.active = {**NO_WEIGHTS, "weights_id": self.loaded}
        self.is_ready = self._is_up = True

    # ---- jobs in, jobs out

    def submit(
        self,
        operation: str,
        body: bytes,
        key: str | None = None,
        *,
        client: str = "",
        needs: dict[str, Any] | None = None,
        is_streamed: bool = False,
    ) -> Job:
        """Put a job into the queue.

        Args:
            body: JSON for the engine.
            key: the client's Idempotency-Key: the job that it named before is given again.
            client: shares the engine with others of its kind.
            needs: weights_id, run and step of the weights that must answer.
            is_streamed: the answer's text is wanted while it is made.
        Raises:
            QueueFullError: too many jobs or bytes wait already.
            KeyReusedError: the key came with another body before.
        """
        digest = body_digest(body) if key is not None else b""
        if key is not None:
            known = self.book.find(operation, key, digest)
            if known is not None:
                return known
        texts: asyncio.Queue[tuple[int, str] | None] | None = (
            asyncio.Queue() if is_streamed else None
        )
        job = Job(operation, body, needs, client, texts, key, digest)
        is_large = len(body) > SMALL_BODY and self._queued_bytes + len(body) > MAX_QUEUED_BYTES
        if self._queue.waiting(job.kind) >= MAX_QUEUED or (is_large and self._queued_bytes):
            raise QueueFullError
        self.book.add(job)
        self._queue.push(job, job.kind, client)
        self._queued_bytes += len(body)
        self._wake.set()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for; a running one stops at its next layer or token."""
        if job.done.is_set():
            return
        job.is_given_up = True
        if job.status == "running":
            self.engine.cancel(job.message_id)
        else:
            self._queue.remove(job, job.kind, job.client)
            self._queued_bytes -= len(job.body)
            self._end(job, "cancelled", 499, "cancelled")

    def leave(self, job: Job) -> None:
        """One of those who waited for a job is gone; the last one ends it."""
        job.waiters -= 1
        if job.waiters or job.done.is_set():
            return
        if job.key is None:
            self.cancel(job)
        else:  # a client whose connection broke comes back with the same key
            asyncio.get_running_loop().call_later(KEYED_GRACE_S, self._cancel_if_alone, job)

    def _cancel_if_alone(self, job: Job) -> None:
        if not (job.waiters or job.is_polled or job.done.is_set()):
            self.cancel(job)

    async def wait(self, job: Job, timeout_s: float) -> None:
        """Wait until the job ended, or for `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.done.wait(), timeout_s)

    def _end(self, job: Job, status: Any, code: int, error: str | None = None) -> None:
        job.finish(status, code, error)
        self.ended[job.status] += 1
        self.book.forget_old(but=job)

    # ---- the loop

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            if self._is_broken:
                await asyncio.sleep(RESTART_PAUSE_S)
            if self._is_broken or self._is_gone:
                await self._restart()
                continue
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            job, kind, client = self._queue.pop()
            self._queued_bytes -= len(job.body)
            began = asyncio.get_running_loop().time()
            self._running = job
            try:
                await self._run_one(job)
            except Exception:  # this loop must go on whatever a job does
                logger.exception("a %s job failed in the queue", job.operation)
                self._end(job, "failed", 500, "internal error; details are in the server's log")
            self._running = None
            self._queue.charge(kind, client, asyncio.get_running_loop().time() - began)

    async def _run_one(self, job: Job) -> None:
        if not self.engine.is_alive:  # it ended before: that is not this job's doing
            await self._restart()
            if not self.is_ready:
                self._end(job, "failed", 503, "the engine process cannot be started")
                return
        job.status, job.tries = "running", job.tries + 1
        job.message_id = self.engine.new_id()
        try:
            reply = await self._activate(job) or await self._ask_for(job)
        except EngineDiedError:
            was_killed = await asyncio.to_thread(self.engine.was_killed)
            await self._restart()
            await self._after_death(job, was_killed)
            return
        if reply["ok"]:
            self._note(job, reply["result"])
            self._end(job, "done", 200)
        elif reply["status"] != 499:
            self._end(job, "failed", reply["status"], reply["error"])
        elif job.is_late:
            self._end(job, "failed", 504, self._late_text())
        else:
            self._end(job, "cancelled", 499, "cancelled")

    async def _after_death(self, job: Job, was_killed: bool) -> None:
        is_over = not was_killed or job.is_late or job.tries >= MAX_TRIES
        if job.operation == "load_weights" and is_over:
            # It would only end the next engine as well.
            self._end(job, "failed", 422, "the engine process ended while it loaded these weights")
        elif job.is_late:
            self._end(job, "failed", 504, self._late_text())
        elif job.is_given_up:
            self._end(job, "cancelled", 499, "cancelled")
        elif job.tries < MAX_TRIES and self.is_ready and not job.num_texts:
            # What was sent cannot be taken back: a stream that has begun is not begun again.
            await self._run_one(job)
        else:
            self._end(job, "failed", 503, "the engine process died on this request")

    def _late_text(self) -> str:
        return (
            f"the answer took longer than {self.request_timeout_s:g} s (--request-timeout of "
            "trainer serve); ask for fewer tokens"
        )

    async def _ask(
        self, number: int, operation: str, body: bytes, on_text: Any = None
    ) -> tuple[Reply, int]:
        loop = asyncio.get_running_loop()
        is_load = operation == "load_weights"
        self._limit_s = max(LOAD_TIMEOUT_S * is_load, self.request_timeout_s)
        self._asked_at = loop.time()
        try:
            return await loop.run_in_executor(
                self._thread, self.engine.ask, number, operation, body, on_text
            )
        finally:
            self._asked_at = None

    async def _ask_for(self, job: Job) -> Reply:
        loop = asyncio.get_running_loop()

        def on_text(sample: int, text: str) -> None:
            loop.call_soon_threadsafe(job.add_text, sample, text)

        told = on_text if job.texts is not None else None
        reply, job.result_bytes = await self._ask(job.message_id, job.operation, job.body, told)
        return reply

    async def _activate(self, job: Job) -> Reply | None:
        """Load the weights that must answer; gives the engine's refusal, if it refuses.

        Here and not as a job of its own, so that nobody else's weights come between the two.
        """
        if job.operation == "load_weights":
            return None
        job.tag = tag = job.needs or dict(self.active)
        if tag["weights_id"] is None:
            return {"ok": False, "status": 503, "error": "waiting for the weights of a trainer"}
        if tag["weights_id"] == self.loaded:
            return None
        reply = await self._load(tag["weights_id"])
        return None if reply["ok"] else reply

    async def _load(self, weights_id: str) -> Reply:
        """Put kept weights into the engine."""
        kept = self.find_weights(weights_id)
        if kept is None:
            return {
                "ok": False,
                "status": 409,
                "error": "this server no longer keeps these weights",
            }
        body = json.dumps(kept).encode()
        reply, _ = await self._ask(self.engine.new_id(), "load_weights", body)
        if reply["ok"]:
            self.loaded = weights_id
        return reply

    def _note(self, job: Job, result: Reply) -> None:
        if job.operation == "load_weights":
            assert job.needs is not None, "a load says what it makes active"
            self.active = dict(job.needs)
            self.loaded = self.active["weights_id"]
        elif job.operation != "previews":
            assert job.tag is not None, "_activate set it"
            result |= {"run": job.tag["run"], "step": job.tag["step"]}
        job.result = result

    # ---- the engine's life

    async def _restart(self) -> None:
        """A new engine with the active weights; not ready until both are there."""
        self.is_ready = self._is_up = self._is_gone = False
        self.restarts += 1
        logger.error("the engine process ended; starting a new one")
        try:
            await asyncio.to_thread(self.engine.start)
            self.loaded, self._is_up = self.engine.hello["weights_id"], True
            wanted = self.active["weights_id"]
            if wanted is not None and wanted != self.loaded:
                reply = await self._load(wanted)
                if not reply["ok"]:
                    # Others must not answer in their place.
                    logger.error("the active weights could not be loaded again: %s", reply["error"])
                    self.active = dict(NO_WEIGHTS)
            self.is_ready, self._is_broken = True, False
        except (ModelError, EngineDiedError) as error:
            logger.error("the engine could not be restarted; next attempt later: %s", error)
            self._is_broken, self._is_up = True, False

    async def watch(self) -> None:
        """End an engine that hangs or answers for too long, and notice one that is gone."""
        beats, silent, missing = -1, 0, 0
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._is_up:
                silent = missing = 0
                continue
            if not self.engine.is_alive:
                # Whoever asks it something notices by himself.
                missing = missing + 1 if self._asked_at is None else 0
                if missing > 1 and self._running is None:
                    self.is_ready, self._is_gone = False, True
                    self._wake.set()
                continue
            seen = self.engine.beats
            silent = silent + 1 if seen == beats else 0
            beats, missing = seen, 0
            if silent >= SILENT_POLLS:
                logger.error("the engine process does not respond; stopping it")
                self.is_ready, silent = False, 0
                self.engine.kill()
            else:
                self._check_time()

    def _check_time(self) -> None:
        """Give up what takes too long, and the engine with it where it does not notice."""
        if self._asked_at is None:
            return
        seconds = asyncio.get_running_loop().time() - self._asked_at
        if seconds > self._limit_s and self._running is not None:
            self._running.is_late = True
            self.engine.cancel(self._running.message_id)
        if seconds > self._limit_s + GIVE_UP_S:
            logger.error("the engine does not react to a cancellation; stopping it")
            self.is_ready = False
            self.engine.kill()
