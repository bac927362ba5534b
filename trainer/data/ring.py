"""Pieces of bytes in one nameless file of bounded size: room that was given back is used again."""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.file_arrays import OpenFile
from trainer.data.spool import nameless_file
from trainer.errors import DataError

Array = np.ndarray[Any, Any]


class Ring:
    """A file of pieces; it is gone with the process, however it ends."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        """Make the file.

        Args:
            folder: for the file; where it cannot be written it goes where temporary files go.
            max_bytes: the file is no larger; None: any size.
        Raises:
            DataError: no file can be made.
        """
        self.folder, self.max_bytes = folder, max_bytes
        try:
            self._file = nameless_file(folder)
        except OSError as error:
            raise self._no_room(error) from error
        weakref.finalize(self, self._file.close)
        self._read = OpenFile(Path("temporary file of rows"), os.dup(self._file.fileno()))
        self._pieces: list[tuple[int, int]] = []
        """(first byte, bytes) of each, in order."""

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return sum(size for _, size in self._pieces)

    def put(self, parts: Sequence[Array]) -> int | None:
        """Write a piece at the first place where it fits.

        Returns:
            Its first byte; None where there is no room for it now.
        Raises:
            DataError: the disk is full.
        """
        size = sum(part.nbytes for part in parts)
        assert size, "a piece has bytes"
        begin = self._free_place(size)
        if self.max_bytes is not None and begin + size > self.max_bytes:
            return None
        try:
            self._file.seek(begin)
            self._file.writelines(part.data for part in map(np.ascontiguousarray, parts))
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error
        insort(self._pieces, (begin, size))
        return begin

    def _free_place(self, size: int) -> int:
        end = 0
        for begin, taken in self._pieces:
            if begin - end >= size:
                break
            end = begin + taken
        return end

    def free(self, begin: int) -> None:
        """Give the room of a piece back."""
        at = bisect_left(self._pieces, (begin, 0))
        assert self._pieces[at][0] == begin, "a piece of this ring"
        del self._pieces[at]

    def read(self, begin: int, kind: Any, count: int) -> Array:
        """Items of a piece.

        Args:
            begin: the first one's first byte.
            kind: numpy's name of their type.
            count: how many.
        """
        size = count * np.dtype(kind).itemsize
        return np.frombuffer(self._read.read(begin, size), kind)

    def close(self) -> None:
        """Give the file up."""
        self._file.close()
        self._pieces.clear()

    def _no_room(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: no room for the rows that are read ahead ({error.strerror}). Free "
            "some, set data.cache_dir to a folder with more, or lower data.shuffle_buffer."
        )
