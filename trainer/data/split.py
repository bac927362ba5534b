"""Which encoded rows are trained on, how often, which are held out, and which are asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import DataSection
from trainer.data.encode import Example
from trainer.data.rows import Row
from trainer.data.sources import Source
from trainer.errors import DataError
from trainer.profiles import Message


@dataclass(frozen=True)
class EncodedRow:
    """A row of a file and what became of it."""

    row: Row
    key: str
    example: Example


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt to be answered again and again, with the answer the data gives."""

    prompt: str
    prompt_ids: tuple[int, ...]
    """The prefix of the row's own ids up to its first trained token."""
    golden_answer: str
    prompt_id: str
    """`validation-12` or `train-3`: source and position in the file."""
    is_held_out: bool
    """False when the row is also trained on."""
    golden_ids: tuple[int, ...] = ()
    """The row's trained ids behind that prefix, up to the end of the turn."""
    messages: tuple[dict[str, Any], ...] = ()
    """The turns that are answered, for servers that render them; empty for plain text. One of them
    carries the row's tools."""


def content_key(messages: list[Message], seed: int) -> str:
    """A hash of a row's content and the seed, hex; equal rows have equal keys."""
    content = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()


def split_rows(
    section: DataSection, encoded: list[EncodedRow], held_out: list[EncodedRow], seed: int
) -> tuple[list[EncodedRow], list[EncodedRow], str]:
    """Training rows, validation rows, and how they were parted, in words."""
    if section.validation_path is not None:
        if not held_out:
            raise DataError(f"{section.validation_path}: no usable row to validate on.")
        return encoded, held_out, f"all rows of {section.validation_path}"
    if not section.validation_split:
        return encoded, [], "none (data.validation_split=0); previews use training rows"
    # The rows with the smallest hashes: equal rows go together, and the order of the file and
    # rows added to it hardly change who is held out.
    keys = sorted({item.key for item in encoded})
    held_keys = set(keys[: round(section.validation_split * len(keys))])
    validation = [item for item in encoded if item.key in held_keys]
    train = [item for item in encoded if item.key not in held_keys]
    share = f"{section.validation_split:.1%}"
    if len(train) < 2 or len(validation) < 2:
        return (
            encoded,
            [],
            (
                f"none: {share} of {len(encoded)} rows leaves fewer than two on a side; previews "
                "use training rows (data.validation_path or a larger data.validation_split helps)"
            ),
        )
    return train, validation, f"{share} of the rows, by content hash and seed {seed}"


def weigh_rows(sources: list[Source], train: list[EncodedRow]) -> tuple[list[EncodedRow], str]:
    """The training rows as often as data.weights says, and that in words."""
    if all(source.weight == 1 for source in sources):
        return train, ""
    chosen: list[EncodedRow] = []
    words = []
    for number, source in enumerate(sources):
        own = [item for item in train if item.row.source == number]
        times, share = divmod(source.weight, 1)
        # Which rows are in the part: by content, so that the order of the file does not matter.
        by_key = sorted(range(len(own)), key=lambda index: (own[index].key, index))
        part = sorted(by_key[: round(share * len(own))])
        used = own * int(times) + [own[index] for index in part]
        words.append(f"{source.name} x {source.weight:g} ({len(own):,} -> {len(used):,} rows)")
        chosen += used
    if not chosen:
        raise DataError(
            f"data.weights leaves no training row ({', '.join(words)}); raise a weight."
        )
    return chosen, ", ".join(words)


def first_prompts(
    items: list[EncodedRow], count: int, is_held_out: bool
) -> tuple[HeldOutPrompt, ...]:
    """The first `count` distinct prompts."""
    source = "validation" if is_held_out else "train"
    chosen: dict[tuple[int, ...], HeldOutPrompt] = {}
    for item in items:
        if len(chosen) == count:
            break
        ids = tuple(item.example.prompt_ids)
        if ids not in chosen:
            chosen[ids] = HeldOutPrompt(
                prompt=item.example.prompt,
                prompt_ids=ids,
                golden_answer=item.example.golden_answer,
                prompt_id=f"{source}-{item.row.index}",
                is_held_out=is_held_out,
                golden_ids=tuple(item.example.golden_ids),
                messages=tuple(dict(turn) for turn in item.example.conversation),
            )
    return tuple(chosen.values())
