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

from trainer.data.batches import BLANK, LOSS_WEIGHTS, stack_rows
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
