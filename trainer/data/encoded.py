"""The encoded rows of a run: small numbers of each in memory, ids and texts in a spool."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.file_arrays import FileArray
from trainer.data.pieces import PLAIN_TEXT, Piece, piece_of, read_notes
from trainer.data.rows import IGNORE_INDEX, Row, is_text, is_tokens
from trainer.data.spool import Spool, rows_in_blocks
from trainer.data.turns import num_openings
from trainer.profiles import Message

Array = np.ndarray[Any, Any]

NUMBERS = {
    "lengths": np.int32,
    "prompt_lengths": np.int32,
    "num_trained": np.int32,
    "num_removed": np.int32,
    "num_thoughts": np.int32,
    "flags": np.uint8,
}
"""Arrays of a piece that are taken as they are."""

HASHES = ("keys", "groups", "asked")

TEXTS = ("prompts", "notes", "columns")


@dataclass
class Tally:
    """What rows bring beside plain turns, counted while they pass."""

    num_read: int = 0
    """Rows of the training files, those that could not be encoded included."""
    num_text: int = 0
    """Of these: plain text."""
    num_tokens: int = 0
    """Of num_read: rows whose tokens are given."""
    first_text: str = ""
    """Where the first of them stands."""
    num_own_system: int = 0
    """Of num_read: rows that bring a system turn of their own."""
    num_marked: int = 0
    """Texts, of any file, in which control tokens are meant."""
    num_used: int = 0
    """Rows of any file with an example, as all that follow."""
    unused: Counter[str] = field(default_factory=Counter)
    num_untrained_turns: int = 0
    num_weighted_turns: int = 0
    num_openings: int = 0
    num_blank_questions: int = 0
    num_as_text: int = 0
    num_rendered: int = 0

    def add_read(self, row: Row) -> None:
        """Count a row of a training file."""
        self.num_read += 1
        self.num_tokens += is_tokens(row.messages)
        if is_text(row.messages):
            self.num_text += 1
            self.first_text = self.first_text or row.where
        self.num_own_system += row.messages[0]["role"] == "system"

    def add_used(self, row: Row) -> None:
        """Count a row that became an example."""
        self.num_used += 1
        self.unused.update(row.notes.unused)
        for turn in row.messages:
            weight = turn.get("weight", 1.0)
            self.num_untrained_turns += weight == 0
            self.num_weighted_turns += weight not in (0, 1)
        self.num_blank_questions += any(
            turn["role"] == "user" and not turn["content"].strip() for turn in row.messages
        )
        self.num_openings += num_openings(row.messages) > 0
        self.num_as_text += row.notes.num_as_text
        self.num_rendered += row.is_rendered

    def card_counts(self) -> dict[str, Any]:
        """What the data card tells of it, by the names of its fields."""
        return {
            "num_own_system": self.num_own_system,
            "num_untrained_turns": self.num_untrained_turns,
            "num_weighted_turns": self.num_weighted_turns,
            "num_openings": self.num_openings,
            "num_blank_questions": self.num_blank_questions,
            "unused_keys": dict(sorted(self.unused.items())),
            "num_as_text": self.num_as_text,
            "num_rendered": self.num_rendered,
        }


@dataclass(frozen=True)
class EncodedRows:
    """All examples of a run's files, those of the validation files last; an array has one item for
    each."""

    num_of_training: int
    """Examples of the training files."""
    numbers: dict[str, Array]
    """As NUMBERS and HASHES name them; `index` (of the row among all), `source` (number of its
    file), `row` (rows in use before it); `num_weights`, 0 or its length."""
    spool: Spool

    def __len__(self) -> int:
        return len(self.numbers["lengths"])

    def __getattr__(self, name: str) -> Array:
        try:
            return self.numbers[name]
        except KeyError:
            raise AttributeError(name) from None

    def is_plain_text(self) -> Array:
        """Whether each is of plain text, and of no conversation."""
        return (self.numbers["flags"] & PLAIN_TEXT) > 0

    def starts(self, name: str) -> Array:
        """Where each begins in a flat array (`lengths`, `prompts_bytes`, ...), and the end."""
        return np.concatenate([[0], np.cumsum(self.numbers[name], dtype=np.int64)])

    def ids(self) -> Array | FileArray:
        """The ids of all, end to end."""
        return self.spool.array("ids", np.int32)

    def labels(self) -> Array | FileArray:
        """Their labels."""
        return self.spool.array("labels", np.int32)

    def weights_in_blocks(self, order: Array) -> Iterator[Array]:
        """Loss weights of some examples end to end, float32; see `EncodedDataset`."""
        stored, starts = self.spool.array("weights", np.float32), self.starts("num_weights")
        labels, label_starts = self.labels(), self.starts("lengths")
        has_own = self.numbers["num_weights"] > 0
        borders = np.flatnonzero(np.diff(has_own[order])) + 1
        for part in np.split(order, borders):
            if len(part) and has_own[part[0]]:
                yield from rows_in_blocks(stored, starts, part)
            else:
                for block in rows_in_blocks(labels, label_starts, part):
                    yield (block != IGNORE_INDEX).astype(np.float32)


class RowStore:
    """Takes pieces as they come, and is the rows at the end."""

    def __init__(self, spool: Spool, *, with_columns: bool) -> None:
        """Keep all that a file says of its rows where `with_columns` says so."""
        self.spool, self.with_columns = spool, with_columns
        self.tally = Tally()
        # Buffers that grow in place: many small arrays, joined at the end, would be there twice.
        self._numbers: dict[str, bytearray] = {}
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._num, self._num_of_training = 0, 0

    def add(self, piece: Piece, rows: Sequence[Row], *, is_training: bool) -> None:
        """Take what became of some rows.

        Raises:
            DataError: there is no room for it on the disk.
        """
        places = piece.places.tolist()
        for name in (*NUMBERS, *HASHES):
            self._note(name, getattr(piece, name))
        self._note("index", np.asarray([rows[place].index for place in places], np.uint32))
        self._note("source", np.asarray([rows[place].source for place in places], np.uint16))
        nth = np.cumsum(np.diff(piece.places, prepend=-1) > 0) - 1
        self._note("row", (nth + self.tally.num_used).astype(np.uint32))
        self.spool.append("ids", piece.ids)
        self.spool.append("labels", piece.labels)
        num_weights = np.zeros(len(places), np.int32)
        for number, weights in piece.weights.items():
            num_weights[number] = len(weights)
            self.spool.append("weights", weights)
        self._note("num_weights", num_weights)
        columns = [
            pickle.dumps(rows[place].columns) if self.with_columns else b"" for place in places
        ]
        for name, texts in zip(TEXTS, (piece.prompts, piece.notes, columns), strict=True):
            self._note(f"{name}_bytes", np.asarray(list(map(len, texts)), np.int32))
            self.spool.append(name, np.frombuffer(b"".join(texts), np.uint8))
        for place in dict.fromkeys(places):
            self.tally.add_used(rows[place])
        self._num += len(places)
        if is_training:
            self._num_of_training = self._num

    def _note(self, name: str, array: Array) -> None:
        self._kinds[name] = array.dtype, array.shape[1:]
        self._numbers.setdefault(name, bytearray()).extend(array.tobytes())

    def finish(self) -> EncodedRows:
        """All of them; nothing can be added any more."""
        if not self._numbers:  # so that each array is there
            self.add(piece_of([]), [], is_training=True)
        numbers = {
            name: np.frombuffer(self._numbers[name], kind).reshape(-1, *shape)
            for name, (kind, shape) in self._kinds.items()
        }
        return EncodedRows(self._num_of_training, numbers, self.spool)


class RowReader:
    """What is asked of few of the rows, read from the spool."""

    def __init__(self, rows: EncodedRows) -> None:
        """Find out where each row's parts are."""
        self.rows = rows
        self._starts = {name: rows.starts(f"{name}_bytes") for name in TEXTS}
        self._texts = {name: rows.spool.array(name, np.uint8) for name in TEXTS}
        self._id_starts = rows.starts("lengths")
        self._ids, self._labels = rows.ids(), rows.labels()

    def ids(self, number: int) -> list[int]:
        """The ids of an example."""
        return self._of(self._ids, number)

    def labels(self, number: int) -> list[int]:
        """Its labels."""
        return self._of(self._labels, number)

    def prompt(self, number: int) -> str:
        """The turn that is answered."""
        return self._text("prompts", number).decode()

    def conversation(self, number: int) -> tuple[Message, ...]:
        """The turns before the answer; none for plain text."""
        return read_notes(self._text("notes", number))[0]

    def stripped(self, number: int) -> str:
        """The first text that the template left out, where there is one."""
        return read_notes(self._text("notes", number))[1][0]

    def columns(self, number: int) -> dict[str, Any]:
        """All that the file says of its row, where that is kept."""
        kept = self._text("columns", number)
        found: dict[str, Any] = pickle.loads(kept) if kept else {}
        return found

    def _of(self, flat: Array | FileArray, number: int) -> list[int]:
        found: list[int] = flat[self._id_starts[number] : self._id_starts[number + 1]].tolist()
        return found

    def _text(self, name: str, number: int) -> bytes:
        begin, end = self._starts[name][number : number + 2]
        return self._texts[name][begin:end].tobytes()
