"""Arrays that stay in a file: a part is read when it is asked for.

They are read, not mapped into memory: a file that is cut off, or a network disk that goes, is an
error with words then, where a mapped one ends the process by SIGBUS.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import TrainerError

Array = np.ndarray[Any, Any]

BLOCK = 2**20
"""Items that are read at once where all are wanted one after the other."""


class OpenFile:
    """A file that is open for as long as an array of it is used, whatever becomes of its name."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFile, (self.path,)

    def read(self, begin: int, size: int) -> bytes:
        """Bytes from a place on.

        Raises:
            TrainerError: the file has fewer than it had, or cannot be read.
        """
        parts = []
        while size:
            try:
                part = os.pread(self.descriptor, size, begin)
            except OSError as error:
                raise self._lost(str(error.strerror)) from error
            if not part:
                raise self._lost("it was cut off")
            parts.append(part)
            begin, size = begin + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _lost(self, why: str) -> TrainerError:
        return TrainerError(
            f"{self.path}: the encoded rows cannot be read any more ({why}). Resume the run: rows "
            "are encoded again where their file is gone (data.cache_dir, data.cache)."
        )


class FileArray:
    """A flat array in a file; slices of it are plain arrays."""

    def __init__(self, file: OpenFile, kind: str, begin: int, size: int) -> None:
        """Say where it stands.

        Args:
            kind: numpy's name of its type.
            begin: its first byte.
            size: in items.
        """
        self.file, self.dtype, self.begin, self.size = file, np.dtype(kind), begin, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Array:
        start, stop, step = part.indices(self.size)
        assert step == 1, "rows are read from their first token to their last"
        width = self.dtype.itemsize
        content = self.file.read(self.begin + start * width, max(stop - start, 0) * width)
        return np.frombuffer(content, dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:] if dtype is None else self[:].astype(dtype)


def blocks_of(array: Array | FileArray) -> Iterator[Array]:
    """All of an array, a bounded part at a time."""
    for start in range(0, len(array), BLOCK):
        yield array[start : start + BLOCK]
