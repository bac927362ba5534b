"""Encoded rows as a dataset, their order, how they are packed, and how they become a batch."""

from __future__ import annotations

import bisect
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from trainer.data.file_arrays import FileArray, blocks_of
from trainer.data.rows import IGNORE_INDEX, Example

GROUPS_PER_POOL = 50  # batches sorted together: short padding, yet rows still meet new company

AnyArray = np.ndarray[Any, Any] | FileArray

BLANK = -1
"""Index of a row without anything to train: it fills the last batches of several processes."""

LOSS_WEIGHTS = "loss_weights"
"""Key of rows and batches: how much each label counts in the loss; absent: each counts 1."""

SOURCES = "sources"
"""Key of rows and batches: number of the source of each token; absent: all are of one source."""


class EpochOrder(Sampler[int]):
    """Row indices of one epoch, the same on every start, rank and resume.

    With `group_by_length` rows are shuffled, sorted by length within pools of 50 groups, cut into
    groups (one optimizer step each), and the groups are shuffled. No group has a place of its own:
    that the longest rows fit into memory is found out before the first step (core/checks.py).
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        group_size: int,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = True,
        multiple_of: int = 1,
    ) -> None:
        """Set up the order; `set_epoch` chooses the epoch.

        Args:
            lengths: of the rows, in tokens.
            group_size: rows of one optimizer step on all devices.
            multiple_of: an epoch is filled up with BLANK to a multiple of this; for several
                processes their rows of one forward pass. Else the sampler that deals batches out
                would repeat the epoch's first rows, and they would be trained twice.
        """
        self.lengths, self.group_size, self.seed = lengths, group_size, seed
        self.multiple_of = multiple_of
        self.shuffle, self.group_by_length = shuffle, group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; called by the training loop."""
        self.epoch = epoch

    @property
    def num_rows(self) -> int:
        """Rows of one epoch, the same in each: here every row once."""
        return len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may have fewer rows."""
        return -(-self.num_rows // self.group_size)

    def longest_rows(self, count: int) -> list[int]:
        """The `count` longest rows: no forward pass over as many is padded to more tokens."""
        return sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])[:count]

    def first_row_of_step(self, step: int) -> int:
        """The first row of optimizer step `step`, from 1, counted over all epochs."""
        epoch, nth = divmod(step - 1, self.steps_per_epoch)
        return self.epoch_rows(epoch)[nth * self.group_size]

    def __len__(self) -> int:
        """The rows of an epoch, and the blanks."""
        return -(-self.num_rows // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of the chosen epoch, then the blanks."""
        yield from self.epoch_rows(self.epoch)
        yield from [BLANK] * (len(self) - self.num_rows)

    def epoch_rows(self, epoch: int) -> list[int]:
        """The rows of one epoch in their order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self._drawn(epoch, generator)
        return self._grouped(order, generator) if self.shuffle and self.group_by_length else order

    def _drawn(self, epoch: int, generator: torch.Generator) -> list[int]:
        """The rows of one epoch before they are grouped by length."""
        if not self.shuffle:
            return list(range(len(self.lengths)))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        return order

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        size = self.group_size
        pool = size * GROUPS_PER_POOL
        groups: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            groups += [rows[i : i + size] for i in range(0, len(rows), size)]
        # A group that is not full must stay last, or the cut into batches would shift.
        full = [group for group in groups if len(group) == size]
        rest = [group for group in groups if len(group) != size]
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return [row for group in [*mixed, *rest] for row in group]


def length_buckets(longest: int) -> tuple[int, ...]:
    """The few lengths that batches are padded to where each length costs a compilation.

    Multiples of 64 up to 512, then four to each doubling, so that at most a fifth of a row longer
    than 512 is padding.

    Args:
        longest: of all rows, in tokens; the last bucket is this one, for no row needs more.
    """
    lengths, step = [64], 64
    while lengths[-1] < longest:
        if lengths[-1] >= 8 * step:
            step *= 2
        lengths.append(lengths[-1] + step)
    return (*lengths[:-1], longest)


class PadCollator:
    """Stacks rows into one right-padded batch."""

    def __init__(self, pad_id: int, *, buckets: Sequence[int] = ()) -> None:
        """`pad_id` fills short rows; its value never matters, it is masked.

        Args:
            buckets: lengths that batches are padded to, ascending; none: to the longest row.
        """
        self.pad_id, self.buckets = pad_id, tuple(buckets)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels, attention_mask, all (B, T) int64.

        Rows with loss weights make `loss_weights` too, (B, T) float32, aligned with the labels.
        The mask comes from the lengths, never from the pad id, which may equal a real token.
        """
        masked = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        return stack_rows(masked, pad_id=self.pad_id, buckets=self.buckets)


