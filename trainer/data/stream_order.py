"""The order of streamed rows: a function of the seed, and of how many rows a pass has once that is
known. It needs no list of the rows, and any part of it can be had without the parts before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.data.batches import BLANK, GROUPS_PER_POOL, EpochOrder
from trainer.data.stream_reader import Mark
from trainer.data.stream_rows import StreamedDataset

Array = np.ndarray[Any, Any]

KEPT_PARTS = 8
"""Parts of the order that are kept once they are made, of each kind."""


class SlidingShuffle:
    """An order of rows 0, 1, 2, ... in which each moves by less than a buffer.

    Row r has the key r + u with u drawn from 0 to size - 1, and rows go by their keys. So a row can
    come once the rows up to it are read, and is gone `size` rows later.
    """

    def __init__(self, seed: int, size: int) -> None:
        """Draw nothing yet.

        Args:
            seed: of the order.
            size: of the buffer, in rows.
        """
        self.seed, self.size = seed, size
        self._blocks: dict[tuple[int, int, int | None], Array] = {}

    def rows(self, epoch: int, begin: int, end: int, num_rows: int | None) -> Array:
        """The rows at places begin to end of an epoch's order.

        Args:
            num_rows: of an epoch; None: more than can come by these places.
        """
        parts, at = [], begin
        block = self._block_of(epoch, begin, num_rows)
        while at < end:
            rows = self._block(epoch, block, num_rows)
            first = at - self._before(epoch, block, num_rows)
            parts.append(rows[first : first + end - at])
            at += len(parts[-1])
            block += 1
        return np.concatenate(parts)

    def oldest(self, epoch: int, begin: int, num_rows: int | None) -> int:
        """No row with a smaller number has a place from `begin` on."""
        block = self._block_of(epoch, begin, num_rows)
        first = begin - self._before(epoch, block, num_rows)
        left = self._block(epoch, block, num_rows)[first:]
        after = self._block(epoch, block + 1, num_rows)
        return int(np.concatenate([left, after, [(block + 1) * self.size]]).min())

    def _block_of(self, epoch: int, place: int, num_rows: int | None) -> int:
        """Which block of keys, each `size` wide, holds a place."""
        block = place // self.size
        return block + (self._before(epoch, block + 1, num_rows) <= place)

    def _before(self, epoch: int, block: int, num_rows: int | None) -> int:
        """Places before a block of keys."""
        if block == 0:
            return 0
        _, keys, _ = self._keys(epoch, block - 1, num_rows)
        first = (block - 1) * self.size
        whole = first if num_rows is None else min(first, num_rows)
        return whole + int((keys < block * self.size).sum())

    def _block(self, epoch: int, block: int, num_rows: int | None) -> Array:
        """The rows whose keys are in a block, by their keys."""
        name = (epoch, block, num_rows)
        if name not in self._blocks:
            found = [self._keys(epoch, block, num_rows)]
            if block:
                found.insert(0, self._keys(epoch, block - 1, num_rows))
            rows, keys, ties = (np.concatenate(part) for part in zip(*found, strict=True))
            order = np.lexsort((ties, keys))
            self._blocks[name] = rows[order[keys[order] // self.size == block]]
            while len(self._blocks) > KEPT_PARTS:
                del self._blocks[next(iter(self._blocks))]
        return self._blocks[name]

    def _keys(self, epoch: int, block: int, num_rows: int | None) -> tuple[Array, Array, Array]:
        """The rows of a block of `size` numbers, their keys, and what orders equal ones."""
        first = block * self.size
        count = self.size if num_rows is None else min(max(num_rows - first, 0), self.size)
        generator = np.random.default_rng([self.seed, epoch, block])
        moves, ties = generator.integers(self.size, size=self.size), generator.random(self.size)
        rows = np.arange(first, first + count)
        return rows, rows + moves[:count], ties[:count]


class StreamOrder(EpochOrder):
    """Numbers of streamed rows in the order in which a run trains them, all epochs as one.

    A row is numbered among the training rows of the first pass, the second pass goes on from there.
    With `group_by_length` rows are sorted by length within pools of up to 50 groups, as in
    `EpochOrder`; a pool is no larger than the shuffle buffer.
    """

    def __init__(
        self,
        rows: StreamedDataset,
        *,
        group_size: int,
        num_steps: int,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = True,
    ) -> None:
        """Set up the order.

        Args:
            rows: the rows; a resumed run begins at their `start_step`.
            group_size: rows of one optimizer step on all devices.
            num_steps: of the whole run.
            seed: of the order.
        """
        super().__init__(
            rows.lengths,
            group_size=group_size,
            seed=seed,
            shuffle=shuffle,
            group_by_length=group_by_length,
        )
        self.rows, self.num_steps = rows, num_steps
        self.pool_size = group_size * max(min(GROUPS_PER_POOL, rows.buffer_size // group_size), 1)
        self._shuffle = SlidingShuffle(seed, rows.buffer_size)
        self._pools: dict[int, list[int]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """All steps: passes over the rows end within a step, and nobody knows when."""
        return self.num_steps

    def __len__(self) -> int:
        return self.num_steps * self.group_size

    def __iter__(self) -> Iterator[int]:
        """Yield blanks for what was trained before a resume, which skips them, then the rows."""
        return itertools.islice(self._all(), len(self))

    def _all(self) -> Iterator[int]:
        done = self.rows.start_step * self.group_size
        yield from itertools.repeat(BLANK, done)
        first, within = divmod(done, self.pool_size)
        for pool in itertools.count(first):
            rows = self._pool(pool)
            # What is handed out may not have been taken yet, and is asked for by the page.
            self.rows.release(self._oldest(max(pool - 1, 0) * self.pool_size))
            yield from rows[within:]
            within = 0

    def longest_rows(self, count: int) -> list[int]:
        """The longest rows of those that are read."""
        return self.rows.longest_rows(count)

    def first_row_of_step(self, step: int) -> int:
        """The first row of optimizer step `step`, from 1: one of the last two pools."""
        pool, place = divmod((step - 1) * self.group_size, self.pool_size)
        return self._pool(pool)[place]

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands after so many steps, as JSON values: what a resume reads."""
        place = step * self.group_size
        oldest = self._oldest(place // self.pool_size * self.pool_size)
        return {"step": step, **self.rows.state(oldest)}

    def read_up_to(self, step: int) -> Mark:
        """What was read for the steps up to this one, from 1, and the pool that it is of."""
        return self.rows.counts_up_to(
            max(self._pool((step - 1) * self.group_size // self.pool_size))
        )

    def _pool(self, pool: int) -> list[int]:
        """The rows of a pool in their order; waits until they are read."""
        if pool not in self._pools:
            begin = pool * self.pool_size
            rows = self._numbers(begin, begin + self.pool_size).tolist()
            self._pools[pool] = self._by_length(rows, pool) if self.group_by_length else rows
            while len(self._pools) > KEPT_PARTS:
                del self._pools[next(iter(self._pools))]
        return self._pools[pool]

    def _by_length(self, rows: list[int], pool: int) -> list[int]:
        if not self.shuffle:
            return rows
        lengths = dict(zip(rows, self.rows.lengths_of(rows), strict=True))
        ordered, size = sorted(rows, key=lambda row: -lengths[row]), self.group_size
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        places = np.random.default_rng([self.seed, pool]).permutation(len(groups)).tolist()
        return [row for place in places for row in groups[place]]

    def _numbers(self, begin: int, end: int) -> Array:
        """The rows at places begin to end of the whole run, before they are sorted."""
        while True:
            num_rows = self.rows.rows_per_pass
            found = self._at(begin, end, num_rows)
            last = int(found.max())
            self.rows.wait(last)
            known = self.rows.rows_per_pass
            if num_rows is not None or known is None or last < known:
                return found

    def _at(self, begin: int, end: int, num_rows: int | None) -> Array:
        if not self.shuffle:
            return np.arange(begin, end)
        if num_rows is None:
            return self._shuffle.rows(0, begin, end, None)
        parts = []
        while begin < end:
            epoch, place = divmod(begin, num_rows)
            until = min(num_rows, place + end - begin)
            rows = self._shuffle.rows(epoch, place, until, num_rows)
            parts.append(rows + epoch * num_rows)
            begin += until - place
        return np.concatenate(parts)

    def _oldest(self, place: int) -> int:
        """No row with a smaller number has a place from `place` on."""
        if not self.shuffle:
            return place
        num_rows = self.rows.rows_per_pass
        if num_rows is None:
            return self._shuffle.oldest(0, place, None)
        epoch, within = divmod(place, num_rows)
        oldest = self._shuffle.oldest(epoch, within, num_rows)
        return epoch * num_rows + min(oldest, num_rows)
