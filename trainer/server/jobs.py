"""The bounded queue before the engine: one job at a time, one ending for every job."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import heapq
import itertools
import logging
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import ModelError
from trainer.server.worker import EngineDiedError, EngineProcess

logger = logging.getLogger(__name__)
Status = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_QUEUED = 64
KEPT_JOBS = 512
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

    def public(self) -> dict[str, Any]:
        """What `GET /jobs/{id}` answers."""
        found = {"job_id": self.id, "status": self.status}
        if self.status == "done":
            return {**found, "result": self.result}
        return {**found, "error": self.error} if self.error else found


class JobQueue:
    """Feeds the engine; previews and weights go before chat."""

    def __init__(self, engine: EngineProcess) -> None:
        """Take a started engine."""
        self.engine = engine
        self.active: dict[str, Any] = {
            "weights_id": engine.hello["weights_id"],
            "run": None,
            "step": None,
        }
        self.committed: dict[str, Any] | None = None
        """Body of the `load_weights` that a restarted engine has to repeat."""
        self.jobs: dict[str, Job] = {}
        self.is_ready = True
        self.restarts = 0
        self.ended: collections.Counter[str] = collections.Counter()
        self._keys: dict[tuple[str, str], str] = {}
        self._heap: list[tuple[int, int, Job]] = []
        self._numbers = itertools.count()
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Jobs that wait for the engine."""
        return sum(not job.done.is_set() for _, _, job in self._heap)

    def submit(self, operation: str, body: Any, key: str | None = None) -> Job:
        """Put a job into the queue.

        Args:
            key: the client's Idempotency-Key: the job that it named before is given again.
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
        job = Job(operation, body)
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
            while not self._heap:
                self._wake.clear()
                await self._wake.wait()
            _, _, job = heapq.heappop(self._heap)
            if not job.done.is_set():
                await self._run_one(job)
            self.ended[job.status] += 1

    async def _run_one(self, job: Job) -> None:
        job.status, job.tries = "running", job.tries + 1
        job.message_id = self.engine.new_id()
        try:
            reply = await asyncio.to_thread(
                self.engine.ask, job.message_id, job.operation, job.body
            )
        except EngineDiedError:
            await self._restart()
            if job.tries < MAX_TRIES and self.is_ready:
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

    def _note(self, job: Job, result: dict[str, Any]) -> None:
        if job.operation == "load_weights":
            self.committed = job.body
            self.active = {name: job.body[name] for name in ("weights_id", "run", "step")}
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
                    self.engine.ask, number, "load_weights", self.committed
                )
                if not reply["ok"]:
                    raise ModelError(f"the committed weights do not load: {reply['error']}")
            self.is_ready = True
        except (ModelError, EngineDiedError) as error:
            logger.error("the engine could not be started again: %s", error)

    async def wait(self, job: Job, timeout_s: float) -> None:
        """Wait until the job ended, or for `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.done.wait(), timeout_s)
