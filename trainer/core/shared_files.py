"""One run folder for all processes: that they see it, and how they write and hash files in it."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import files
from trainer.core.checkpoint import Hashes, hash_files
from trainer.core.together import Ask, num_ranks, rank_of_this
from trainer.errors import OutputError

SIGHT_S = 20.0
"""Longest wait until a file of another machine is seen; network file systems take a while."""

SEE, WRITE, HASH = "see", "write", "hash"


def shared_tasks(
    write_share: Callable[[Path], Hashes] | None = None,
) -> dict[str, Callable[..., Any]]:
    """What rank 0 asks of the others, and of itself, for files of the run folder.

    Args:
        write_share: writes this process's shards into a folder.
    """
    tasks: dict[str, Callable[..., Any]] = {SEE: sees, HASH: _hash_own}
    return tasks if write_share is None else {**tasks, WRITE: write_share}


def sees(path: Path) -> str | None:
    """The name of this machine where it does not see what rank 0 has made."""
    end = time.monotonic() + SIGHT_S
    while not path.exists():
        if time.monotonic() > end:
            return socket.gethostname()
        time.sleep(0.05)
    return None


def blind_ranks(ask: Ask, folder: Path) -> list[str]:
    """The ranks, with their machines, that do not see what rank 0 writes into a folder."""
    marker = folder / f".seen-by-all-{secrets.token_hex(8)}"
    try:
        marker.touch()
        found = ask(SEE, marker)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error}).") from error
    finally:
        files.remove_quietly(marker)
    return [f"rank {rank} (on {host})" for rank, host in enumerate(found) if host is not None]


def check_shared(ask: Ask, folder: Path) -> None:
    """Refuse a run whose processes do not see the same folder.

    Raises:
        OutputError: one line that names those that do not.
    """
    blind = blind_ranks(ask, folder)
    if blind:
        raise OutputError(
            f"--output {folder}: {', '.join(blind)} cannot see what rank 0 (on "
            f"{socket.gethostname()}) writes there, and all processes of this run write and read "
            "its checkpoints; give a folder on a file system that all machines share."
        )


class SharedWriting:
    """How rank 0 has a checkpoint written by all processes."""

    def __init__(self, ask: Ask, write_rest: Callable[[Path], None], is_shared: bool) -> None:
        """Write nothing yet.

        Args:
            ask: with the tasks of `shared_tasks`.
            write_rest: writes the files that only rank 0 writes.
            is_shared: the other processes write files too.
        """
        self._ask, self._write_rest, self._is_shared = ask, write_rest, is_shared
        self._owners: dict[str, int] = {}

    def write(self, folder: Path) -> Hashes:
        """Have everything written into a folder.

        Returns:
            What the processes have written each, and hashed.
        Raises:
            OSError: one could not; it is named.
        """
        found: Hashes = {}
        if self._is_shared:
            check_shared(self._ask, folder)
            for rank, one in enumerate(self._ask(WRITE, folder)):
                found |= one
                self._owners |= dict.fromkeys(one, rank)
        self._write_rest(folder)
        return found

    def hash_again(self, folder: Path, names: list[str]) -> dict[str, str]:
        """The sha256 of files: each process reads those that it wrote."""
        if not self._is_shared:
            return hash_files(folder, names)
        shares: dict[int, list[str]] = {}
        for name in names:
            shares.setdefault(self._owners.get(name, 0), []).append(name)
        return _hash_by(self._ask, folder, shares)


def hash_together(ask: Ask, *, is_shared: bool) -> Callable[[Path, list[str]], dict[str, str]]:
    """Hashing of files whoever wrote them.

    Args:
        is_shared: all see the same folder, and each process reads about as many bytes; else each
            reads all files of its own copy.
    """

    def hashing(folder: Path, names: list[str]) -> dict[str, str]:
        ranks = range(num_ranks())
        if not is_shared:
            return _hash_by(ask, folder, dict.fromkeys(ranks, names))
        sizes = {name: (folder / name).stat().st_size for name in names}
        shares: dict[int, list[str]] = {rank: [] for rank in ranks}
        filled = dict.fromkeys(ranks, 0)
        for name in sorted(names, key=lambda one: -sizes[one]):
            rank = min(filled, key=lambda one: filled[one])
            shares[rank].append(name)
            filled[rank] += sizes[name]
        return _hash_by(ask, folder, shares)

    return hashing


def _hash_by(ask: Ask, folder: Path, shares: dict[int, list[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in ask(HASH, folder, shares):
        for name, digest in one.items():
            if found.setdefault(name, digest) != digest:
                raise OSError(f"the processes read another {name} each")
    return found


def _hash_own(folder: Path, shares: dict[int, list[str]]) -> dict[str, str]:
    return hash_files(folder, shares.get(rank_of_this(), []))
