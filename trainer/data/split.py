"""Which encoded rows are trained on, how often, which are held out, and which are asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import DataSection
from trainer.data.encode import Example
from trainer.data.plain_text import is_text
from trainer.data.rows import Row
from trainer.data.sources import Source
from trainer.errors import DataError
from trainer.profiles import Message


@dataclass(frozen=True)
class EncodedRow:
    """A row of a file and what became of it."""

    row: Row
    key: str
    """Hash of its content."""
    example: Example
    group: str
    """Hash of its prompt, the turns before the first answer; of plain text, of the text."""


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
    """False when the prompt is also trained on, with this answer or another one."""
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
    units = _units(section, encoded)
    held_units = _held_units(section, encoded, units)
    validation = [item for item, unit in zip(encoded, units, strict=True) if unit in held_units]
    train = [item for item, unit in zip(encoded, units, strict=True) if unit not in held_units]
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
    return (
        train,
        validation,
        f"{share} of the rows, by a hash of their prompt and seed {seed}; rows with one prompt "
        "stand on one side",
    )


def _wanted(section: DataSection, encoded: list[EncodedRow]) -> float:
    """How many rows are to be held out."""
    return round(section.validation_split * len(encoded), 6)


def _largest(section: DataSection, encoded: list[EncodedRow]) -> float:
    """Rows that may move to one side together: more would decide the share by chance."""
    return max(_wanted(section, encoded) / 2, 1)


def _units(section: DataSection, encoded: list[EncodedRow]) -> list[str]:
    """For each row, what it shares with the rows that go to the same side as it.

    That is its prompt; where too many rows share one, its content.
    """
    largest = _largest(section, encoded)
    sizes = Counter(item.group for item in encoded)
    return [item.group if sizes[item.group] <= largest else item.key for item in encoded]


def _held_units(section: DataSection, encoded: list[EncodedRow], units: list[str]) -> set[str]:
    """The units with the smallest hashes, up to the wanted number of rows.

    So the order of the file does not matter, and rows added to it hardly change who is held out.
    """
    wanted, largest = _wanted(section, encoded), _largest(section, encoded)
    sizes = Counter(units)
    held, count = set(), 0
    for unit in sorted(sizes):
        if sizes[unit] > largest:  # the same row again and again
            continue
        if count + sizes[unit] / 2 >= wanted:
            break
        held.add(unit)
        count += sizes[unit]
    return held


def shared_prompts(section: DataSection, encoded: list[EncodedRow]) -> tuple[tuple[int, str], ...]:
    """(rows, prompt) of prompts that too many rows share to stand on one side, most rows first."""
    if section.validation_path is not None or not section.validation_split:
        return ()
    largest = _largest(section, encoded)
    sizes = Counter(item.group for item in encoded)
    texts = {item.group: item.example.prompt for item in reversed(encoded)}
    return tuple((size, texts[group]) for group, size in sizes.most_common() if size > largest)


def trained_groups(validation: list[EncodedRow], train: list[EncodedRow]) -> frozenset[str]:
    """Groups of held-out rows whose prompt is trained on too, with whatever answer."""
    groups = {item.group for item in train}
    # Prompts of other turns can be the same tokens: cut at max_length, or rewritten by a profile.
    prompts = {
        tuple(item.example.prompt_ids): item.group
        for item in validation
        if not is_text(item.row.messages)
    }
    lengths = {len(ids) for ids in prompts}
    same = {
        prompts.get(tuple(item.example.prompt_ids))
        for item in train
        if item.example.prompt_length in lengths and not is_text(item.row.messages)
    }
    return frozenset(item.group for item in validation if item.group in groups | same)


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
    items: list[EncodedRow],
    count: int,
    is_held_out: bool,
    *,
    trained: frozenset[str] = frozenset(),
) -> tuple[HeldOutPrompt, ...]:
    """The first `count` distinct prompts, those that are nowhere trained on before the others.

    Args:
        items: the rows, in the order in which they are asked.
        count: at most so many prompts.
        is_held_out: the rows are not trained on.
        trained: groups of held-out rows that are trained on with another answer.
    """
    source = "validation" if is_held_out else "train"
    chosen: dict[tuple[int, ...], HeldOutPrompt] = {}
    groups: set[str] = set()
    for item in sorted(items, key=lambda item: item.group in trained):
        if len(chosen) == count:
            break
        ids = tuple(item.example.prompt_ids)
        if ids not in chosen and item.group not in groups:
            groups.add(item.group)
            chosen[ids] = HeldOutPrompt(
                prompt=item.example.prompt,
                prompt_ids=ids,
                golden_answer=item.example.golden_answer,
                prompt_id=f"{source}-{item.row.index}",
                is_held_out=is_held_out and item.group not in trained,
                golden_ids=tuple(item.example.golden_ids),
                messages=tuple(dict(turn) for turn in item.example.conversation),
            )
    return tuple(chosen.values())
