"""Fair shares of the engine: which waiting job is next. No engine and no HTTP here.

Jobs are of a kind (weights, previews, chat) and of a client within it. The kind that has had the
least engine time is next, and within it the client that has had the least: nobody who asks often
keeps the others waiting for more than the job that runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
