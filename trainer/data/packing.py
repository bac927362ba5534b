"""Packing: several documents in one row, kept apart by positions that restart, nothing cut.

Packs are formed once per run, from the lengths alone: every start and every resume has the same
ones, and every document is in exactly one. What is shuffled each epoch is the order of packs.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trainer.data.batches import BLANK, blank_row
from trainer.data.dataset import EncodedDataset, RunData
from trainer.data.encode import IGNORE_INDEX


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
    """Packs of documents; item i is {"input_ids", "labels", "position_ids"}, int64 (T_i,)."""

    def __init__(self, rows: EncodedDataset, capacity: int) -> None:
        """Pack the rows into sequences of at most `capacity` tokens."""
        self._rows, self.document_lengths = rows, rows.lengths
        self.packs = best_fit_decreasing(self.document_lengths, capacity)
        self.lengths = [sum(self.document_lengths[i] for i in pack) for pack in self.packs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pack as tensors."""
        if index == BLANK:
            return join_documents([blank_row()])
        documents = [self._rows[i] for i in self.packs[index]]
        return join_documents(documents)

    def fingerprint(self) -> str:
        """sha256 of the documents and of how they are packed."""
        return hashlib.sha256(
            (self._rows.fingerprint() + json.dumps(self.packs)).encode()
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
    labels = [document["labels"].clone() for document in documents]
    for own in labels:
        own[:1] = IGNORE_INDEX
    return {
        "input_ids": torch.cat([document["input_ids"] for document in documents]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(own)) for own in labels]),
    }


class PackCollator:
    """Stacks packs into one right-padded batch, without an attention mask.

    A mask, even of ones, would make attention ignore where documents begin.
    """

    def __init__(self, pad_id: int) -> None:
        """Take the id that fills short packs; its labels are ignored."""
        self.pad_id = pad_id

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels, position_ids, all (B, T) int64; padding has position 0."""
        fills = {"input_ids": self.pad_id, "labels": IGNORE_INDEX, "position_ids": 0}
        return {
            key: pad_sequence([pack[key] for pack in packs], batch_first=True, padding_value=fill)
            for key, fill in fills.items()
        }


def count_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a batch that are neither padding nor blank, as a scalar on the batch's device."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)
        return (lengths * (lengths > 1)).sum()  # a row of one token is a blank
    # Padding has position 0, and so has each document's first token; its second has position 1.
    positions = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()
