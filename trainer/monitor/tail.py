"""LineTail: the new whole lines of a growing file, each of them once."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

CHUNK = 8 << 20
"""Bytes read at a time."""
MAX_LINE = 16 << 20
"""A line that is longer is left out and counted: no run writes one."""
MARK = 64
"""Bytes before the place where reading stopped that must still be there at the next poll."""


@dataclass(frozen=True)
class NewLines:
    """What one poll found."""

    lines: list[bytes]
    """Whole lines without line feeds, in order."""
    is_reset: bool = False
    """The file is another one than before (replaced, shortened, gone): forget earlier lines."""
    num_too_long: int = 0
    """Lines above MAX_LINE, left out."""


class LineTail:
    """Remembers how far a file was read. A half-written last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        """Take the file; it may not exist yet."""
        self.path = path
        self._offset = 0
        self._mark = b""
        self._inode: int | None = None
        self._is_skipping = False

    def poll(self) -> NewLines:
        """Read what was added since the last call.

        Raises:
            OSError: the file is there and cannot be read, or is no regular file.
        """
        try:
            # O_NONBLOCK: opening a named pipe that somebody put there must not hang.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            was_read = self._offset > 0 or self._is_skipping
            self._restart(None)
            return NewLines([], is_reset=was_read)
        with os.fdopen(descriptor, "rb", buffering=0):
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{self.path} is not a regular file")
            is_reset = self._is_other(descriptor, found)
            if is_reset:
                self._restart(found.st_ino)
            self._inode = found.st_ino
            lines, num_too_long = self._read(descriptor)
        return NewLines(lines, is_reset=is_reset, num_too_long=num_too_long)

    def _restart(self, inode: int | None) -> None:
        self._offset, self._mark, self._inode, self._is_skipping = 0, b"", inode, False

    def _is_other(self, descriptor: int, found: os.stat_result) -> bool:
        if self._inode is None:
            return False
        if found.st_ino != self._inode or found.st_size < self._offset:
            return True
        start = self._offset - len(self._mark)
        return os.pread(descriptor, len(self._mark), start) != self._mark

    def _read(self, descriptor: int) -> tuple[list[bytes], int]:
        lines: list[bytes] = []
        rest, num_too_long = b"", 0
        position = self._offset
        while chunk := os.pread(descriptor, CHUNK, position):
            position += len(chunk)
            data = rest + chunk
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                found = data[: end - 1].split(b"\n")
                if self._is_skipping:  # the end of a line whose beginning was thrown away
                    self._is_skipping = False
                    del found[0]
                lines += found
            if len(rest) > MAX_LINE:
                num_too_long += not self._is_skipping
                self._is_skipping, rest = True, b""
        self._offset = position - len(rest)
        self._mark = os.pread(descriptor, min(MARK, self._offset), max(0, self._offset - MARK))
        return lines, num_too_long
