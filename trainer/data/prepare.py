"""`prepare_data`: the rows of a run, from the cache or encoded anew, and packed where asked for."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from trainer.config.schema import DataSection
from trainer.data.batches import BLANK, LOSS_WEIGHTS, EncodedDataset, stack_rows
from trainer.data.cache import (
    Arrays,
    CacheEntry,
    DamagedEntryError,
    NotCacheableError,
    cache_folder,
    find_entry,
)
from trainer.data.card import DataCard
from trainer.data.dataset import RunData, encode_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX
from trainer.data.sources import HeldOutPrompt, find_sources
from trainer.profiles import DataProfile, get_profile

# ---- packing: several documents in one row, kept apart by positions that restart, nothing cut
#
# Packs are formed once per run, from the lengths alone: every start and every resume has the same
# ones, and every document is in exactly one. What is shuffled each epoch is the order of packs.


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each document, longest first, into the fullest pack that still has room for it.

    Args:
        lengths: in tokens, none above capacity.
        capacity: of a pack, in tokens.
    Returns:
        Indices of the documents of each pack; every index is there once.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            packs.append([])
            free, pack = capacity, len(packs) - 1
        else:
            free, pack = rooms.pop(at)
        assert lengths[index] <= free, "a document longer than a pack"
        packs[pack].append(index)
        bisect.insort(rooms, (free - lengths[index], pack))
    return packs


class PackedDataset(EncodedDataset):
    """Packs of documents; item i is {"input_ids", "labels", "position_ids"}, int64 (T_i,).

    With "loss_weights", float32 (T_i,), where the rows have them.
    """

    def __init__(self, rows: EncodedDataset, capacity: int) -> None:
        """Pack the rows into sequences of at most `capacity` tokens."""
        self.rows, self.document_lengths = rows, rows.lengths
        self.packs = best_fit_decreasing(self.document_lengths, capacity)
        self.lengths = [sum(self.document_lengths[i] for i in pack) for pack in self.packs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pack as tensors."""
        if index == BLANK:
            return join_documents([self.rows[BLANK]])
        documents = [self.rows[i] for i in self.packs[index]]
        return join_documents(documents)

    def fingerprint(self) -> str:
        """sha256 of the documents and of how they are packed."""
        return hashlib.sha256(
            (self.rows.fingerprint() + json.dumps(self.packs)).encode()
        ).hexdigest()


def pack_training_rows(data: RunData) -> RunData:
    """The same data with its training rows packed; a pack goes by its first row's text."""
    packed = PackedDataset(data.train, data.encoder.max_length)
    return dataclasses.replace(
        data,
        train=packed,
        train_texts=tuple(data.train_texts[pack[0]] for pack in packed.packs),
        card=dataclasses.replace(data.card, num_packs=len(packed.packs)),
    )


