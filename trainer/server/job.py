"""A job, and the book of jobs that were asked for: bounded in number and in bytes."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["queued", "running", "done", "failed", "cancelled"]

KEPT_JOBS = 512

KEPT_BYTES = 32 << 20
"""Of results, as the engine wrote them: older ones are forgotten first."""


class KeyReusedError(Exception):
    """An Idempotency-Key that named another request before."""


@dataclass(eq=False)
class Job:
    """One message for the engine and what became of it."""

    operation: str
    body: bytes
    """JSON for the engine; dropped when the job ends."""
    needs: dict[str, Any] | None = None
    """weights_id, run and step of the weights that must answer; None: those that are active when
    the job begins."""
    client: str = ""
    """Who shares the engine with others of its kind."""
    texts: asyncio.Queue[tuple[int, str] | None] | None = None
    """Samples' numbers and pieces of them while they are made, None behind the last; None: not
    asked for."""
    key: str | None = None
    digest: bytes = b""
    """Of the body, to know the same request again."""
    num_texts: int = 0
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    status: Status = "queued"
    result: dict[str, Any] | None = None
    result_bytes: int = 0
    error: str | None = None
    code: int = 200
    tries: int = 0
    message_id: int = 0
    waiters: int = 0
    """Requests that wait for the answer."""
    is_polled: bool = False
    """True for a job that somebody asks for by its id: it ends by itself or when it is told."""
    is_given_up: bool = False
    """True once it was asked to end: it answers nobody else."""
    is_late: bool = False
    """True when it ends because its time is over."""
    tag: dict[str, Any] | None = None
    """weights_id, run and step of the weights that answer, known when the job runs."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, status: Status, code: int, error: str | None = None) -> None:
        """End the job, once."""
        if not self.done.is_set():
            self.status, self.code, self.error = status, code, error
            self.body = b""
            self.done.set()
            if self.texts is not None:
                self.texts.put_nowait(None)

    def add_text(self, sample: int, text: str) -> None:
        """Pass a piece of the answer on."""
        assert self.texts is not None, "only asked for where there is a queue"
        self.num_texts += 1
        self.texts.put_nowait((sample, text))

    def public(self) -> dict[str, Any]:
        """What `GET /jobs/{id}` answers."""
        found = {"job_id": self.id, "status": self.status}
        if self.status == "done":
            return {**found, "result": self.result}
        return {**found, "error": self.error} if self.error else found

    @property
    def kind(self) -> str:
        """Which share of the engine it uses."""
        return {"load_weights": "weights", "previews": "previews"}.get(self.operation, "chat")


class JobBook:
    """Jobs by id and by Idempotency-Key; those that ended are forgotten, the oldest first."""

    def __init__(self) -> None:
        """No jobs yet."""
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self._keys: dict[tuple[str, str], str] = {}

    def find(self, operation: str, key: str, digest: bytes) -> Job | None:
        """The job that this key names and that can still answer.

        Raises:
            KeyReusedError: the key came with another body.
        """
        known = self.jobs.get(self._keys.get((operation, key), ""))
        if known is None or known.is_given_up or known.status in ("failed", "cancelled"):
            return None
        if known.digest != digest:
            raise KeyReusedError
        return known

    def add(self, job: Job) -> None:
        """Note a job."""
        self.jobs[job.id] = job
        if job.key is not None:
            self._keys[job.operation, job.key] = job.id
        self.forget_old()

    def forget_old(self, but: Job | None = None) -> None:
        """Drop the oldest ended jobs (but one) until number and bytes are within bounds."""
        kept = sum(job.result_bytes for job in self.jobs.values())
        for job in list(self.jobs.values()):
            if len(self.jobs) <= KEPT_JOBS and kept <= KEPT_BYTES:
                return
            if job.done.is_set() and not job.waiters and job is not but:
                kept -= job.result_bytes
                self._drop(job)

    def _drop(self, job: Job) -> None:
        del self.jobs[job.id]
        if job.key is not None and self._keys.get((job.operation, job.key)) == job.id:
            del self._keys[job.operation, job.key]


def body_digest(body: bytes) -> bytes:
    """What a request is known by."""
    return hashlib.sha256(body).digest()