def stack_rows(
    rows: list[dict[str, Any]], *, pad_id: int, buckets: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """Stack every key of the rows to (B, T); padding has no label, weight 0 and position 0.

    T is the longest row's length, or the first bucket that is not below it.
    """
    fills = {"input_ids": pad_id, "labels": IGNORE_INDEX}
    longest = max(len(row["input_ids"]) for row in rows)
    missing = next((length - longest for length in buckets if length >= longest), 0)
    batch = {}
    for key in rows[0]:
        fill = fills.get(key, 0)
        stacked = pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
        batch[key] = F.pad(stacked, (0, missing), value=fill)
    return batch


def blank_row(*, has_weights: bool = False, has_sources: bool = False) -> dict[str, Any]:
    """What BLANK stands for: one token that nothing is trained on, so that attention has a key.

    Args:
        has_weights: the other rows have loss weights; all rows of a batch have the same keys.
        has_sources: the other rows say which source they are of.
    """
    row = {"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.tensor([IGNORE_INDEX])}
    if has_weights:
        row[LOSS_WEIGHTS] = torch.zeros(1)
    if has_sources:
        row[SOURCES] = torch.zeros(1, dtype=torch.int32)
    return row


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device; lengths that are plain numbers stay so."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


# ---- encoded rows as a torch dataset, and a row as people read it


class EncodedDataset(Dataset[dict[str, Any]]):
    """Examples in flat arrays; item i is {"input_ids", "labels"}, int64 tensors (T_i,).

    Where a trained token of any row has another loss weight than 1, every item has
    "loss_weights" too, a float32 tensor (T_i,), 0 where nothing is trained. Where rows are of
    several sources (`of_sources`), every item has "sources", int32 (T_i,).
    """

    sources: np.ndarray[Any, Any] | None = None
    """Number of the source of each row."""
    is_mixed = False
    """The order of rows depends on their sources."""

    def __init__(self, examples: list[Example]) -> None:
        """Copy ids, labels and weights of the examples, which may be dropped afterwards."""
        self.lengths = [len(example.input_ids) for example in examples]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        labels = _flat([example.labels for example in examples])
        self._ids: AnyArray = _flat([example.input_ids for example in examples])
        self._labels: AnyArray = labels
        self._weights: AnyArray | None = _flat_weights(examples, labels)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, AnyArray]) -> EncodedDataset:
        """The dataset that `as_arrays` was called on; arrays in files stay there."""
        dataset = cls([])
        dataset._starts, dataset._ids = np.asarray(arrays["starts"]), arrays["ids"]
        dataset._labels, dataset._weights = arrays["labels"], arrays.get("weights")
        dataset.lengths = np.diff(dataset._starts).tolist()
        return dataset

    def as_arrays(self) -> dict[str, AnyArray]:
        """All rows: ids, labels and any loss weights end to end, and where each row starts."""
        arrays: dict[str, AnyArray] = {
            "starts": self._starts,
            "ids": self._ids,
            "labels": self._labels,
        }
        return arrays if self._weights is None else {**arrays, "weights": self._weights}

    @property
    def longest(self) -> int:
        """No row is longer, in tokens."""
        return max(self.lengths)

    def of_sources(self, sources: np.ndarray[Any, Any], *, is_mixed: bool) -> EncodedDataset:
        """The same rows, each with the number of its source; (N,)."""
        assert len(sources) == len(self), "one source for each row"
        dataset = copy.copy(self)
        dataset.sources, dataset.is_mixed = np.asarray(sources), is_mixed
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        has_sources = self.sources is not None
        if index == BLANK:
            return blank_row(has_weights=self._weights is not None, has_sources=has_sources)
        part = slice(self._starts[index], self._starts[index + 1])
        row = {
            "input_ids": torch.from_numpy(self._ids[part].astype(np.int64)),
            "labels": torch.from_numpy(self._labels[part].astype(np.int64)),
        }
        if self._weights is not None:
            row[LOSS_WEIGHTS] = torch.from_numpy(self._weights[part].copy())
        if self.sources is not None:
            number = int(self.sources[index])
            row[SOURCES] = torch.full((self.lengths[index],), number, dtype=torch.int32)
        return row

    def fingerprint(self) -> str:
        """sha256 of all row borders, ids, labels and any loss weights, in order.

        And of the sources of rows, where these decide the order.
        """
        digest = hashlib.sha256()
        for array in self.as_arrays().values():
            for block in blocks_of(array):
                digest.update(block.tobytes())
        if self.is_mixed:
            digest.update(np.asarray(self.sources, np.uint16).tobytes())
        return digest.hexdigest()


