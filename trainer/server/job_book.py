"""Jobs that were asked for, and which of those that wait is next. No engine and no HTTP here."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

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


# ---- fair shares of the engine: which waiting job is next
#
# Jobs are of a kind (weights, previews, chat) and of a client within it. The kind that has had the
# least engine time is next, and within it the client that has had the least: nobody who asks often
# keeps the others waiting for more than the job that runs.


T = TypeVar("T", bound=Hashable)

MAX_CLIENTS = 256
"""Clients whose engine time is remembered while they have nothing waiting."""

SAVED_S = 30.0
"""Engine seconds that somebody who had nothing waiting may be behind the others, at most."""


@dataclass
class _Share(Generic[T]):
    """Engine seconds that somebody has had, and what waits, oldest first."""

    seconds: float = 0.0
    waiting: OrderedDict[T, None] = field(default_factory=OrderedDict)


class FairQueue(Generic[T]):
    """Waiting jobs; every operation takes time that does not grow with their number."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._kinds: dict[str, float] = {}
        self._clients: dict[str, OrderedDict[str, _Share[T]]] = {}
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._count.values())

    def waiting(self, kind: str) -> int:
        """How many jobs of a kind wait."""
        return self._count.get(kind, 0)

    def push(self, job: T, kind: str, client: str) -> None:
        """Add a job behind its client's others."""
        clients = self._clients.setdefault(kind, OrderedDict())
        if not self.waiting(kind):
            busy = [self._kinds[one] for one in self._kinds if self.waiting(one)]
            self._kinds[kind] = _level(self._kinds.get(kind, 0.0), busy)
        share = clients.setdefault(client, _Share())
        if not share.waiting:
            others = [one.seconds for one in clients.values() if one.waiting]
            share.seconds = _level(share.seconds, others)
        share.waiting[job] = None
        clients.move_to_end(client)
        self._count[kind] = self.waiting(kind) + 1
        self._forget_idle(clients)

    def pop(self) -> tuple[T, str, str]:
        """The job that is next, with its kind and client.

        Raises:
            IndexError: nothing waits.
        """
        kinds = [one for one in self._kinds if self.waiting(one)]
        if not kinds:
            raise IndexError("nothing waits")
        kind = min(kinds, key=self._kinds.__getitem__)
        clients = self._clients[kind]
        client = min(
            (name for name, share in clients.items() if share.waiting),
            key=lambda name: clients[name].seconds,
        )
        job = next(iter(clients[client].waiting))
        self.remove(job, kind, client)
        return job, kind, client

    def remove(self, job: T, kind: str, client: str) -> None:
        """Take a job out, wherever it stands; one that is not there changes nothing."""
        share = self._share(kind, client)
        if share is not None and job in share.waiting:
            del share.waiting[job]
            self._count[kind] -= 1

    def charge(self, kind: str, client: str, seconds: float) -> None:
        """Note engine time that was used."""
        self._kinds[kind] = self._kinds.get(kind, 0.0) + seconds
        share = self._share(kind, client)
        if share is not None:
            share.seconds += seconds

    def _share(self, kind: str, client: str) -> _Share[T] | None:
        clients = self._clients.get(kind)
        return None if clients is None else clients.get(client)

    def _forget_idle(self, clients: OrderedDict[str, _Share[T]]) -> None:
        for name in list(clients):
            if len(clients) <= MAX_CLIENTS:
                return
            if not clients[name].waiting:
                del clients[name]


def _level(seconds: float, others: list[float]) -> float:
    """Engine time of somebody who comes back: what was not used for long is not saved up."""
    return max(seconds, min(others) - SAVED_S) if others else seconds
