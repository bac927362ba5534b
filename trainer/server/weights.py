"""Weight sets on their way in: uploads in parts, and the check of every tensor before a commit.

A set is one safetensors file; `safetensors_file` compares it with its manifest. No torch here.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from trainer.preview.wire import PART_BYTES, TensorEntry, WeightsManifest, WeightsOffer
from trainer.server.problems import WeightsRefusedError
from trainer.server.safetensors_file import MAX_HEADER, check_file, num_bytes
from trainer.server.upload import Upload, no_room

MAX_UPLOADS = 4
KEPT_SETS = 2
MAX_NAMES = 200
FLOATS = {"F32", "F16", "BF16"}
"""Dtypes that an fp32 model holds without loss."""


class WeightStore:
    """Uploads in a private folder, and the folder that a trainer on this machine writes into."""

    def __init__(
        self,
        folder: Path,
        weights_dir: Path | None,
        *,
        num_kept: int = KEPT_SETS,
    ) -> None:
        """Take where files go.

        Args:
            folder: private to this server; uploads and committed sets lie here.
            weights_dir: for transport `dir`; None: that transport is refused.
            num_kept: committed sets that can be made active again, their bases apart.
        """
        self.folder, self.weights_dir, self.num_kept = folder, weights_dir, num_kept
        self.expected: WeightsManifest | None = None
        self.original_id: str | None = None
        self.uploads: dict[str, Upload] = {}
        self.sets: list[str] = []
        self.tags: dict[str, dict[str, Any]] = {}
        """Sets that can be made active: the engine's `load_weights` of each."""
        self.names: dict[str, dict[str, Any]] = {}
        """`RUN@STEP` and `RUN:latest`: weights_id, run and step of each, the newest last."""

    def expect(self, manifest: WeightsManifest, original_id: str | None) -> None:
        """Learn which model is loaded: an offer must fit it.

        Args:
            original_id: weights that the engine can load by itself; None: it started without any.
        """
        self.expected, self.original_id = manifest, original_id
        if original_id is not None:
            self.tags[original_id] = {
                "path": None,
                "weights_id": original_id,
                "run": None,
                "step": None,
            }

    def name(self, run: str, step: int, weights_id: str) -> None:
        """Let `RUN@STEP` and `RUN:latest` mean these weights from now on."""
        found = {"weights_id": weights_id, "run": run, "step": step}
        for name in (f"{run}@{step}", f"{run}:latest"):
            self.names.pop(name, None)
            self.names[name] = found
        while len(self.names) > MAX_NAMES:
            self.names.pop(next(iter(self.names)))

    def offer(self, offer: WeightsOffer) -> Upload:
        """Accept an offer; a newer one of the same run replaces an older one.

        Raises:
            WeightsRefusedError: another architecture or tokenizer, too many uploads, or no model.
        """
        if self.expected is None:
            raise WeightsRefusedError(
                503, "no_model", "no model yet; name one with POST /models/register"
            )
        self._check_fit(offer.manifest, self.expected)
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
        limit = 8 + MAX_HEADER + sum(map(num_bytes, offer.manifest.tensors))
        upload_id = secrets.token_hex(16)
        path = self.folder / f"{upload_id}.upload"
        upload = Upload(upload_id, offer, weights_id, path, limit)
        self.uploads[upload_id] = upload
        return upload

    def _check_fit(self, manifest: WeightsManifest, expected: WeightsManifest) -> None:
        for name, code in (
            ("config_hash", "other_architecture"),
            ("tokenizer_hash", "other_tokenizer"),
            ("chat_template_hash", "other_chat_template"),
        ):
            if getattr(manifest, name) != getattr(expected, name):
                raise WeightsRefusedError(
                    409,
                    code,
                    f"{name} is not that of the loaded model; start the server with the base "
                    "model of the run (trainer serve --model ...)",
                )
        if manifest.kind == "adapter":
            self._check_adapter(manifest, expected)
            return
        mine = {entry.name: entry for entry in expected.tensors}
        bad = sorted(
            {entry.name for entry in manifest.tensors if not _fits(entry, mine.get(entry.name))}
            | (set(mine) - {entry.name for entry in manifest.tensors})
        )
        if bad:
            raise WeightsRefusedError(
                422, "tensors_differ", "tensors are missing or of another shape or dtype", bad
            )

    def _check_adapter(self, manifest: WeightsManifest, expected: WeightsManifest) -> None:
        """The base must be here; names and shapes are the engine's to check, before it copies."""
        if manifest.base not in self.tags:
            raise WeightsRefusedError(
                409, "base_missing", "the adapter's base weights are not here; publish them first"
            )
        if sum(map(num_bytes, manifest.tensors)) > sum(map(num_bytes, expected.tensors)):
            raise WeightsRefusedError(413, "too_large", "an adapter larger than its model")

    def load_body(self, upload: Upload, path: Path | None) -> dict[str, Any]:
        """The engine's `load_weights` for a verified upload."""
        manifest = upload.offer.manifest
        body: dict[str, Any] = {
            "path": None if path is None else str(path),
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

    def holds(self, weights_id: str) -> bool:
        """Whether the file of this set is here, so that nothing has to be sent."""
        tag = self.tags.get(weights_id)
        return tag is not None and tag["path"] is not None and Path(tag["path"]).is_file()

    def verify(self, upload: Upload) -> Path | None:
        """Check the whole set of a sealed upload (slow: run it in a thread).

        Returns:
            The file that the engine may load; None for weights that it loads by itself.
        Raises:
            WeightsRefusedError: 409 for missing parts or file, 422 with the tensors at fault.
        """
        kept = self._kept_path(upload.weights_id)
        if upload.weights_id == self.original_id:
            return None
        if upload.weights_id in self.sets and kept.is_file():
            return kept
        if upload.is_stored and not kept.is_file():  # stored by another offer, and forgotten since
            upload.is_stored = False
            upload.parts.clear()
        try:
            if upload.offer.transport == "dir":
                return self._verify_shared(upload)
            missing = set(range(-(-upload.size // PART_BYTES) or 1)) - upload.parts
            if missing:
                raise WeightsRefusedError(409, "parts_missing", f"parts missing: {sorted(missing)}")
            if not upload.is_stored:
                os.truncate(upload.path, upload.size)
                check_file(upload.path, upload.offer.manifest)
                os.replace(upload.path, kept)
                upload.is_stored = True  # a second try finds it, if the engine dies on the first
        except OSError as error:
            raise no_room("the set", error) from error
        except WeightsRefusedError as error:
            if error.status == 422:
                upload.parts.clear()  # which of them is wrong cannot be told: all are sent again
            raise
        return kept

    def _verify_shared(self, upload: Upload) -> Path:
        assert self.weights_dir is not None, "offer() refused this"
        path = self.weights_dir / f"{upload.weights_id}.safetensors"
        if path.is_symlink() or not path.is_file():
            raise WeightsRefusedError(409, "no_file", f"{path.name} is not in --weights-dir")
        check_file(path, upload.offer.manifest)
        return path

    def committed(self, upload: Upload, tag: dict[str, Any]) -> None:
        """Forget the upload; keep the last sets only."""
        self.uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)
        self.tags[upload.weights_id] = tag
        self.name(upload.offer.run, upload.offer.step, upload.weights_id)
        if upload.weights_id == self.original_id:
            return
        self.sets = [*(w for w in self.sets if w != upload.weights_id), upload.weights_id]
        newest = self.sets[-self.num_kept :]
        needed = {*newest, *(self.tags[one].get("base_id") for one in newest)}
        for old in [one for one in self.sets if one not in needed]:
            self.sets.remove(old)
            self.tags.pop(old)
            self.names = {k: v for k, v in self.names.items() if v["weights_id"] != old}
            self._kept_path(old).unlink(missing_ok=True)  # a file of --weights-dir is not ours

    def drop(self, upload: Upload) -> None:
        """Remove an upload and what has arrived of it."""
        self.uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)
        if upload.is_stored and upload.weights_id not in self.sets:
            self._kept_path(upload.weights_id).unlink(missing_ok=True)

    def _kept_path(self, weights_id: str) -> Path:
        return self.folder / f"{weights_id}.safetensors"


def _fits(entry: TensorEntry, mine: TensorEntry | None) -> bool:
    if mine is None or entry.shape != mine.shape:
        return False
    return entry.dtype == mine.dtype or {entry.dtype, mine.dtype} <= FLOATS
