"""Streamed training rows: a thread reads them ahead into a ring on disk, training takes them."""

from __future__ import annotations

import hashlib
import heapq
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.batches import BLANK, LOSS_WEIGHTS, SOURCES, EncodedDataset, blank_row
from trainer.data.encode import RowEncoder
from trainer.data.pieces import PLAIN_TEXT
from trainer.data.ring import Ring
from trainer.data.rows import IGNORE_INDEX, golden_ids
from trainer.data.spool import rows_in_blocks
from trainer.data.stream_reader import Mark, StreamPiece
from trainer.errors import DataError

Array = np.ndarray[Any, Any]

MIN_AHEAD = 2_048
"""Rows that may be read beyond those that training waits for, at least."""

WAIT_S = 0.5
"""Signals are looked at so often while training waits for rows."""

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Kept:
    """The training rows of a piece, in the ring."""

    before: Mark
    after: Mark
    begin: int
    """Of the piece in the ring."""
    starts: Array
    """Where each row begins among the ids, and the end."""
    weight_starts: Array
    prompt_starts: Array
    prompt_lengths: Array
    is_plain_text: Array
    sources: Array

    @property
    def first(self) -> int:
        """The number of its first row."""
        return self.before.number

    @property
    def num_ids(self) -> int:
        return int(self.starts[-1])


