"""Weight sets on their way in: uploads in parts, and the check of every tensor before a commit.

A set is one safetensors file. It is read here byte by byte, without torch and without trusting
its header: names, dtypes, shapes and hashes must be those of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.preview.wire import PART_BYTES, TensorEntry, WeightsManifest, WeightsOffer

MAX_HEADER = 16 << 20
MAX_UPLOADS = 4
KEPT_SETS = 2
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
FLOATS = {"F32", "F16", "BF16"}
"""Dtypes that an fp32 model holds without loss."""


class WeightsRefusedError(Exception):
    """The offer, part or set cannot be taken; `status` and `code` say why to a program."""

    def __init__(self, status: int, code: str, message: str, bad: list[str] | None = None) -> None:
        """Take the HTTP status, a short code, the message, and the tensors at fault."""
        super().__init__(message)
        self.status, self.code, self.bad = status, code, bad or []


@dataclass
class Upload:
    """One offer and the parts of it that have arrived."""

    offer: WeightsOffer
    weights_id: str
    path: Path
    limit: int
    """Bytes the file may have."""
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    parts: set[int] = field(default_factory=set)
    size: int = 0


class WeightStore:
    """Uploads in a private folder, and the folder that a trainer on this machine writes into."""

    def __init__(
        self,
        folder: Path,
        weights_dir: Path | None,
        expected: WeightsManifest,
        *,
        original_id: str | None = None,
        num_kept: int = KEPT_SETS,
    ) -> None:
        """Take where files go.

        Args:
            folder: private to this server; uploads and committed sets lie here.
            weights_dir: for transport `dir`; None: that transport is refused.
            expected: manifest of the loaded model; an offer must fit it.
            original_id: weights that the engine can load by itself; None: it started without any.
            num_kept: committed sets that can be made active again, their bases apart.
        """
        self.folder, self.weights_dir, self.expected = folder, weights_dir, expected
        self.original_id, self.num_kept = original_id, num_kept
        self.uploads: dict[str, Upload] = {}
        self.sets: list[str] = []
        self.tags: dict[str, dict[str, Any]] = {}
        """Kept sets: the engine's `load_weights` of each."""

    def offer(self, offer: WeightsOffer) -> Upload:
        """Accept an offer; a newer one of the same run replaces an older one.

        Raises:
            WeightsRefusedError: another architecture or tokenizer, or too many uploads.
        """
        self._check_fit(offer.manifest)
        if offer.transport == "dir" and self.weights_dir is None:
            raise WeightsRefusedError(
                409, "no_weights_dir", "the server was started without --weights-dir"
            )
        weights_id = offer.manifest.weights_id
        for upload in list(self.uploads.values()):
            if upload.offer.run == offer.run:
                if upload.weights_id == weights_id and upload.offer == offer:
                    return upload  # the same offer again: go on where it stopped
                self.drop(upload)
        if len(self.uploads) >= MAX_UPLOADS:
            raise WeightsRefusedError(429, "too_many_uploads", "too many uploads are open")
        limit = 8 + MAX_HEADER + sum(map(_num_bytes, offer.manifest.tensors))
        upload = Upload(offer, weights_id, self.folder / "", limit)
        upload.path = self.folder / f"{upload.id}.upload"
        self.uploads[upload.id] = upload
        return upload

    def _check_fit(self, manifest: WeightsManifest) -> None:
        for name, code in (
            ("config_hash", "other_architecture"),
            ("tokenizer_hash", "other_tokenizer"),
            ("chat_template_hash", "other_chat_template"),
        ):
            if getattr(manifest, name) != getattr(self.expected, name):
                raise WeightsRefusedError(
                    409,
                    code,
                    f"{name} is not that of the loaded model; start the server with the base "
                    "model of the run (trainer serve --model ...)",
                )
        if manifest.kind == "adapter":
            self._check_adapter(manifest)
            return
        mine = {entry.name: entry for entry in self.expected.tensors}
        bad = sorted(
            {entry.name for entry in manifest.tensors if not _fits(entry, mine.get(entry.name))}
            | (set(mine) - {entry.name for entry in manifest.tensors})
        )
        if bad:
            raise WeightsRefusedError(
                422, "tensors_differ", "tensors are missing or of another shape or dtype", bad
            )

    def _check_adapter(self, manifest: WeightsManifest) -> None:
        """The base must be here; names and shapes are the engine's to check, before it copies."""
        if manifest.base != self.original_id and manifest.base not in self.tags:
            raise WeightsRefusedError(
                409, "base_missing", "the adapter's base weights are not here; publish them first"
            )
        if sum(map(_num_bytes, manifest.tensors)) > sum(map(_num_bytes, self.expected.tensors)):
            raise WeightsRefusedError(413, "too_large", "an adapter larger than its model")

    def load_body(self, upload: Upload, path: Path) -> dict[str, Any]:
        """The engine's `load_weights` for a verified upload."""
        manifest = upload.offer.manifest
        body: dict[str, Any] = {
            "path": str(path),
            "weights_id": upload.weights_id,
            "run": upload.offer.run,
            "step": upload.offer.step,
        }
        if manifest.adapter is not None:
            base = self.tags.get(manifest.base or "")
            body |= {
                "adapter": manifest.adapter.model_dump(mode="json"),
                "base_id": manifest.base,
                "base_path": base["path"] if base is not None else None,
            }
        return body

    def find(self, upload_id: str) -> Upload:
        """The upload called so.

        Raises:
            WeightsRefusedError: there is none (any more).
        """
        upload = self.uploads.get(upload_id)
        if upload is None:
            raise WeightsRefusedError(404, "no_upload", "no such upload; offer the weights again")
        return upload

    async def put_part(
        self, upload: Upload, number: int, digest: str, stream: AsyncIterator[bytes]
    ) -> None:
        """Write one part to its place; it counts only when its hash is right.

        Raises:
            WeightsRefusedError: outside the file, too long, or another hash.
        """
        start = number * PART_BYTES
        if upload.offer.transport != "http" or start >= upload.limit:
            raise WeightsRefusedError(422, "bad_part", f"this upload takes no part {number}")
        upload.parts.discard(number)
        found, length = hashlib.sha256(), 0
        descriptor = os.open(upload.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            file.seek(start)
            async for piece in stream:
                length += len(piece)
                if length > PART_BYTES or start + length > upload.limit:
                    raise WeightsRefusedError(413, "too_large", f"part {number} is too long")
                found.update(piece)
                file.write(piece)
        if found.hexdigest() != digest:
            raise WeightsRefusedError(
                422, "bad_part_hash", f"part {number} does not have the hash that came with it"
            )
        upload.parts.add(number)
        upload.size = max(upload.size, start + length)

    def verify(self, upload: Upload) -> Path:
        """Check the whole set (slow: run it in a thread).

        Returns:
            The file that the engine may load.
        Raises:
            WeightsRefusedError: 409 for missing parts or file, 422 with the tensors at fault.
        """
        kept = self._kept_path(upload.weights_id)
        if upload.weights_id in self.sets and kept.is_file():
            return kept
        if upload.offer.transport == "dir":
            assert self.weights_dir is not None, "offer() refused this"
            path = self.weights_dir / f"{upload.weights_id}.safetensors"
            if path.is_symlink() or not path.is_file():
                raise WeightsRefusedError(409, "no_file", f"{path.name} is not in --weights-dir")
            check_file(path, upload.offer.manifest)
            return path
        missing = set(range(-(-upload.size // PART_BYTES) or 1)) - upload.parts
        if missing:
            raise WeightsRefusedError(409, "parts_missing", f"parts missing: {sorted(missing)}")
        os.truncate(upload.path, upload.size)
        check_file(upload.path, upload.offer.manifest)
        os.replace(upload.path, kept)
        return kept

    def committed(self, upload: Upload, tag: dict[str, Any]) -> None:
        """Forget the upload; keep the last sets only."""
        self.drop(upload)
        self.tags[upload.weights_id] = tag
        self.sets = [*(w for w in self.sets if w != upload.weights_id), upload.weights_id]
        newest = self.sets[-self.num_kept :]
        needed = {*newest, *(self.tags[one].get("base_id") for one in newest)}
        for old in [one for one in self.sets if one not in needed]:
            self.sets.remove(old)
            self.tags.pop(old)
            self._kept_path(old).unlink(missing_ok=True)  # a file of --weights-dir is not ours

    def drop(self, upload: Upload) -> None:
        """Remove an upload and what has arrived of it."""
        self.uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)

    def _kept_path(self, weights_id: str) -> Path:
        return self.folder / f"{weights_id}.safetensors"


def _fits(entry: TensorEntry, mine: TensorEntry | None) -> bool:
    if mine is None or entry.shape != mine.shape:
        return False
    return entry.dtype == mine.dtype or {entry.dtype, mine.dtype} <= FLOATS


def _num_bytes(entry: TensorEntry) -> int:
    count = DTYPE_BYTES[entry.dtype]
    for size in entry.shape:
        count *= size
    return count


def check_file(path: Path, manifest: WeightsManifest) -> None:
    """Compare a safetensors file with its manifest, every byte of every tensor.

    Raises:
        WeightsRefusedError: 422, with the names of the tensors at fault.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file.read(8), file, size)
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
        raise WeightsRefusedError(
            422, "bad_tensors", f"{len(bad)} tensors are not what the manifest says", bad[:100]
        )


def _read_header(prefix: bytes, file: Any, size: int) -> tuple[dict[str, Any], int]:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise WeightsRefusedError(422, "bad_file", "not a safetensors file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise WeightsRefusedError(422, "bad_file", f"bad safetensors header: {error}") from error
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
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last):
        return False
    if start + last > size or last - first != _num_bytes(entry):
        return False
    with view[start + first : start + last] as piece:
        return hashlib.sha256(piece).hexdigest() == entry.sha256
