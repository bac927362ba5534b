"""How the rows of several sources share an epoch: `data.mix_probabilities`, and what each has.

As with `datasets.interleave_datasets` an epoch ends with the first source that runs out, or with
the last one. There the source of each row is drawn by itself, so that an epoch's length changes
with the draw. Here every epoch has as many rows of each source as its share says, in an order that
is drawn: the length of a run is known before it begins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from trainer.config.schema import DataSection
from trainer.data.batches import EpochOrder
from trainer.errors import ConfigError, DataError

Array = np.ndarray[Any, Any]

MAX_NAME = 40
"""Characters of a source's name in metrics."""

SUFFIXES = (".gz", ".zst", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".arrow")
"""Endings of files that a short name leaves out."""


@dataclass(frozen=True)
class SourceShare:
    """What one source has in an epoch."""

    name: str
    """As metrics name it."""
    source: str
    """As `data.dataset_path` names it."""
    num_rows: int
    """Training rows; with data.weights as often as they are repeated."""
    num_tokens: int
    """Of these."""
    num_epoch_rows: int
    """Rows of an epoch; a pack counts as the rows that a pack has in the mean."""
    num_epoch_tokens: int
    """Their tokens: in the mean, where an epoch has another number of rows."""


def check_mix(section: DataSection, names: Sequence[str]) -> None:
    """Refuse probabilities that do not fit the sources of `data.dataset_path`.

    Raises:
        ConfigError: another number of probabilities than of sources, or a single source.
    """
    shares = section.mix_probabilities
    if shares and len(shares) != len(names):
        raise ConfigError(
            f"data.mix_probabilities has {len(shares)} numbers, data.dataset_path names "
            f"{len(names)} files; give one for each, or none."
        )


def short_names(sources: Sequence[str]) -> tuple[str, ...]:
    """A name for each source that is short and no other one's: the end of its path or hub id."""
    parts = [_parts(source) for source in sources]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(one[-depth:])[-MAX_NAME:] for one in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{number}-{name}" for number, name in enumerate(names, start=1))


def _parts(source: str) -> list[str]:
    *folders, name = PurePath(source).parts or (source,)
    while name.lower().endswith(SUFFIXES) and PurePath(name).stem != name:
        name = PurePath(name).stem
    parts = [part for part in (*folders, name) if part not in ("/", ".", "..")] or [source]
    return [re.sub(r"[^\w.-]", "-", part) for part in parts]


def rows_per_epoch(
    sizes: Sequence[int], probabilities: Sequence[float], *, ends_with: str
) -> list[int]:
    """How many rows of each source an epoch has.

    Args:
        sizes: rows (or packs) of each source, at least one.
        probabilities: of the sources; their sum need not be exactly 1.
        ends_with: `first` or `longest`, as `data.mix_epoch`.
    Returns:
        With `first` at most the size, and for one source just that; with `longest` at least it.
    """
    shares = [share / sum(probabilities) for share in probabilities]
    lengths = [size / share for size, share in zip(sizes, shares, strict=True)]
    is_first = ends_with == "first"
    length, bound = (min(lengths), min) if is_first else (max(lengths), max)
    return [bound(round(length * share), size) for size, share in zip(sizes, shares, strict=True)]


class MixedOrder(EpochOrder):
    """Row indices of one epoch in which each source has its share.

    The rows of a source are taken in passes: each has all of them, in an order of its own. With
    `first` an epoch goes on in them where the one before stopped; with `longest` each epoch begins
    a new one.
    """

    def __init__(
        self,
        lengths: list[int],
        sources: Array,
        probabilities: Sequence[float],
        *,
        ends_with: str,
        names: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Count the rows of an epoch.

        Args:
            lengths: of the rows, in tokens.
            sources: number of the source of each row.
            probabilities: of the sources.
            ends_with: as `data.mix_epoch`.
            names: of the sources, for messages.
            options: of `EpochOrder`.
        Raises:
            DataError: a source has no row to train, or its share of an epoch is less than one.
        """
        super().__init__(lengths, **options)
        self._own = [
            np.flatnonzero(sources == number).astype(np.int32)
            for number in range(len(probabilities))
        ]
        names = names or [f"source {number}" for number in range(len(probabilities))]
        for name, own in zip(names, self._own, strict=True):
            if not len(own):
                raise DataError(
                    f"{name}: no row is left to train, so data.mix_probabilities cannot give it a "
                    "share; take it out of data.dataset_path."
                )
        sizes = [len(own) for own in self._own]
        self.counts = rows_per_epoch(sizes, probabilities, ends_with=ends_with)
        for name, count, share in zip(names, self.counts, probabilities, strict=True):
            if not count:
                raise DataError(
                    f"{name}: its share of {share:g} is less than one row (or pack) of an epoch of "
                    f"{sum(self.counts)}; raise its probability, or set data.mix_epoch=longest."
                )
        is_first = ends_with == "first"
        self._strides = [
            count if is_first else -(-count // size) * size
            for count, size in zip(self.counts, sizes, strict=True)
        ]

    @property
    def num_rows(self) -> int:
        """Rows of one epoch, the same in each."""
        return sum(self.counts)

    def _drawn(self, epoch: int, generator: torch.Generator) -> list[int]:
        """The places of the sources are drawn, and each source's rows fill its places."""
        numbers = np.repeat(np.arange(len(self.counts)), self.counts)
        places = numbers[torch.randperm(self.num_rows, generator=generator).numpy()]
        rows = np.empty(self.num_rows, np.int32)
        for number, count in enumerate(self.counts):
            begin = epoch * self._strides[number]
            rows[places == number] = self._taken(number, begin, begin + count)
        found: list[int] = rows.tolist()
        return found

    def _taken(self, number: int, begin: int, end: int) -> Array:
        """Rows `begin` to `end` of a source, counted over its passes."""
        own = self._own[number]
        size = len(own)
        first, last = begin // size, (end - 1) // size
        passes = [own[self._pass(number, nth)] for nth in range(first, last + 1)]
        return np.concatenate(passes)[begin - first * size : end - first * size]

    def _pass(self, number: int, nth: int) -> Array:
        """The order of a source's rows in one pass."""
        size = len(self._own[number])
        if not self.shuffle:
            return np.arange(size)
        digest = hashlib.sha256(f"{self.seed}/{number}/{nth}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        order: Array = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()
        return order