class StreamedDataset(EncodedDataset):
    """Training rows by number, those of later passes after those of the first; items are as of
    `EncodedDataset`. Rows must be taken about in order: what lies behind is given back."""

    def __init__(
        self,
        source: Iterator[StreamPiece],
        ring: Ring,
        encoder: RowEncoder,
        *,
        buffer_size: int,
    ) -> None:
        """Read nothing yet.

        Args:
            source: the rows.
            ring: for those that are read and not yet trained.
            encoder: that makes them.
            buffer_size: rows that are shuffled together.
        """
        self.ring, self.encoder, self.buffer_size = ring, encoder, buffer_size
        self.lengths: list[int] = []
        """Of the training rows that were read before the first step."""
        self.has_weights = False
        """Rows have loss weights: all of them or none."""
        self.has_sources = False
        """Rows say which source they are of."""
        self.samples = EncodedDataset([])
        """A few rows, for what is proved before training."""
        self.rows_per_pass: int | None = None
        """Training rows of a pass; None before the first one is complete."""
        self.start_step = 0
        """Steps that were done before a resume."""
        self.id_limit: int | None = None
        """Ids from here on have no embedding."""
        self.start_fingerprint = ""
        self.sizes: list[int | None] = []
        self._source = source
        self._kept: list[_Kept] = []
        self._next = Mark()
        self._wanted = 0
        self._is_full = self._is_closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # ---- the reading side

    def read_piece(self) -> StreamPiece:
        """Read and keep the next piece, before the thread does.

        Raises:
            DataError: the ring has no room for it, or what the reader raises.
        """
        assert self._thread is None, "the thread reads"
        piece = next(self._source)
        if self.lengths:
            self._refuse_weights(piece)
        with self._changed:
            if not self._keep(piece):
                raise self._too_small()
        return piece

    def begin_at(self, source: Iterator[StreamPiece], start: Mark, step: int) -> None:
        """Go on from another place: a resume's.

        Args:
            source: the rows from there on.
            start: that place.
            step: steps that are done.
        """
        self._close_source()
        self.release(self._next.number)
        self._source, self.start_step = source, step
        self._next, self.rows_per_pass = start, start.rows_per_pass
        self.read_piece()

    def _keep(self, found: StreamPiece) -> bool:
        """Put the training rows of a piece into the ring, if there is room. Under the lock."""
        order = np.flatnonzero(~found.is_held_out)
        if len(order):
            kept, parts = _as_kept(found, order)
            begin = self.ring.put(parts)
            if begin is None:
                return False
            self._kept.append(_Kept(found.before, found.after, begin, **kept))
        self._next, self.rows_per_pass = found.after, found.after.rows_per_pass
        self._changed.notify_all()
        return True

    def _fill(self) -> None:
        """Be the thread."""
        try:
            for piece in self._source:
                self._refuse_weights(piece)
                with self._changed:
                    while not self._is_closed and not self._has_room(piece):
                        self._changed.wait()
                    if self._is_closed:
                        return
        except BaseException as error:  # training raises it where it needs what is missing
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self, piece: StreamPiece) -> bool:
        """Whether the piece could be kept; not where it is far ahead. Under the lock."""
        if piece.before.number >= self._wanted:
            return False
        self._is_full = not self._keep(piece)
        if self._is_full:
            self._changed.notify_all()
        return not self._is_full

    def _refuse_weights(self, piece: StreamPiece) -> None:
        trained = np.flatnonzero(~piece.is_held_out).tolist()
        first = next((one for one in trained if one in piece.piece.weights), None)
        if first is not None and not self.has_weights:
            row = piece.rows[int(piece.piece.places[first])]
            raise DataError(
                f"{row.where}: the row has loss weights, and none of the first "
                f"{len(self.lengths):,} training rows has: all rows of a streamed run have them or "
                "none does. Put one with weights among the first, or take the weights out."
            )

    # ---- the training side

    def wait(self, number: int) -> None:
        """Wait until a row is read, or the first pass ends before it.

        Raises:
            DataError: the ring has no room for it.
            TrainerError: what the reader raised.
        """
        with self._changed:
            ahead = max(MIN_AHEAD, self.buffer_size // 2)
            self._wanted = max(self._wanted, number + 1 + ahead)
            self._changed.notify_all()
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._fill, name="row stream", daemon=True)
                self._thread.start()
            was_known = self.rows_per_pass is not None
            while self._next.number <= number:
                if not was_known and self.rows_per_pass is not None:
                    return
                if self._error is not None:
                    raise self._error
                assert not self._is_closed, "rows of a stream that is closed"
                if self._is_full:
                    raise self._too_small()
                self._changed.wait(WAIT_S)

    def release(self, number: int) -> None:
        """Give back the room of rows whose numbers are smaller."""
        with self._changed:
            while self._kept and self._kept[0].after.number <= number:
                self.ring.free(self._kept.pop(0).begin)
                self._is_full = False
            self._changed.notify_all()

    def __len__(self) -> int:
        """Training rows of a pass, as far as they are known."""
        return self._next.number if self.rows_per_pass is None else self.rows_per_pass

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == BLANK:
            return blank_row(has_weights=self.has_weights, has_sources=self.has_sources)
        kept, row = self._find(index)
        ids, labels, weights = self._read(kept, row)
        if self.id_limit is not None and int(ids.max()) >= self.id_limit:
            raise self._unknown_id(int(ids.max()))
        found = {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }
        if self.has_weights:
            plain = (labels != IGNORE_INDEX).astype(np.float32)
            found[LOSS_WEIGHTS] = torch.from_numpy(plain if weights is None else weights.copy())
        if self.has_sources:
            found[SOURCES] = torch.full((len(ids),), int(kept.sources[row]), dtype=torch.int32)
        return found

    def of_sources(self, sources: Array, *, is_mixed: bool) -> StreamedDataset:
        """The same rows, each with the number of its source from here on."""
        assert not is_mixed, "a rule of the config"
        self.has_sources = True
        return self

    def lengths_of(self, numbers: Sequence[int]) -> list[int]:
        """Lengths of rows that are read, in tokens."""
        found = []
        for number in numbers:
            kept, row = self._find(number)
            found.append(int(kept.starts[row + 1] - kept.starts[row]))
        return found

    def longest_rows(self, count: int) -> list[int]:
        """Numbers of the longest rows of those that are there."""
        with self._changed:
            there = list(self._kept)
        found = (
            (int(length), kept.first + row)
            for kept in there
            for row, length in enumerate(np.diff(kept.starts))
        )
        return [number for _, number in heapq.nlargest(count, found)]

    def text(self, number: int) -> tuple[str, str]:
        """Prompt and golden answer of a row that is there."""
        kept, row = self._find(number)
        begin, end = kept.prompt_starts[row : row + 2].tolist()
        at = kept.begin + 8 * kept.num_ids + 4 * int(kept.weight_starts[-1])
        prompt = self.ring.read(at + begin, "u1", end - begin).tobytes().decode()
        labels = self._read(kept, row)[1]
        say = self.encoder.sayer(is_plain_text=bool(kept.is_plain_text[row]))
        return prompt, say(golden_ids(labels.tolist(), int(kept.prompt_lengths[row])))

    @property
    def longest(self) -> int:
        """No row is longer, whatever is still to be read."""
        return self.encoder.max_length

    def fingerprint(self) -> str:
        """sha256 of the rows that were read before the first step, and of the buffer."""
        return self.start_fingerprint

    def refuse_ids_from(self, limit: int) -> None:
        """Have a row that holds such an id be an error when it is taken."""
        self.id_limit = limit

    def state(self, number: int) -> dict[str, Any]:
        """Where to read from so that a row and all later ones are there, as JSON values."""
        with self._changed:
            marks = [kept.before for kept in self._kept if kept.after.number > number]
            mark = marks[0] if marks else self._next
        return {"mark": mark.as_json(), "sizes": self.sizes}

    def counts_up_to(self, number: int) -> Mark:
        """What was counted up to the piece of a row that is there."""
        return self._find(number)[0].after

    def close(self) -> None:
        """End the thread, the processes that encode, and the file."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread is None or not self._thread.is_alive():
            self._close_source()
            self.ring.close()

    def _close_source(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _find(self, number: int) -> tuple[_Kept, int]:
        with self._changed:
            at = bisect_right(self._kept, number, key=lambda kept: kept.first) - 1
            assert at >= 0 and number < self._kept[at].after.number, "a row that is there"
            return self._kept[at], number - self._kept[at].first

    def _read(self, kept: _Kept, row: int) -> tuple[Array, Array, Array | None]:
        """Ids, labels and own weights of a row."""
        begin, end = kept.starts[row : row + 2].tolist()
        ids = self.ring.read(kept.begin + 4 * begin, "<i4", end - begin)
        labels = self.ring.read(kept.begin + 4 * (kept.num_ids + begin), "<i4", end - begin)
        first, last = kept.weight_starts[row : row + 2].tolist()
        if first == last:
            return ids, labels, None
        at = kept.begin + 8 * kept.num_ids + 4 * first
        return ids, labels, self.ring.read(at, "<f4", last - first)

    def _too_small(self) -> DataError:
        assert self.ring.max_bytes is not None, "a ring of any size is never full"
        return DataError(
            f"data.cache_max_gib={self.ring.max_bytes / 2**30:.3g} has no room for a buffer of "
            f"{self.buffer_size:,} rows and what is read ahead ("
            f"{sum(kept.after.number - kept.first for kept in self._kept):,} rows took "
            f"{self.ring.num_bytes / 2**30:.3g} GiB); raise it, or lower data.shuffle_buffer."
        )

    def _unknown_id(self, largest: int) -> DataError:
        token = self.encoder.tokenizer.convert_ids_to_tokens(largest)
        return DataError(
            f"a row holds the token {token!r} (id {largest}), and the model's embedding has "
            f"{self.id_limit} rows: it can be padded with, not read. Take it out of the rows."
        )


class StreamedTexts:
    """(prompt, golden answer) of the streamed training rows that are there."""

    def __init__(self, rows: StreamedDataset) -> None:
        """Speak of these."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[str, str]:
        return self.rows.text(number)