def _flat(rows: list[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.concatenate(
        [np.asarray(row, dtype=np.int32) for row in rows] or [np.zeros(0, np.int32)]
    )


def _flat_weights(
    examples: list[Example], labels: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Loss weights end to end; None where each trained token counts 1, the plain token mean."""
    if all(example.weights is None for example in examples):
        return None
    weights = np.concatenate(
        [
            np.asarray(example.weights or [1.0] * len(example.labels), dtype=np.float32)
            for example in examples
        ]
    )
    is_trained = labels != IGNORE_INDEX
    assert weights.shape == labels.shape, "one weight for each label"
    assert bool(np.isfinite(weights).all() and (weights >= 0).all()), "weights are checked rows"
    weights = np.where(is_trained, weights, np.float32(0))
    return weights if (weights != is_trained).any() else None


def marked_text(
    tokenizer: Any, input_ids: list[int], labels: list[int]
) -> tuple[tuple[str, bool], ...]:
    """A row as decoded stretches of equal fate: (text, is trained)."""
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(input_ids, labels, strict=True):
        is_trained = label != IGNORE_INDEX
        if not stretches or stretches[-1][1] != is_trained:
            stretches.append(([], is_trained))
        stretches[-1][0].append(token)
    return tuple(
        (tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_trained)
        for ids, is_trained in stretches
    )


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


def packs_by_source(
    lengths: Sequence[int], sources: np.ndarray[Any, Any], capacity: int
) -> list[list[int]]:
    """`best_fit_decreasing` within each source, the packs of the first source first."""
    packs = []
    for source in np.unique(sources).tolist():
        own = np.flatnonzero(sources == source).tolist()
        found = best_fit_decreasing([lengths[index] for index in own], capacity)
        packs += [[own[place] for place in pack] for pack in found]
    return packs


class PackedDataset(EncodedDataset):
    """Packs of documents; item i is {"input_ids", "labels", "position_ids"}, int64 (T_i,).

    With "loss_weights", float32 (T_i,), where the rows have them.
    """

    def __init__(self, rows: EncodedDataset, capacity: int) -> None:
        """Pack the rows into sequences of at most `capacity` tokens.

        Of rows that are mixed by their sources each pack is of one source.
        """
        self.rows, self.document_lengths = rows, rows.lengths
        self.is_mixed = rows.is_mixed
        if rows.sources is not None and rows.is_mixed:
            self.packs = packs_by_source(self.document_lengths, rows.sources, capacity)
            self.sources = rows.sources[[pack[0] for pack in self.packs]]
        else:
            self.packs = best_fit_decreasing(self.document_lengths, capacity)
        self.lengths = [sum(self.document_lengths[i] for i in pack) for pack in self.packs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == BLANK:
            return join_documents([self.rows[BLANK]])
        documents = [self.rows[i] for i in self.packs[index]]
        return join_documents(documents)

    def fingerprint(self) -> str:
        """sha256 of the documents and of how they are packed."""
        return hashlib.sha256(
            (self.rows.fingerprint() + json.dumps(self.packs)).encode()
        ).hexdigest()


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

    def __init__(self, pad_id: int, *, buckets: Sequence[int] = ()) -> None:
        """`pad_id` fills short packs; its labels are ignored. `buckets` as of `PadCollator`."""
        self.pad_id, self.buckets = pad_id, tuple(buckets)

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids, all (B, T) int64; padding has position 0.

        Packs with loss weights make `loss_weights` too, (B, T) float32.
        """
        return dict(stack_rows(packs, pad_id=self.pad_id, buckets=self.buckets))


class JoinCollator:
    """Puts packs, or rows, of a batch end to end in one row, for kernels of any lengths.

    Such a kernel (flash attention) is told where documents begin. With several rows it is not:
    transformers then ignores positions, and documents of a row would see each other.
    """

    def __init__(self, *, with_borders: bool) -> None:
        """Without `with_borders` the model finds them in the positions of one row."""
        self.with_borders = with_borders

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids, (1, T) int64, without padding.

        A row that is no pack is a document by itself.

        With borders: `cu_seq_lens_q` and `_k`, (documents + 1,) int32, and the longest
        document's length as a plain number, which costs the device no wait; `max_length_q`, `_k`.
        """
        if "position_ids" not in packs[0]:
            packs = [join_documents([row]) for row in packs]
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
