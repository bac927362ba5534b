"""Encoded rows on disk, found again by everything that decides them; never by time or name.

A file is an index as JSON, flat arrays, and the checksum of both (XXH3: against damage, not against
forgers). Arrays are read when they are used; there is no pickle in it.
What cannot be described exactly (a profile without source code) is not cached.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.data.cache_key import (
    NotCacheableError,
    canonical,
    describe,
    library_versions,
    own_code_hash,
)
from trainer.data.file_arrays import Blocks, FileArray, OpenFile, blocks_of
from trainer.errors import TrainerError
from trainer.files import default_cache_dir, remove_quietly, replace_file

logger = logging.getLogger(__name__)

NO_EFFECT = {
    *("cache", "cache_dir", "cache_max_gib", "encode_processes"),
    *("shuffle", "group_by_length", "enable_packing", "mix_probabilities", "mix_epoch"),
    *("streaming", "shuffle_buffer"),
}
"""Options of section `data` that do not change the encoded rows."""

SUFFIX = ".cache"

TEMPORARY = ".tmp"

DIGEST_BYTES, LENGTH_BYTES, MAX_INDEX_BYTES = 16, 8, 2**24

READ_BYTES = 2**20

STALE_S = 86_400
"""A file that nobody finished in so long was left by a killed writer."""

ALIGNED = 64
"""Every array begins at a multiple of so many bytes."""

KEY_CHARS = 40

KEPT_ENTRIES = 8
"""Entries of data files with one name; the one that was longest unused goes first."""

Array = np.ndarray[Any, Any]

Arrays = Mapping[str, Array | FileArray | Blocks]

FileArrays = dict[str, FileArray]


class DamagedEntryError(Exception):
    """A cache file whose content is not what was written."""


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, or the default where it is empty."""
    return Path(configured).expanduser() if configured else default_cache_dir()


@dataclass(frozen=True)
class CacheEntry:
    """The file of one key, there or not."""

    path: Path
    max_bytes: int | None = None
    """What all entries of the folder may take; None: any size."""

    def read(self) -> tuple[FileArrays | None, str]:
        """Its arrays or None, and what the data card says of them; damage is a warning."""
        try:
            arrays = self.load()
        except DamagedEntryError as error:
            logger.warning("%s: %s; the rows are encoded again", self.path, error)
            return None, f"damaged entry replaced ({error}): "
        return arrays, f"read from {self.path}" if arrays is not None else ""

    def write(self, arrays: Arrays, note: str, about: Mapping[str, Any]) -> tuple[bool, str]:
        """Store the arrays: whether that went well, and what the data card says of it.

        A full disk is a warning.

        Args:
            note: of `read`.
            about: as of `store`.
        """
        try:
            removed = self.store(arrays, about)
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s); the next start encodes again", self.path, error
            )
            return False, f"not written: {error.strerror}"
        more = f"; {counted(removed, 'older entry', 'older entries')} removed" if removed else ""
        return True, f"{note}written to {self.path}{more}"

    def load(self) -> FileArrays | None:
        """Its arrays, in the file; None where there is none.

        Raises:
            DamagedEntryError: it cannot be read, or its content is not what was written.
        """
        try:
            with self.path.open("rb") as file:
                left = os.fstat(file.fileno()).st_size - DIGEST_BYTES
                found = xxhash.xxh3_128()
                while left > 0 and (block := file.read(min(READ_BYTES, left))):
                    found.update(block)
                    left -= len(block)
                if found.digest() != file.read():
                    raise DamagedEntryError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedEntryError(str(error.strerror)) from error
        with contextlib.suppress(OSError):  # a folder that is only read serves as well
            os.utime(self.path)
        return self.arrays()

    def arrays(self) -> FileArrays:
        """The arrays of a file that is whole; they are read when they are used.

        Raises:
            OSError: it is not there.
        """
        file = OpenFile(self.path)
        index, begin = _index_of(file)
        return {
            name: FileArray(file, kind, begin + offset, count)
            for name, (kind, offset, count) in index["arrays"].items()
        }

    def store(self, arrays: Arrays, about: Mapping[str, Any] | None = None) -> int:
        """Write the file in one step: it is whole, or not there.

        Args:
            arrays: by name.
            about: what people are told of it; JSON values.
        Returns:
            How many older entries were removed. A run that uses one has it open and keeps it.
        Raises:
            OSError: the folder cannot be written, or the entry alone is larger than `max_bytes`.
        """
        index: dict[str, tuple[str, int, int]] = {}
        offset = 0
        for name, array in arrays.items():
            kind = np.dtype(array.kind if isinstance(array, Blocks) else array.dtype)
            index[name] = (kind.str, offset, len(array))
            offset += _aligned(len(array) * kind.itemsize)
        head = json.dumps({"about": dict(about or {}), "arrays": index}).encode()
        head += b" " * (-(LENGTH_BYTES + len(head)) % ALIGNED)
        size = LENGTH_BYTES + len(head) + offset + DIGEST_BYTES
        if self.max_bytes is not None and size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size / 2**30:.3g} GiB, data.cache_max_gib is less")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Machines that share the folder have processes with the same number.
        tag = secrets.token_hex(4)
        replace_file(self.path, _content(head, arrays), tag=tag, is_synced=True)
        return self._forget_oldest()

    def _forget_oldest(self) -> int:
        """Remove entries of this data file's name beyond the KEPT_ENTRIES used last, so that a file
        that is edited again and again does not fill the disk, then those of any name beyond
        `max_bytes`, and what killed writers left."""
        label = self.path.name[: -KEY_CHARS - len(SUFFIX)]
        found = sorted(entries(self.path.parent), key=_last_use, reverse=True)
        others = [path for path in found if path.suffix == SUFFIX and path != self.path]
        named = [
            path
            for path in others
            if path.name.startswith(label) and len(path.name) == len(self.path.name)
        ]
        gone = set(named[KEPT_ENTRIES - 1 :])
        if self.max_bytes is not None:
            used = _size(self.path)
            for path in others:
                used += 0 if path in gone else _size(path)
                if used > self.max_bytes:
                    gone.add(path)
        removed = 0
        for path in gone:
            with contextlib.suppress(OSError):  # another run removed it first, or may remove it
                path.unlink()
                removed += 1
        for path in found:
            if path.suffix == TEMPORARY and time.time() - _last_use(path) > STALE_S:
                remove_quietly(path)
        return removed


