"""A safetensors file and its manifest: made by the trainer, checked by the server. No torch here.

The header of a file that came from elsewhere is not trusted: names, dtypes, shapes, offsets and
hashes must be those of the manifest, and the tensors must fill the file without gap or overlap, as
the library that loads it wants.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from trainer.publish.wire import AdapterConfig, ServerHashes, TensorEntry, WeightsManifest

MAX_HEADER = 16 << 20

HEADER_ALIGNMENT = 8

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class BadFileError(Exception):
    """A file that is not what its manifest says; `code` says why to a program."""

    def __init__(self, code: str, message: str, bad: list[str] | None = None) -> None:
        """Keep the short code, and the names of the tensors at fault."""
        super().__init__(message)
        self.code, self.bad = code, bad or []


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file and what its manifest needs beside the tensors."""

    path: Path
    hashes: ServerHashes
    base: str | None = None
    """weights_id of the full weights that an adapter builds on."""
    adapter: AdapterConfig | None = None

    def manifest(self) -> WeightsManifest:
        """Hash every tensor of the file (about a second per GB)."""
        with self.path.open("rb") as file:
            header, start = read_header(file, os.fstat(file.fileno()).st_size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                tensors = [
                    _entry(name, header[name], memoryview(view), start) for name in sorted(header)
                ]
        return WeightsManifest(
            kind="adapter" if self.adapter is not None else "full",
            base=self.base,
            adapter=self.adapter,
            tensors=tensors,
            **self.hashes.model_dump(include=set(ServerHashes.model_fields)),
        )


def _entry(name: str, place: dict[str, Any], view: memoryview, start: int) -> TensorEntry:
    first, last = place["data_offsets"]
    with view, view[start + first : start + last] as piece:
        digest = hashlib.sha256(piece).hexdigest()
    return TensorEntry.model_validate(
        {"name": name, "dtype": place["dtype"], "shape": place["shape"], "sha256": digest}
    )


def num_bytes(entry: TensorEntry) -> int:
    """Bytes of a tensor."""
    count = DTYPE_BYTES[entry.dtype]
    for size in entry.shape:
        count *= size
    return count


def check_file(path: Path, manifest: WeightsManifest) -> None:
    """Compare a safetensors file with its manifest, every byte of every tensor.

    Raises:
        BadFileError: with the names of the tensors at fault.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = read_header(file, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            wanted = {entry.name: entry for entry in manifest.tensors}
            bad = sorted(set(header) ^ set(wanted))
            whole = memoryview(view)
            try:
                for name in sorted(set(header) & set(wanted)):
                    if not _is_tensor(header[name], wanted[name], whole, start, size):
                        bad.append(name)
            finally:
                whole.release()
    if bad:
        raise BadFileError(
            "bad_tensors",
            f"{len(bad)} tensors are not what the manifest says",
            [_printable(name) for name in bad[:100]],
        )
    _check_places(header, size - start)
    try:
        with safe_open(path, framework="numpy"):
            pass  # whatever else the library wants of a header, it says here and not in the engine
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFileError(
            "bad_file", f"the safetensors library refuses the file: {str(error)[:200]}"
        ) from error


def _check_places(header: dict[str, Any], data_bytes: int) -> None:
    """Every byte behind the header belongs to exactly one tensor.

    Raises:
        BadFileError: there is a gap, an overlap or a rest.
    """
    end = 0
    for first, last, name in sorted(
        (*place["data_offsets"], name) for name, place in header.items()
    ):
        if first != end:
            kind = "a gap before" if first > end else "an overlap with"
            raise BadFileError("bad_file", f"the file has {kind} a tensor", [_printable(name)])
        end = last
    if end != data_bytes:
        raise BadFileError(
            "bad_file", f"the file has {data_bytes - end} bytes behind its last tensor"
        )


def make_header(places: dict[str, dict[str, Any]]) -> bytes:
    """The begin of a safetensors file: length and JSON, padded so that what follows is aligned.

    Args:
        places: name -> `dtype`, `shape` and `data_offsets`, which count from the header's end.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, name -> place, and where the tensors' bytes begin.

    Args:
        file: at its begin.
        size: of the whole file, in bytes.
    Raises:
        BadFileError: it has no readable header.
    """
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise BadFileError("bad_file", "not a safetensors file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise BadFileError("bad_file", f"bad safetensors header: {error}") from error
    return header, 8 + length


def _is_tensor(found: Any, entry: TensorEntry, view: memoryview, start: int, size: int) -> bool:
    if not isinstance(found, dict) or (found.get("dtype"), found.get("shape")) != (
        entry.dtype,
        entry.shape,
    ):
        return False
    offsets = found.get("data_offsets")
    if not (isinstance(offsets, list) and len(offsets) == 2):
        return False
    first, last = offsets
    # True is an int here and none to the library.
    if not (type(first) is int and type(last) is int and 0 <= first <= last):
        return False
    if start + last > size or last - first != num_bytes(entry):
        return False
    with view[start + first : start + last] as piece:
        return hashlib.sha256(piece).hexdigest() == entry.sha256


def _printable(name: str) -> str:
    """A name of a file's header as ASCII: it may hold halves of surrogate pairs."""
    return name[:300].encode("ascii", "backslashreplace").decode()
