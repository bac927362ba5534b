"""Weight sets: uploads on their way in, committed sets, and the names that they go by.

A set is one safetensors file, compared with its manifest (publish/weight_file.py). No torch here.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.models import is_quantization_state
from trainer.publish.weight_file import MAX_HEADER, BadFileError, check_file, num_bytes
from trainer.publish.wire import (
    PART_BYTES,
    AdapterConfig,
    TensorEntry,
    WeightsManifest,
    WeightsOffer,
)
from trainer.server.problems import WeightsRefusedError
from trainer.server.upload import Upload, no_room

MAX_UPLOADS = 4

UNUSED_S = 3.0
"""An offer of which nothing has come for so long yields its place to a newer one,"""

IDLE_S = 60.0
"""and so does an upload that has stopped for so long."""

EXPIRY_S = 3600.0
"""An upload that nothing has been heard of for so long is dropped in any case."""

KEPT_SETS = 2

MAX_NAMES = 200

MAX_FINISHED = 64

Tag = dict[str, Any]
"""weights_id, run and step."""


class WeightStore:
    """Uploads in a private folder, and the folder that a trainer on this machine writes into."""

    def __init__(
        self,
        folder: Path,
        weights_dir: Path | None,
        *,
        num_kept: int = KEPT_SETS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take where files go.

        Args:
            folder: private to this server; uploads and committed sets lie here.
            weights_dir: for transport `dir`; None: that transport is refused.
            num_kept: committed sets that can be made active again, their bases apart.
            clock: seconds, for what expires.
        """
        self.folder, self.weights_dir, self.num_kept = folder, weights_dir, num_kept
        self.clock = clock
        self.expected: WeightsManifest | None = None
        self.original_id: str | None = None
        self.is_bf16_only = False
        self.uploads: dict[str, Upload] = {}
        self.finished: OrderedDict[str, str] = OrderedDict()
        """weights_id of uploads that were committed: a commit whose answer was lost is answered
        again."""
        self.sets: list[str] = []
        self.loads: dict[str, dict[str, Any]] = {}
        """Sets that can be made active: the body of the engine's `load_weights` of each."""
        self.tags: dict[str, Tag] = {}
        """The newest run and step of each of them."""
        self.names: dict[str, Tag] = {}
        """What `RUN@STEP` and `RUN:latest` mean, the newest last."""

    def expect(
        self, manifest: WeightsManifest, original_id: str | None, *, is_bf16_only: bool = False
    ) -> None:
        """Learn which model is loaded: an offer must fit it.

        Args:
            original_id: weights that the engine can load by itself; None: it started without any.
            is_bf16_only: others would be rounded, and then are not the weights that were sent.
        """
        self.expected, self.original_id = manifest, original_id
        self.is_bf16_only = is_bf16_only
        if original_id is not None:
            self.loads[original_id] = {"path": None, "weights_id": original_id}
            self.tags[original_id] = {"weights_id": original_id, "run": None, "step": None}

    def name(self, run: str, step: int, weights_id: str) -> Tag:
        """Let `RUN@STEP` and `RUN:latest` mean these weights from now on."""
        found = {"weights_id": weights_id, "run": run, "step": step}
        for name in (f"{run}@{step}", f"{run}:latest"):
            self.names.pop(name, None)
            self.names[name] = found
        self.tags[weights_id] = found
        while len(self.names) > MAX_NAMES:
            self.names.pop(next(iter(self.names)))
        return found

    def tag(self, weights_id: str, run: str, step: int) -> Tag | None:
        """Run and step under which these weights were published: those named, else the newest.

        Returns:
            None where there are no such weights.
        """
        named = self.names.get(f"{run}@{step}")
        if named is not None and named["weights_id"] == weights_id:
            return named
        return self.tags.get(weights_id)

    # ---- places for uploads

    def check(self, offer: WeightsOffer) -> str:
        """Whether these weights could be taken; gives their weights_id.

        Raises:
            WeightsRefusedError: another architecture or tokenizer, or no model.
        """
        if self.expected is None:
            raise WeightsRefusedError(
                503, "no_model", "no model is loaded; name one with POST /models/register"
            )
        if offer.manifest.kind == "adapter" and offer.manifest.base not in self.loads:
            raise WeightsRefusedError(
                409,
                "base_missing",
                "this server does not hold the adapter's base weights; publish them first",
            )
        check_fit(offer.manifest, self.expected)
        travels = {
            entry.dtype for entry in offer.manifest.tensors if not is_quantization_state(entry.name)
        }
        others = travels & (FLOATS - {"BF16"})
        if self.is_bf16_only and others:
            raise WeightsRefusedError(
                409,
                "other_dtype",
                f"these weights are {' and '.join(sorted(others))}, and this server rounds to bf16 "
                "(--dtype bf16), which makes other weights of them; start it with --dtype auto or "
                "fp32, or train with hyperparams.fp_precision=bf16",
            )
        if offer.transport == "dir" and self.weights_dir is None:
            raise WeightsRefusedError(
                409, "no_weights_dir", "the server was started without --weights-dir"
            )
        return offer.manifest.weights_id

    def offer(self, offer: WeightsOffer, weights_id: str) -> Upload:
        """Make a place for a checked offer; a newer one of the same run replaces an older one.

        Raises:
            WeightsRefusedError: too many uploads.
        """
        for upload in list(self.uploads.values()):
            if upload.offer.run == offer.run:
                if upload.weights_id == weights_id and upload.offer == offer:
                    return upload  # the same offer again: go on where it stopped
                if upload.is_sealed:
                    raise WeightsRefusedError(
                        503, "committing", "an older offer of this run is being committed"
                    )
                self.drop(upload)
        self._make_room()
        limit = 8 + MAX_HEADER + sum(map(num_bytes, offer.manifest.tensors))
        upload_id = secrets.token_hex(16)
        path = self.folder / f"{upload_id}.upload"
        upload = Upload(upload_id, offer, weights_id, path, limit, self.clock)
        self.uploads[upload_id] = upload
        return upload

    def _make_room(self) -> None:
        """Give back the place of whoever has been away longest, where all are taken.

        Raises:
            WeightsRefusedError: 429, all of them are being used.
        """
        self.expire()
        while len(self.uploads) >= MAX_UPLOADS:
            waits = {
                upload.id: (UNUSED_S if upload.is_unused else IDLE_S) - upload.idle_s
                for upload in self.uploads.values()
                if not upload.is_busy
            }
            first = min(waits, key=waits.__getitem__, default=None)
            if first is None or waits[first] > 0:
                raise WeightsRefusedError(429, "too_many_uploads", "too many uploads are open")
            self.drop(self.uploads[first])

    def expire(self) -> None:
        """Drop the uploads that nothing has been heard of for a long time."""
        for upload in list(self.uploads.values()):
            if not upload.is_busy and upload.idle_s > EXPIRY_S:
                self.drop(upload)

    def find(self, upload_id: str) -> Upload:
        """The upload called so.

        Raises:
            WeightsRefusedError: there is none (any more).
        """
        upload = self.uploads.get(upload_id)
        if upload is None:
            raise WeightsRefusedError(404, "no_upload", "no such upload; offer the weights again")
        return upload

    def drop(self, upload: Upload) -> None:
        """Remove an upload and what has arrived of it."""
        self.uploads.pop(upload.id, None)
        self._forget_parts(upload)

    def _forget_parts(self, upload: Upload) -> None:
        """What has arrived of an upload goes, and its place with it where somebody needs one."""
        upload.path.unlink(missing_ok=True)
        if upload.is_stored and upload.weights_id not in self.sets:
            self._kept_path(upload.weights_id).unlink(missing_ok=True)
        upload.start_over()

    # ---- commit

    def holds(self, weights_id: str) -> bool:
        """Whether the file of this set is here, so that nothing has to be sent."""
        load = self.loads.get(weights_id)
        return load is not None and load["path"] is not None and Path(load["path"]).is_file()

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
            upload.start_over()
        try:
            if upload.offer.transport == "dir":
                return self._verify_shared(upload)
            missing = set(range(-(-upload.size // PART_BYTES) or 1)) - upload.parts
            if missing:
                raise WeightsRefusedError(409, "parts_missing", f"parts missing: {sorted(missing)}")
            if not upload.is_stored:
                os.truncate(upload.path, upload.size)
                _check(upload.path, upload.offer.manifest)
                os.replace(upload.path, kept)
                upload.is_stored = True  # a second try finds it, if the engine dies on the first
        except OSError as error:
            raise no_room("the set", error) from error
        return kept

    def _verify_shared(self, upload: Upload) -> Path:
        assert self.weights_dir is not None, "offer() refused this"
        path = self.weights_dir / f"{upload.weights_id}.safetensors"
        if path.is_symlink() or not path.is_file():
            raise WeightsRefusedError(409, "no_file", f"{path.name} is not in --weights-dir")
        _check(path, upload.offer.manifest)
        return path

    def is_same_day(self, offer: WeightsOffer, weights_id: str) -> bool:
        """Whether kept weights answer under the date of this offer; the server's own do so."""
        kept = self.loads.get(weights_id, {})
        is_own = weights_id == self.original_id
        return is_own or kept.get("template_date") == offer.template_date

    def load_body(self, upload: Upload, path: Path | None) -> dict[str, Any]:
        """The engine's `load_weights` for a verified upload."""
        manifest = upload.offer.manifest
        is_own = upload.weights_id == self.original_id  # the server's own answer as of today
        body: dict[str, Any] = {
            "path": None if path is None else str(path),
            "weights_id": upload.weights_id,
            "template_date": None if is_own else upload.offer.template_date,
        }
        if manifest.adapter is not None:
            base = self.loads.get(manifest.base or "")
            body |= {
                "adapter": manifest.adapter.model_dump(mode="json"),
                "base_id": manifest.base,
                "base_path": base["path"] if base is not None else None,
            }
        return body

    def failed(self, upload: Upload) -> None:
        """A commit was refused for good: the upload begins again, if its place is not needed."""
        # Which of its parts is wrong cannot be told: all of them are to be sent again.
        self._forget_parts(upload)

    def committed(self, upload: Upload, load: dict[str, Any]) -> None:
        """Forget the upload; keep the last sets only."""
        self.uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)
        self.finish(upload.id, upload.weights_id)
        self.loads[upload.weights_id] = load
        self.name(upload.offer.run, upload.offer.step, upload.weights_id)
        if upload.weights_id == self.original_id:
            return
        self.sets = [*(w for w in self.sets if w != upload.weights_id), upload.weights_id]
        newest = self.sets[-self.num_kept :]
        needed = {*newest, *(self.loads[one].get("base_id") for one in newest)}
        for old in [one for one in self.sets if one not in needed]:
            self.sets.remove(old)
            self.loads.pop(old)
            self.tags.pop(old)
            self.names = {k: v for k, v in self.names.items() if v["weights_id"] != old}
            self._kept_path(old).unlink(missing_ok=True)  # a file of --weights-dir is not ours

    def finish(self, upload_id: str, weights_id: str) -> None:
        """Remember for a while that this upload was committed."""
        self.finished[upload_id] = weights_id
        while len(self.finished) > MAX_FINISHED:
            self.finished.popitem(last=False)

    def _kept_path(self, weights_id: str) -> Path:
        return self.folder / f"{weights_id}.safetensors"


def _check(path: Path, manifest: WeightsManifest) -> None:
    try:
        check_file(path, manifest)
    except BadFileError as error:
        raise WeightsRefusedError(422, error.code, str(error), error.bad) from error


# ---- whether an offered manifest fits the loaded model: names, shapes and sizes
#
# Nothing has been sent then, and nothing is built.


FLOATS = {"F32", "F16", "BF16"}
"""Dtypes that an fp32 model holds without loss."""

RANK_AXIS = {
    ".lora_A.weight": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_A": 0,
    ".lora_embedding_B": 1,
}
"""Where the rank stands in the shape of each kind of adapter tensor."""

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

MAGNITUDE = ".lora_magnitude_vector.weight"
"""Of DoRA: one number for each row of the weights."""


def check_fit(manifest: WeightsManifest, expected: WeightsManifest) -> None:
    """Compare an offer with the loaded model; the base of an adapter is the store's to know.

    Raises:
        WeightsRefusedError: another architecture or tokenizer, or other tensors.
    """
    for name, code in (
        ("config_hash", "other_architecture"),
        ("tokenizer_hash", "other_tokenizer"),
        ("chat_template_hash", "other_chat_template"),
    ):
        if getattr(manifest, name) != getattr(expected, name):
            raise WeightsRefusedError(
                409,
                code,
                f"{name} differs from the loaded model's; start the server with the base "
                "model of the run (trainer serve --model ...)",
            )
    if manifest.kind == "adapter":
        _check_adapter(manifest, expected)
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


QUANTIZATION_TEXT = ".quant_state.bitsandbytes__"
"""Tensors so named hold a short text, of another length in every set; the engine reads it."""

MAX_TEXT = 1024
"""Bytes of such a text; it has 169 for a small matrix."""


def _fits(entry: TensorEntry, mine: TensorEntry | None) -> bool:
    if mine is not None and QUANTIZATION_TEXT in entry.name:
        return entry.dtype == "U8" and len(entry.shape) == 1 and entry.shape[0] <= MAX_TEXT
    if mine is None or entry.shape != mine.shape:
        return False
    return entry.dtype == mine.dtype or {entry.dtype, mine.dtype} <= FLOATS


def _check_adapter(manifest: WeightsManifest, expected: WeightsManifest) -> None:
    """An adapter must be as large as its manifest says: rank, modules and tensors agree.

    Every detail is compared in the engine, on a model without memory; this is what keeps a
    manifest of a few bytes from asking for gigabytes there.
    """
    adapter = manifest.adapter
    assert adapter is not None, "the manifest's own check"
    if sum(map(num_bytes, manifest.tensors)) > sum(map(_fp32_bytes, expected.tensors)):
        raise WeightsRefusedError(413, "too_large", "the adapter is larger than its model")
    bad = [entry.name for entry in manifest.tensors if not _is_of_adapter(entry, adapter)]
    if bad:
        raise WeightsRefusedError(
            422,
            "tensors_differ",
            f"tensors do not match an adapter of rank r={adapter.r}; offer the rank that the "
            "adapter was trained with",
            bad,
        )
    # Targets are full names; `base_model.model.` stands before them.
    places = {entry.name.partition(".lora_")[0] for entry in manifest.tensors}
    without = [
        target
        for target in adapter.target_modules
        if not any(place == target or place.endswith("." + target) for place in places)
    ]
    if without:
        raise WeightsRefusedError(
            422,
            "tensors_differ",
            "the manifest has no tensors for some target_modules",
            without[:100],
        )


def _fp32_bytes(entry: TensorEntry) -> int:
    """Bytes of a tensor in fp32; of quantized weights a U8 holds two, an I8 one."""
    return num_bytes(entry) * {"U8": 8, "I8": 4, "BF16": 2, "F16": 2}.get(entry.dtype, 1)


def _is_of_adapter(entry: TensorEntry, adapter: AdapterConfig) -> bool:
    if entry.dtype not in FLOATS:
        return False
    for ending, axis in RANK_AXIS.items():
        if entry.name.endswith(ending):
            target = entry.name.partition(".lora_")[0].removeprefix("base_model.model.")
            rank = adapter.ranks.get(target, adapter.r)
            return len(entry.shape) == 2 and entry.shape[axis] == rank
    if entry.name.endswith(TOKEN_ROWS):
        module = entry.name.removesuffix(TOKEN_ROWS).removeprefix("base_model.model.")
        rows = adapter.trainable_tokens.get(module, ())
        return len(entry.shape) == 2 and entry.shape[0] == len(rows)
    if entry.name.endswith(MAGNITUDE):
        return adapter.use_dora and len(entry.shape) == 1
    return ".modules_to_save." in entry.name and ".lora_" not in entry.name
