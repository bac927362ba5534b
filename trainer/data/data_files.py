"""One file of rows: on this machine, or behind an address; its bytes, unpacked, and what it is."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from trainer.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings that say how rows are written; files of any other are read as JSONL where they are named
themselves, and left out of a folder."""

PACKINGS = (".gz", ".bz2", ".xz", ".zst")
"""Endings behind one of a text kind, or alone."""

SUFFIXES = (*KINDS, *PACKINGS)

PACKED = 3
"""How much more text there is than bytes in packed files, about."""

READ_BYTES = 2**18


class Handle(Protocol):
    """What says how far a file was read."""

    def tell(self) -> int:
        """Bytes so far, as they are stored."""
        ...


@dataclass
class Position:
    """How far a file was read; of a table the reader says it, of any other its handle."""

    handle: Handle | None = None
    row: int = 0
    num_rows: int = 0

    def share(self, size: int | None) -> float | None:
        """Between 0 and 1; None where it is not known.

        Args:
            size: bytes of the file.
        """
        if self.num_rows:
            return min(self.row / self.num_rows, 1.0)
        if self.handle is None or not size:
            return None
        try:
            return min(self.handle.tell() / size, 1.0)
        except ValueError:  # closed: all of it was read
            return 1.0


class DataFile:
    """A file of rows. As text it is its name, in which no secret stands."""

    name: str
    position: Position

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        """The ending that says how it is read, without the one of a packing; lower case."""
        return kind_of(self.name)

    @property
    def packing(self) -> str:
        """One of PACKINGS, or nothing."""
        suffix = _suffix(self.name)
        return suffix if suffix in PACKINGS else ""

    @property
    def local_path(self) -> Path | None:
        """Where it is on this machine."""
        return None

    def open(self) -> IO[bytes]:
        """Its bytes as they are stored.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError

    def size(self) -> int | None:
        """In bytes as it is stored; None where that is not known.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError

    def num_text_bytes(self) -> int:
        """About how many bytes it has unpacked; 0 where that is not known."""
        try:
            size = self.size() or 0
        except OSError:
            return 0
        return size * (PACKED if self.packing or self.kind == ".parquet" else 1)

    def content_hash(self) -> str:
        """sha256 of its bytes, or what its store says of their version.

        Raises:
            OSError: it cannot be read.
        """
        with self.open() as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    def check(self) -> None:
        """See that it is there.

        Raises:
            DataError: it is not.
        """
        raise NotImplementedError


@dataclass
class LocalFile(DataFile):
    """A file on this machine."""

    path: Path
    position: Position = field(default_factory=Position, repr=False, compare=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its path as it was given."""
        return str(self.path)

    @property
    def local_path(self) -> Path:
        """Its path."""
        return self.path

    def open(self) -> IO[bytes]:
        """Its bytes as they are stored."""
        file = self.path.open("rb")
        self.position.handle = file
        return file

    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def check(self) -> None:
        """See that it is there."""
        if not self.path.is_file():
            what = "is a folder, not a file" if self.path.is_dir() else "does not exist"
            raise DataError(
                f"{self.path}: {what}. Give a JSONL, JSON, CSV, Parquet or Arrow file, a folder of "
                "them or a pattern such as 'rows/*.jsonl' with --dataset."
            )


def _suffix(name: str) -> str:
    """The ending of a path, or of an address without its query; lower case."""
    path = name.partition("?")[0].partition("#")[0] if "://" in name else name
    return Path(path).suffix.lower()


def kind_of(name: str) -> str:
    """The ending that says how a file of this name is read, that of a packing taken off."""
    path = name.partition("?")[0].partition("#")[0] if "://" in name else name
    plain = Path(path)
    if plain.suffix.lower() in PACKINGS:
        plain = plain.with_suffix("")
    return plain.suffix.lower()


# ---- unpacking


def open_bytes(file: DataFile) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends as packed files do.

    What is wrong with a packed file is raised while it is read: `as_data_error` has the words.
    """
    stored = file.open()
    try:
        unpack = UNPACK.get(file.packing)
        return stored if unpack is None else _Unpacked(unpack(stored), stored)
    except BaseException:
        stored.close()
        raise


class _Unpacked(io.BufferedReader):
    """Closes the file below too: the unpackers leave it open, as they did not open it."""

    def __init__(self, unpacked: Any, stored: IO[bytes]) -> None:
        super().__init__(unpacked, READ_BYTES)
        self._stored = stored

    def close(self) -> None:
        super().close()
        self._stored.close()


class _Zstd(io.RawIOBase):
    """Frames of zstd one after the other. The package's own reader takes a cut end for the end."""

    def __init__(self, stored: IO[bytes]) -> None:
        import zstandard

        self._stored = stored
        # As many programs pack large files (--long=31).
        self._make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._stored.read(2**17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._ready = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        while packed:
            frame = self._frame = self._frame or self._make()
            parts.append(frame.decompress(packed))
            packed = b""
            if frame.eof:
                packed, self._frame = frame.unused_data, None
        return b"".join(parts)


UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda stored: gzip.GzipFile(fileobj=stored, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _Zstd,
}

NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


def as_data_error(file: DataFile, error: Exception) -> DataError | None:
    """What a file's reading has raised, in words; None where that is another fault."""
    is_packing = isinstance(error, gzip.BadGzipFile | EOFError | zlib.error | lzma.LZMAError)
    if file.packing:
        is_packing |= type(error).__name__ == "ZstdError"
        # BZ2File has no error of its own for what is no bzip2.
        is_packing |= isinstance(error, OSError) and error.errno is None and file.packing == ".bz2"
    if is_packing:
        name = NAMES.get(file.packing, "packed")
        why = " ".join(str(error).split())
        return DataError(
            f"{file}: the {name} file is damaged or cut off ({why}); make or fetch it again."
        )
    if isinstance(error, OSError):
        return DataError(f"{file}: cannot be read ({error.strerror or error}).")
    return None
