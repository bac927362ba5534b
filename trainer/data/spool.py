"""Flat arrays that grow beyond memory: in memory while they are small, then in nameless files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainer.data.file_arrays import BLOCK, FileArray, OpenFile
from trainer.errors import DataError

Array = np.ndarray[Any, Any]

MAX_HELD = 2**23
"""Bytes of all arrays together that are kept in memory before they are written out."""


class Spool:
    """Arrays by name, each of one type, that are added to at their ends.

    The files have no name: they are gone with the process, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is written before MAX_HELD is reached.

        Args:
            folder: for the files; where it cannot be written they go where temporary files go.
        """
        self.folder = folder
        self._parts: dict[str, list[Array]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, np.dtype[Any]] = {}
        self._sizes: dict[str, int] = {}
        self._held = 0
        weakref.finalize(self, _close, self._files)

    def append(self, name: str, array: Array) -> None:
        """Add to the end of an array.

        Raises:
            DataError: there is no room on the disk.
        """
        kind = self._kinds.setdefault(name, array.dtype)
        assert array.dtype == kind, "an array has one type"
        self._parts.setdefault(name, []).append(array)
        self._sizes[name] = self._sizes.get(name, 0) + array.size
        self._held += array.nbytes
        if self._held > MAX_HELD:
            for each in self._parts:
                self._write_out(each)
            self._held = 0

    def array(self, name: str, kind: Any) -> Array | FileArray:
        """All of an array; empty where nothing was added.

        Args:
            kind: its type, for that case.
        """
        if name not in self._files:
            return np.concatenate(self._parts.get(name, []) or [np.zeros(0, kind)])
        self._write_out(name)
        file = self._files[name]
        file.flush()
        opened = OpenFile(Path(f"temporary file of {name}"), os.dup(file.fileno()))
        return FileArray(opened, self._kinds[name].str, 0, self._sizes[name])

    def _write_out(self, name: str) -> None:
        parts = self._parts[name]
        if not parts:
            return
        try:
            if name not in self._files:
                self._files[name] = nameless_file(self.folder)
            self._files[name].writelines(part.data for part in map(np.ascontiguousarray, parts))
        except OSError as error:
            used = sum(size * self._kinds[each].itemsize for each, size in self._sizes.items())
            raise DataError(
                f"{self.folder}: no room for the encoded rows ({error.strerror}; "
                f"{used / 2**30:.2f} GiB so far). Free some, or set data.cache_dir to a folder "
                "with more."
            ) from error
        parts.clear()


def _close(files: dict[str, IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def nameless_file(folder: Path) -> IO[bytes]:
    """A file that is gone once it is closed; elsewhere where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


def rows_in_blocks(source: Array | FileArray, starts: Array, order: Array) -> Iterator[Array]:
    """Some rows of a flat array end to end, a bounded part at a time.

    Args:
        source: all rows end to end.
        starts: where each begins, and the end of the last one.
        order: which ones, in which order.
    """
    if not len(order):
        return
    # Neighbours are read together.
    borders = np.concatenate([[0], np.flatnonzero(np.diff(order) != 1) + 1, [len(order)]])
    begins = starts[order[borders[:-1]]].tolist()
    ends = starts[order[borders[1:] - 1] + 1].tolist()
    waiting: list[Array] = []
    size = 0
    for begin, end in zip(begins, ends, strict=True):
        for at in range(begin, end, BLOCK):
            waiting.append(source[at : min(at + BLOCK, end)])
            size += waiting[-1].size
            if size >= BLOCK:
                yield np.concatenate(waiting)
                waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)
