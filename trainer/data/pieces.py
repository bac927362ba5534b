"""A piece of encoded rows as flat arrays: what is kept, and what processes send each other."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from trainer.data.preparer import Outcome
from trainer.data.rows import IGNORE_INDEX, BadRowError, Example
from trainer.profiles import Message

Array = np.ndarray[Any, Any]

HASH_BYTES = 8
"""Of a hash that are kept, as a uint64 that sorts as the hash does. That two different ones of a
million agree has a chance of 3e-8; two prompts would go to one side of the split together."""

TRUNCATED, STOPS, STRIPPED, OPENED, BY_SHAPE, PLAIN_TEXT = (1 << bit for bit in range(6))
"""Bits of `flags`, each an attribute of `Example`."""


@dataclass(frozen=True)
class Problem:
    """A row of a piece that is not used."""

    place: int
    """Of the row in its piece."""
    error: BadRowError
    is_profiles: bool


@dataclass(frozen=True)
class Piece:
    """What became of some rows. An array has an item for each example, or all rows end to end."""

    places: Array
    """Of each example's row in the piece; a row can have several."""
    lengths: Array
    ids: Array
    labels: Array
    weights: dict[int, Array]
    """Example -> its loss weights, where they are not 1 for each trained token."""
    prompts: list[bytes]
    notes: list[bytes]
    """What `notes_of` makes of an example."""
    prompt_lengths: Array
    keys: Array
    """Hash of the row's content."""
    groups: Array
    """Hash of its prompt, the turns before the first answer."""
    asked: Array
    """Hash of the ids before the answer."""
    num_trained: Array
    num_removed: Array
    num_thoughts: Array
    flags: Array
    problems: list[Problem]


def piece_of(outcomes: Sequence[Outcome]) -> Piece:
    """The outcomes of some rows, in order, as arrays."""
    found = [
        (place, outcome, example)
        for place, outcome in enumerate(outcomes)
        for example in outcome.examples
    ]
    examples = [example for _, _, example in found]
    ids, labels = _flat(e.input_ids for e in examples), _flat(e.labels for e in examples)
    lengths = np.asarray([len(example.input_ids) for example in examples], np.int32)
    ends = np.cumsum(lengths)
    asked = [
        xxhash.xxh3_64_digest(ids[end - length :][: example.prompt_length].data)
        for example, end, length in zip(examples, ends, lengths, strict=True)
    ]
    return Piece(
        places=np.asarray([place for place, _, _ in found], np.int32),
        lengths=lengths,
        ids=ids,
        labels=labels,
        weights={
            number: np.asarray(example.weights, np.float32)
            for number, example in enumerate(examples)
            if example.weights is not None
        },
        prompts=[example.prompt.encode() for example in examples],
        notes=[notes_of(example) for example in examples],
        prompt_lengths=np.asarray([example.prompt_length for example in examples], np.int32),
        keys=_hashes([bytes.fromhex(outcome.key[: 2 * HASH_BYTES]) for _, outcome, _ in found]),
        groups=_hashes([bytes.fromhex(outcome.group[: 2 * HASH_BYTES]) for _, outcome, _ in found]),
        asked=_hashes(asked),
        num_trained=np.add.reduceat(labels != IGNORE_INDEX, ends - lengths, dtype=np.int32)
        if examples
        else np.zeros(0, np.int32),
        num_removed=np.asarray([example.num_removed for example in examples], np.int32),
        num_thoughts=np.asarray([example.num_thoughts for example in examples], np.int32),
        flags=np.asarray([_flags(example) for example in examples], np.uint8),
        problems=[
            Problem(place, outcome.error, outcome.is_profiles)
            for place, outcome in enumerate(outcomes)
            if outcome.error is not None
        ],
    )


def notes_of(example: Example) -> bytes:
    """What is asked of few rows: the turns before the answer, and the first text left out."""
    return pickle.dumps((example.conversation, example.stripped[:1]), pickle.HIGHEST_PROTOCOL)


def read_notes(notes: bytes) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """What `notes_of` was given. Never of a file that anybody else may have written."""
    found: tuple[tuple[Message, ...], tuple[str, ...]] = pickle.loads(notes)
    return found


def _flat(rows: Iterable[Sequence[int]]) -> Array:
    """Rows of ids end to end, int32."""
    flat = array("i")
    for row in rows:
        if isinstance(row, list):
            flat.fromlist(row)  # three times as fast
        else:
            flat.extend(row)
    return np.frombuffer(flat, np.int32)


def _hashes(digests: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _flags(example: Example) -> int:
    bits = (
        (TRUNCATED, example.is_truncated),
        (STOPS, example.ends_with_stop),
        (STRIPPED, bool(example.stripped)),
        (OPENED, example.is_opened),
        (BY_SHAPE, example.is_by_shape),
        (PLAIN_TEXT, not example.conversation),
    )
    return sum(bit for bit, is_set in bits if is_set)
