"""One upload, and the private folder that a server keeps uploads in. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.publish.wire import PART_BYTES, WeightsOffer
from trainer.server.problems import WeightsRefusedError

BROKEN_S = 30.0
"""A part of which no byte has come for so long is given up."""


@dataclass
class Upload:
    """One offer and its parts, which arrive in any order, each at its place in a file."""

    id: str
    offer: WeightsOffer
    weights_id: str
    path: Path
    limit: int
    """Bytes the file may have."""
    clock: Callable[[], float]
    """Seconds."""
    parts: set[int] = field(default_factory=set)
    size: int = 0
    is_sealed: bool = False
    """True while the file is checked, and ever after: nothing may be written to it."""
    is_stored: bool = False
    """True once it was checked: the file lies where the kept sets do."""
    writers: int = 0
    """Requests that are sending a part now."""
    epoch: int = 0
    """Grows when it starts over: what a request before that still sends is not taken."""
    used_at: float | None = None
    """When something was last heard of it; None: it may go as soon as its place is needed."""

    def __post_init__(self) -> None:
        self.used_at = self.clock()

    @property
    def idle_s(self) -> float:
        """Seconds for which nothing has been heard of it."""
        return float("inf") if self.used_at is None else self.clock() - self.used_at

    @property
    def is_busy(self) -> bool:
        """Whether it is being committed, or a part of it comes in just now."""
        return self.is_sealed or (self.writers > 0 and self.idle_s < BROKEN_S)

    @property
    def is_unused(self) -> bool:
        """Whether nothing of it is here, so that its client loses nothing with its place."""
        return not (self.parts or self.writers or self.is_stored)

    @property
    def tag(self) -> dict[str, Any]:
        """weights_id, run and step."""
        return {"weights_id": self.weights_id, "run": self.offer.run, "step": self.offer.step}

    def touch(self) -> None:
        """Something was heard of it, unless it may go."""
        if self.used_at is not None:
            self.used_at = self.clock()

    def start_over(self) -> None:
        """Forget what has arrived; the place is given to the next one who needs it."""
        self.parts.clear()
        self.size, self.is_stored, self.used_at = 0, False, None
        self.epoch += 1

    async def put(self, number: int, digest: str, stream: AsyncIterator[bytes]) -> None:
        """Write one part to its place; it counts only when its hash is right.

        Raises:
            WeightsRefusedError: outside the file, too long, or another hash.
        """
        start = number * PART_BYTES
        if self.offer.transport != "http" or start >= self.limit:
            raise WeightsRefusedError(422, "bad_part", f"this upload has no part {number}")
        if self.is_stored:
            raise WeightsRefusedError(
                409, "committing", "all parts of this upload have arrived; commit it"
            )
        self.parts.discard(number)
        self.used_at, epoch = self.clock(), self.epoch
        self.writers += 1
        try:
            found, length = await self._write(start, stream)
        except OSError as error:
            raise no_room(f"part {number}", error) from error
        finally:
            self.writers -= 1
        if self.epoch != epoch:
            raise WeightsRefusedError(
                409, "started_over", "this upload was restarted; send its parts again"
            )
        if found.hexdigest() != digest:
            raise WeightsRefusedError(
                422, "bad_part_hash", f"part {number} does not match its hash (X-Part-Sha256)"
            )
        self.parts.add(number)
        self.size = max(self.size, start + length)

    async def _write(self, start: int, stream: AsyncIterator[bytes]) -> tuple[Any, int]:
        """Put a stream at its place in the file; its hash and length."""
        found, length, epoch = hashlib.sha256(), 0, self.epoch
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            async for piece in stream:
                if length + len(piece) > min(PART_BYTES, self.limit - start):
                    raise WeightsRefusedError(413, "too_large", "the part is too long")
                # Asked at every piece: a connection that hangs must not hold up a commit, nor
                # write once the file has been checked. Nothing is buffered, for the same reason.
                if self.is_sealed or self.epoch != epoch:
                    raise WeightsRefusedError(409, "committing", "this upload is being committed")
                self.used_at = self.clock()
                found.update(piece)
                _write_all(descriptor, piece, start + length)
                length += len(piece)
        finally:
            os.close(descriptor)
        return found, length

    def seal(self) -> None:
        """Take no more parts: what is checked must be what is loaded.

        Raises:
            WeightsRefusedError: 503, the set is being committed already.
        """
        if self.is_sealed:
            raise WeightsRefusedError(503, "committing", "this upload is being committed")
        self.is_sealed = True


def _write_all(descriptor: int, piece: bytes, offset: int) -> None:
    left = memoryview(piece)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count


def no_room(what: str, error: OSError) -> WeightsRefusedError:
    """The answer where the disk is full or refuses."""
    return WeightsRefusedError(507, "no_room", f"{what} cannot be stored ({error.strerror})")


# ---- the folder where uploads and committed sets of one server lie, and what killed ones left


PREFIX = "trainer-serve-"

LOCK = "lock"


class PrivateFolder:
    """A folder (mode 700) that is this server's while it runs: its lock file is held.

    A server that was killed leaves its folder behind with a lock that nobody holds; the next one
    removes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Remove what is left of killed servers, and make a folder of our own.

        Args:
            parent: None: the system's folder for temporary files.
        Raises:
            OSError: no folder can be made there.
        """
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove the folder; the lock is held until nothing is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove folders of servers that no longer run; gives them."""
    return [path for path in sorted(parent.glob(f"{PREFIX}*")) if _remove_if_abandoned(path)]


def _remove_if_abandoned(path: Path) -> bool:
    try:
        state = path.lstat()
        if path.is_symlink() or not path.is_dir() or state.st_uid != os.getuid():
            return False  # whoever else may write to a folder for all made it
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False  # gone by now, or just being made: it has no lock file yet
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its server runs
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(lock)