def join_documents(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Put documents one behind the other, positions from 0 in each.

    The first token of each has no label: the token before it belongs to another document.
    """
    pack = {key: torch.cat([document[key] for document in documents]) for key in documents[0]}
    positions = torch.cat([torch.arange(len(document["input_ids"])) for document in documents])
    is_first = positions == 0
    pack["labels"] = pack["labels"].masked_fill(is_first, IGNORE_INDEX)
    if LOSS_WEIGHTS in pack:
        pack[LOSS_WEIGHTS] = pack[LOSS_WEIGHTS].masked_fill(is_first, 0.0)
    return {**pack, "position_ids": positions}


class PackCollator:
    """Stacks packs into one right-padded batch, without an attention mask.

    A mask, even of ones, would make attention ignore where documents begin.
    """

    def __init__(self, pad_id: int) -> None:
        """Take the id that fills short packs; its labels are ignored."""
        self.pad_id = pad_id

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids, all (B, T) int64; padding has position 0.

        Packs with loss weights make `loss_weights` too, (B, T) float32.
        """
        return dict(stack_rows(packs, pad_id=self.pad_id))


class JoinCollator:
    """Puts the packs of a batch end to end in one row, for kernels of sequences of any length.

    Such a kernel (flash attention) is told where documents begin. With several rows it is not:
    transformers then ignores positions, and documents of a row would see each other.
    """

    def __init__(self, *, with_borders: bool) -> None:
        """Say whether the model takes borders; else it finds them in the positions of one row."""
        self.with_borders = with_borders

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids, (1, T) int64, without padding.

        With borders: `cu_seq_lens_q` and `_k`, (documents + 1,) int32, and the longest
        document's length as a plain number, which costs the device no wait; `max_length_q`, `_k`.
        """
        batch: dict[str, Any] = {
            key: torch.cat([pack[key] for pack in packs])[None] for key in packs[0]
        }
        if not self.with_borders:
            return batch
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()
        end = torch.tensor([batch["input_ids"].shape[1]])
        borders = torch.cat([starts, end]).to(torch.int32)
        longest = int(borders.diff().max())
        return {
            **batch,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def count_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a batch that are neither padding nor blank, as a scalar on the batch's device."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)
        return (lengths * (lengths > 1)).sum()  # a row of one token is a blank
    # Padding has position 0, and so has each document's first token; its second has position 1.
    positions = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()


# ---- `prepare_data`: the rows of a run, from the cache where they are there, else encoded


logger = logging.getLogger(__name__)

NO_EFFECT = {"cache", "cache_dir", "shuffle", "group_by_length", "enable_packing"}
"""Options of section `data` that do not change the encoded rows."""


@dataclass(frozen=True)
class _Texts:
    """What is stored beside the arrays."""

    preview_prompts: tuple[HeldOutPrompt, ...]
    final_prompts: tuple[HeldOutPrompt, ...]
    train_texts: tuple[tuple[str, str], ...]
    card: DataCard
    system_prompt: str | None
    file_hashes: dict[str, str]


_TEXTS = TypeAdapter(_Texts)


def prepare_data(
    section: DataSection,
    *,
    encoder: RowEncoder,
    profile: DataProfile | None = None,
    system_prompt: str | None = None,
    is_prompt_configured: bool = False,
    seed: int = 42,
    num_preview: int = 0,
    num_final: int = 0,
    offline: bool = False,
) -> RunData:
    """Read and encode the rows of section `data`, or take them from the cache.

    Args:
        profile: rewrites the rows; None: `plain`, which leaves them as they are.
        offline: never ask the hub for a dataset.
    The other arguments and the errors are those of `encode_data`.
    """
    sources = find_sources(section.dataset_path, section.weights, offline=offline)
    held_out = (
        find_sources(section.validation_path, offline=offline)
        if (section.validation_path is not None)
        else []
    )
    options: dict[str, Any] = {
        "profile": profile or get_profile("plain"),
        "encoder": encoder,
        "system_prompt": system_prompt,
        "is_prompt_configured": is_prompt_configured,
        "seed": seed,
        "num_preview": num_preview,
        "num_final": num_final,
    }
    hashes = {source.name: source.content_hash() for source in [*sources, *held_out]}
    entry, note = _find_entry(section, hashes, options)
    if entry is not None:
        data, note = _read(entry, encoder)
        if data is not None:
            return data
    data = encode_data(section, sources, held_out, **options)
    if entry is not None:
        # A file that was written to meanwhile must not be kept under its earlier content.
        is_same = data.file_hashes == hashes
        note = _write(entry, data, note) if is_same else "not written: a file changed while read"
    return replace(data, card=replace(data.card, cache=note))


def _find_entry(
    section: DataSection, hashes: dict[str, str], options: dict[str, Any]
) -> tuple[CacheEntry | None, str]:
    """The cache entry of these rows, or None and the reason."""
    if not section.cache:
        return None, "off (data.cache=false)"
    parts = {
        **options,
        "section": section.model_dump(mode="json", exclude=NO_EFFECT),
        "files": list(hashes.items()),
    }
    try:
        return find_entry(cache_folder(section.cache_dir), Path(next(iter(hashes))).name, parts), ""
    except NotCacheableError as error:
        return None, f"not used: {error}"


def _read(entry: CacheEntry, encoder: RowEncoder) -> tuple[RunData | None, str]:
    """The rows, or None and a notice."""
    try:
        arrays = entry.load()
    except DamagedEntryError as error:
        logger.warning("%s: %s; the rows are encoded again", entry.path, error)
        return None, f"damaged entry replaced ({error}): "
    return (None, "") if arrays is None else (_from_arrays(arrays, entry, encoder), "")


def _write(entry: CacheEntry, data: RunData, note: str) -> str:
    try:
        removed = entry.store(_as_arrays(data))
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s); the next start encodes again", entry.path, error
        )
        return f"not written: {error.strerror}"
    more = f"; {removed} older entries of this file name removed" if removed else ""
    return f"{note}written to {entry.path}{more}"


def _as_arrays(data: RunData) -> Arrays:
    texts = _Texts(
        preview_prompts=data.preview_prompts,
        final_prompts=data.final_prompts,
        train_texts=data.train_texts,
        card=data.card,
        system_prompt=data.system_prompt,
        file_hashes=data.file_hashes,
    )
    arrays = {"texts": np.frombuffer(_TEXTS.dump_json(texts), dtype=np.uint8)}
    for name, dataset in (("train", data.train), ("validation", data.validation)):
        if dataset is not None:
            arrays |= {f"{name}_{key}": part for key, part in dataset.as_arrays().items()}
    return arrays


def _from_arrays(arrays: Arrays, entry: CacheEntry, encoder: RowEncoder) -> RunData:
    texts = _TEXTS.validate_json(arrays["texts"].tobytes())

    def dataset(name: str) -> EncodedDataset:
        prefix = f"{name}_"
        return EncodedDataset.from_arrays(
            {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
        )

    return RunData(
        train=dataset("train"),
        validation=dataset("validation") if "validation_ids" in arrays else None,
        preview_prompts=texts.preview_prompts,
        final_prompts=texts.final_prompts,
        train_texts=texts.train_texts,
        card=replace(texts.card, cache=f"read from {entry.path}"),
        encoder=encoder,
        system_prompt=texts.system_prompt,
        file_hashes=texts.file_hashes,
    )
