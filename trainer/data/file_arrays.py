"""Arrays that stay in a file: a part is read when it is asked for.

They are read, not mapped into memory: a file that is cut off, or a network disk that goes, is an
error with words then, where a mapped one ends the process by SIGBUS.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import TrainerError

Array = np.ndarray[Any, Any]

BLOCK = 2**20
"""Items that are read at once where all are wanted one after the other."""


class OpenFile:
    """A file that is open for as long as an array of it is used, whatever becomes of its name."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open it.

        Args:
            descriptor: of a file that is open already and has no name; `path` is what it is called
                in messages.
        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self.is_nameless = descriptor is not None
        self.descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        # A nameless file is reached through this process, for as long as it lives.
        own = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")
        return OpenFile, (own if self.is_nameless else self.path,)

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


@dataclass(frozen=True)
class Blocks:
    """A flat array that is made while it is written, a bounded part at a time."""

    kind: str
    """numpy's name of its type."""
    size: int
    """In items."""
    parts: Callable[[], Iterator[Array]]
    """Its parts in order, from the start at each call."""

    def __len__(self) -> int:
        return self.size


def blocks_of(array: Array | FileArray | Blocks) -> Iterator[Array]:
    """All of an array, a bounded part at a time."""
    if isinstance(array, Blocks):
        yield from array.parts()
        return
    for start in range(0, len(array), BLOCK):
        yield array[start : start + BLOCK]
