"""One upload: parts that arrive in any order, each at its place in a private file. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.preview.wire import PART_BYTES, WeightsOffer
from trainer.server.problems import WeightsRefusedError


@dataclass
class Upload:
    """One offer and the parts of it that have arrived."""

    id: str
    offer: WeightsOffer
    weights_id: str
    path: Path
    limit: int
    """Bytes the file may have."""
    parts: set[int] = field(default_factory=set)
    size: int = 0
    is_sealed: bool = False
    """True while the file is checked, and ever after: nothing may be written to it."""
    is_stored: bool = False
    """True once it was checked: the file lies where the kept sets do."""

    async def put(self, number: int, digest: str, stream: AsyncIterator[bytes]) -> None:
        """Write one part to its place; it counts only when its hash is right.

        Raises:
            WeightsRefusedError: outside the file, too long, or another hash.
        """
        start = number * PART_BYTES
        if self.offer.transport != "http" or start >= self.limit:
            raise WeightsRefusedError(422, "bad_part", f"this upload takes no part {number}")
        if self.is_stored:
            raise WeightsRefusedError(409, "committing", "this upload is whole; commit it")
        self.parts.discard(number)
        try:
            found, length = await self._write(start, stream)
        except OSError as error:
            raise no_room(f"part {number}", error) from error
        if found.hexdigest() != digest:
            raise WeightsRefusedError(
                422, "bad_part_hash", f"part {number} does not have the hash that came with it"
            )
        self.parts.add(number)
        self.size = max(self.size, start + length)

    async def _write(self, start: int, stream: AsyncIterator[bytes]) -> tuple[Any, int]:
        """Put a stream at its place in the file; its hash and length."""
        found, length = hashlib.sha256(), 0
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            async for piece in stream:
                if length + len(piece) > min(PART_BYTES, self.limit - start):
                    raise WeightsRefusedError(413, "too_large", "the part is too long")
                # Asked at every piece: a connection that hangs must not hold up a commit, nor
                # write once the file has been checked. Nothing is buffered, for the same reason.
                if self.is_sealed:
                    raise WeightsRefusedError(409, "committing", "this upload is being committed")
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