def _as_kept(found: StreamPiece, order: Array) -> tuple[dict[str, Array], list[Array]]:
    """What is remembered of some examples of a piece, and their bytes."""
    piece = found.piece
    starts = _starts(piece.lengths)
    prompts = [piece.prompts[number] for number in order.tolist()]
    weights = [piece.weights.get(number) for number in order.tolist()]
    kept = {
        "starts": _starts(piece.lengths[order]),
        "weight_starts": _starts([0 if one is None else len(one) for one in weights]),
        "prompt_starts": _starts(list(map(len, prompts))),
        "prompt_lengths": piece.prompt_lengths[order],
        "is_plain_text": piece.flags[order] & PLAIN_TEXT > 0,
        "sources": np.asarray([found.rows[place].source for place in piece.places[order].tolist()]),
    }
    parts = [
        *rows_in_blocks(piece.ids, starts, order),
        *rows_in_blocks(piece.labels, starts, order),
        *(one for one in weights if one is not None),
        np.frombuffer(b"".join(prompts), np.uint8),
    ]
    return kept, parts


def _starts(lengths: Any) -> Array:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def fingerprint_of(rows: EncodedDataset, num_rows: int, buffer_size: int) -> str:
    """sha256 of the first rows and of the buffer that orders them."""
    named: Mapping[str, Any] = {"rows": rows.fingerprint(), "num": num_rows, "buffer": buffer_size}
    return hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()