def _aligned(size: int) -> int:
    return size + -size % ALIGNED


def _content(head: bytes, arrays: Arrays) -> Iterator[bytes | memoryview]:
    """The bytes of a file in order, the checksum last."""
    digest = xxhash.xxh3_128()
    for piece in _body(head, arrays):
        digest.update(piece)
        yield piece
    yield digest.digest()


def _body(head: bytes, arrays: Arrays) -> Iterator[bytes | memoryview]:
    yield len(head).to_bytes(LENGTH_BYTES, "little")
    yield head
    for array in arrays.values():
        size = 0
        for block in blocks_of(array):
            size += block.nbytes
            yield np.ascontiguousarray(block).view(np.uint8).data
        yield bytes(_aligned(size) - size)


def _index_of(file: OpenFile) -> tuple[dict[str, Any], int]:
    """What a file says of its arrays, and where they begin."""
    size = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if size > MAX_INDEX_BYTES:
        raise ValueError("no index of arrays")
    index: dict[str, Any] = json.loads(file.read(LENGTH_BYTES, size))
    return index, LENGTH_BYTES + size


def about_entry(path: Path) -> dict[str, Any]:
    """What its writer said of an entry, such as its data files and rows; {} where nothing is known.

    The checksum is not looked at.
    """
    try:
        about = _index_of(OpenFile(path))[0].get("about")
    except (OSError, ValueError, AttributeError, TrainerError):
        return {}
    return about if isinstance(about, dict) else {}


def entry_of(
    section: DataSection, hashes: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[CacheEntry | None, str]:
    """The cache entry of a run's rows, or None and the reason for the data card.

    Args:
        section: says whether and where rows are cached, and what decides them.
        hashes: name of each data file -> hash of its content.
        options: all else that decides the rows, as `find_entry` takes it.
    """
    if not section.cache:
        return None, "off (data.cache=false)"
    parts = {
        **options,
        "section": section.model_dump(mode="json", exclude=NO_EFFECT),
        "files": list(hashes.items()),
    }
    try:
        entry = find_entry(cache_folder(section.cache_dir), Path(next(iter(hashes))).name, parts)
        limit = section.cache_max_gib
        return replace(entry, max_bytes=None if limit is None else int(limit * 2**30)), ""
    except NotCacheableError as error:
        return None, f"not used: {error}"


def find_entry(folder: Path, label: str, parts: dict[str, Any]) -> CacheEntry:
    """The entry of everything that decides the rows.

    Args:
        folder: of the cache.
        label: for people, such as the data file's name.
        parts: plain values, and objects that `describe` knows.
    Raises:
        NotCacheableError: one of them has no exact description.
    """
    described = describe({**parts, "code": own_code_hash(), "versions": library_versions()})
    key = hashlib.sha256(canonical(described).encode()).hexdigest()
    safe = re.sub(r"[^\w.-]", "_", label)[:40]
    return CacheEntry(folder / f"{safe}-{key[:KEY_CHARS]}{SUFFIX}")


def entries(folder: Path) -> list[Path]:
    """All cache files, and what killed processes left, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (SUFFIX, TEMPORARY))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # as below
        return 0


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another run removed it just now
        return 0.0
