"""The bounded queue before the engine: one job at a time, one ending for every job."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import heapq
import itertools
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import ModelError
from trainer.server.worker import EngineDiedError, EngineProcess

logger = logging.getLogger(__name__)
Status = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_QUEUED = 64
KEPT_JOBS = 512
RESTART_PAUSE_S = 5.0
MAX_TRIES = 2
"""A job that the engine died on is tried again once."""


class QueueFullError(Exception):
    """No room: the client should come back later."""


class KeyReusedError(Exception):
    """An Idempotency-Key that named another request before."""


@dataclass(eq=False)
class Job:
    """One message for the engine and what became of it."""

    operation: str
    body: Any
    needs: dict[str, Any] | None = None
    """weights_id, run and step of the weights that must answer; None: the active ones."""
    texts: asyncio.Queue[str | None] | None = None
    """Pieces of the answer while it is made, None behind the last; None: not asked for."""
    num_texts: int = 0
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    status: Status = "queued"
    result: dict[str, Any] | None = None
    error: str | None = None
    code: int = 200
    tries: int = 0
    message_id: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, status: Status, code: int, error: str | None = None) -> None:
        """End the job, once."""
        if not self.done.is_set():
            self.status, self.code, self.error = status, code, error
            self.done.set()
            if self.texts is not None:
                self.texts.put_nowait(None)

    def add_text(self, text: str) -> None:
        """Pass a piece of the answer on."""
        assert self.texts is not None, "only asked for where there is a queue"
        self.num_texts += 1
        self.texts.put_nowait(text)

    def public(self) -> dict[str, Any]:
        """What `GET /jobs/{id}` answers."""
        found = {"job_id": self.id, "status": self.status}
        if self.status == "done":
            return {**found, "result": self.result}
        return {**found, "error": self.error} if self.error else found


class JobQueue:
    """Feeds the engine; previews and weights go before chat."""

    def __init__(
        self, engine: EngineProcess, find_weights: Callable[[str], dict[str, Any] | None]
    ) -> None:
        """Take an engine, and a function that gives the `load_weights` of a kept weights_id."""
        self.engine, self.find_weights = engine, find_weights
        self.active: dict[str, Any] = {"weights_id": None, "run": None, "step": None}
        self.committed: dict[str, Any] | None = None
        """Body of the `load_weights` that a restarted engine has to repeat."""
        self.jobs: dict[str, Job] = {}
        self.is_ready = False
        self.restarts = 0
        self.ended: collections.Counter[str] = collections.Counter()
        self._keys: dict[tuple[str, str], str] = {}
        self._heap: list[tuple[int, int, Job]] = []
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._is_broken = False

    @property
    def waiting(self) -> int:
        """Jobs that wait for the engine."""
        return sum(not job.done.is_set() for _, _, job in self._heap)

    def engine_started(self) -> None:
        """Take jobs: the engine is there, with the weights that it loaded by itself."""
        self.active = {"weights_id": self.engine.hello["weights_id"], "run": None, "step": None}
        self.is_ready = True

    def submit(
        self,
        operation: str,
        body: Any,
        key: str | None = None,
        *,
        needs: dict[str, Any] | None = None,
        is_streamed: bool = False,
    ) -> Job:
        """Put a job into the queue.

        Args:
            key: the client's Idempotency-Key: the job that it named before is given again.
            needs: weights_id, run and step of the weights that must answer.
            is_streamed: the answer's text is wanted while it is made.
        Raises:
            QueueFullError: MAX_QUEUED jobs wait already.
            KeyReusedError: the key came with another body before.
        """
        known = self.jobs.get(self._keys.get((operation, key), "")) if key else None
        if known is not None and known.status not in ("failed", "cancelled"):
            if known.body != body:
                raise KeyReusedError
            return known
        if self.waiting >= MAX_QUEUED:
            raise QueueFullError
        job = Job(operation, body, needs, asyncio.Queue() if is_streamed else None)
        self.jobs[job.id] = job
        if key:
            self._keys[operation, key] = job.id
        self._forget_old()
        priority = 0 if operation in ("previews", "load_weights") else 1
        heapq.heappush(self._heap, (priority, next(self._numbers), job))
        self._wake.set()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for; a running one stops before its next token."""
        if job.status == "running":
            self.engine.cancel(job.message_id)
        elif job.status == "queued":
            job.finish("cancelled", 499, "cancelled")

    def _forget_old(self) -> None:
        for job in list(self.jobs.values()):
            if len(self.jobs) <= KEPT_JOBS:
                return
            if job.done.is_set():
                del self.jobs[job.id]
                self._keys = {k: v for k, v in self._keys.items() if v != job.id}

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            if self._is_broken:
                await asyncio.sleep(RESTART_PAUSE_S)
                await self._restart()
                continue
            if not self._heap:
                self._wake.clear()
                await self._wake.wait()
                continue
            _, _, job = heapq.heappop(self._heap)
            try:
                if not job.done.is_set():
                    await self._run_one(job)
            except Exception:  # this loop must go on whatever a job does
                logger.exception("a %s job failed in the queue", job.operation)
                job.finish("failed", 500, "internal error; the server's log says more")
            self.ended[job.status] += 1

    async def _run_one(self, job: Job) -> None:
        job.status, job.tries = "running", job.tries + 1
        job.message_id = self.engine.new_id()
        try:
            reply = await self._activate(job) or await self._ask(job)
        except EngineDiedError:
            await self._restart()
            # What was sent cannot be taken back: a stream that has begun is not begun again.
            if job.tries < MAX_TRIES and self.is_ready and not job.num_texts:
                await self._run_one(job)
            else:
                job.finish("failed", 503, "the engine process died on this request")
            return
        if reply["ok"]:
            self._note(job, reply["result"])
            job.finish("done", 200)
        elif reply["status"] == 499:
            job.finish("cancelled", 499, "cancelled")
        else:
            job.finish("failed", reply["status"], reply["error"])

    async def _ask(self, job: Job) -> dict[str, Any]:
        loop = asyncio.get_running_loop()

        def on_text(text: str) -> None:
            loop.call_soon_threadsafe(job.add_text, text)

        return await asyncio.to_thread(
            self.engine.ask,
            job.message_id,
            job.operation,
            job.body,
            on_text if job.texts is not None else None,
        )

    async def _activate(self, job: Job) -> dict[str, Any] | None:
        """Load the weights that a job needs; gives the engine's refusal, if it refuses.

        Here and not as a job of its own, so that nobody else's weights come between the two.
        """
        if job.needs is None or job.needs["weights_id"] == self.active["weights_id"]:
            return None
        kept = self.find_weights(job.needs["weights_id"])
        if kept is None:
            return {"ok": False, "status": 409, "error": "these weights are no longer kept here"}
        body = {**kept, "run": job.needs["run"], "step": job.needs["step"]}
        reply = await asyncio.to_thread(
            self.engine.ask, self.engine.new_id(), "load_weights", body, None
        )
        if not reply["ok"]:
            return reply
        self._loaded(body)
        return None

    def _loaded(self, body: dict[str, Any]) -> None:
        self.committed = body
        self.active = {name: body[name] for name in ("weights_id", "run", "step")}

    def _note(self, job: Job, result: dict[str, Any]) -> None:
        if job.operation == "load_weights":
            self._loaded(job.body)
        elif job.operation != "previews":
            result |= {"run": self.active["run"], "step": self.active["step"]}
        job.result = result

    async def _restart(self) -> None:
        """A new engine with the last committed weights; not ready until both are there."""
        self.is_ready = False
        self.restarts += 1
        logger.error("the engine process died; starting a new one")
        try:
            await asyncio.to_thread(self.engine.start)
            if self.committed is not None:
                number = self.engine.new_id()
                reply = await asyncio.to_thread(
                    self.engine.ask, number, "load_weights", self.committed, None
                )
                if not reply["ok"]:
                    logger.error("the committed weights do not load again: %s", reply["error"])
                    self.committed = None
                    self.engine_started()
            self.is_ready, self._is_broken = True, False
        except (ModelError, EngineDiedError) as error:
            logger.error("the engine could not be started again, trying later: %s", error)
            self._is_broken = True

    async def wait(self, job: Job, timeout_s: float) -> None:
        """Wait until the job ended, or for `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.done.wait(), timeout_s)
