"""The order of an epoch in which each source has its share (`data.mix_probabilities`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.batches import EpochOrder
from trainer.data.mixing import rows_per_epoch
from trainer.errors import DataError

Array = np.ndarray[Any, Any]


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
