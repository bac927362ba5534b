"""`data.dataset_path` -> rows, and which of them are trained on, held out and asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config.schema import DataSection
from trainer.counts import counted
from trainer.data.layouts import FORMATS
from trainer.data.row_files import SUFFIXES, RawRow, raw_rows, to_rows
from trainer.data.rows import Example, PreviewRequest, Row, RowErrors, is_text
from trainer.data.tables import own_values
from trainer.errors import ConfigError, DataError
from trainer.net import hub_answers
from trainer.profiles import Message

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Source:
    """One file, or one hub dataset."""

    name: str
    weight: float = 1.0
    offline: bool = False

    @property
    def is_hub(self) -> bool:
        """Whether the name is a hub id: it looks like one, and no file or folder is there."""
        path = Path(self.name)
        return bool(
            HUB_ID.fullmatch(self.name)
            and path.suffix.lower() not in SUFFIXES
            and not path.exists()
            and not path.parent.exists()
        )

    def rows(self) -> Iterator[RawRow]:
        """The raw rows in order."""
        return self._hub_rows() if self.is_hub else raw_rows(Path(self.name))

    def content_hash(self) -> str:
        """sha256 of the file, or the hub dataset's own fingerprint.

        Raises:
            DataError: it is not there.
        """
        if self.is_hub:
            return f"hub:{self._hub_dataset._fingerprint}"
        try:
            with Path(self.name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            next(self.rows(), None)  # has better words for a missing file or a folder
            raise DataError(f"{self.name}: cannot be read ({error.strerror}).") from error

    def _hub_rows(self) -> Iterator[RawRow]:
        schema = self._hub_dataset.features.arrow_schema
        for index, row in enumerate(self._hub_dataset):
            yield f"{self.name}[{index}]", own_values(row, schema)

    @cached_property
    def _hub_dataset(self) -> Any:
        # `datasets` takes a second to load, and most data lies in files.
        import datasets

        repository, _, split = self.name.partition(":")
        offline = self.offline or not hub_answers()
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(
                repository,
                split=split or DEFAULT_SPLIT,
                download_config=datasets.DownloadConfig(local_files_only=offline),
            )
        except Exception as error:  # what the hub, the network and the format raise
            why = "offline, and not in the cache" if offline else " ".join(str(error).split())
            raise DataError(
                f"{self.name}: no such file, and as a hub dataset it cannot be loaded ({why}). "
                "Give a file, or an id owner/name:split that can be reached or was loaded before."
            ) from error


def find_sources(
    text: str, weights: Sequence[float] = (), *, offline: bool = False
) -> list[Source]:
    """Cut `data.dataset_path` or `data.validation_path` into sources.

    Args:
        text: one name, or several with commas between; a comma in the name of a file that is
            there does not cut it.
        weights: one for each name, or none.
        offline: never ask the hub.
    Raises:
        ConfigError: another number of weights than of names, or a name given twice.
    """
    names = [text] if Path(text).exists() else [part.strip() for part in text.split(",")]
    names = [os.path.expanduser(name) for name in names if name] or [text]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"data: {twice[0]!r} is named twice; name it once (data.weights repeats rows)."
        )
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"data.weights has {len(weights)} numbers, data.dataset_path names {len(names)} "
            "files; give one for each, or none."
        )
    return [
        Source(name, weight, offline)
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    ]


def check_files(section: DataSection) -> None:
    """Look for the data files before anything slow is done.

    Raises:
        ConfigError: as `find_sources` does.
        DataError: a file is not there, or it is a folder.
    """
    sources = find_sources(section.dataset_path, section.weights)
    if section.validation_path is not None:
        sources += find_sources(section.validation_path)
    for source in sources:
        if not source.is_hub and not Path(source.name).is_file():
            next(source.rows(), None)  # has the words


def read_sources(
    sources: list[Source],
    section: DataSection,
    errors: RowErrors,
    *,
    max_rows: int | None,
    with_columns: bool = False,
) -> tuple[list[Row], str]:
    """Rows of all sources in order, and the formats they are in.

    Raises:
        DataError: a source is missing, empty or damaged.
        ConfigError: `data.columns` names a key that the format does not have.
    """
    rows: list[Row] = []
    formats: list[str] = []
    first_index = 0
    for number, source in enumerate(sources):
        counted = _Counted(source.rows())
        found, name = to_rows(
            counted,
            source.name,
            section.format,
            errors,
            max_rows,
            columns=section.columns,
            first_index=first_index,
            source=number,
            with_columns=with_columns,
        )
        first_index += counted.count
        rows += found
        if name not in formats:
            formats.append(name)
        _check_columns(section, name)
    return rows, ", ".join(formats)


class _Counted:
    """An iterator that knows how many rows it gave."""

    def __init__(self, rows: Iterator[RawRow]) -> None:
        self.rows, self.count = rows, 0

    def __iter__(self) -> Iterator[RawRow]:
        for row in self.rows:
            self.count += 1
            yield row


def _check_columns(section: DataSection, name: str) -> None:
    if name not in FORMATS:  # no row was good enough to tell
        return
    known = FORMATS[name].takes
    unknown = sorted(set(section.columns) - known)
    if unknown:
        raise ConfigError(
            f"data.columns names {', '.join(map(repr, unknown))}, which format {name!r} does not "
            f"have; its keys: {', '.join(sorted(known))}. Write them as key=your_column."
        )


# ---- which encoded rows are trained on, how often, which are held out, and which are asked


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
class Sides:
    """The encoded rows of a run, and which of them are trained on and held out."""

    encoded: list[EncodedRow]
    """All of the training files, in order."""
    held_out: list[EncodedRow]
    """All of the validation files."""
    train: list[EncodedRow]
    """As often as data.weights says."""
    validation: list[EncodedRow]
    how: str
    """How rows were held out, in words."""
    mix: str
    """How often the rows of each file are trained, in words; empty: once each."""
    trained_groups: frozenset[str]
    """Groups of held-out rows whose prompt is trained on too."""


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
        return encoded, [], "none (data.validation_split=0); previews use training prompts"
    units = _units(section, encoded)
    held_units = _held_units(section, encoded, units)
    validation = [item for item, unit in zip(encoded, units, strict=True) if unit in held_units]
    train = [item for item, unit in zip(encoded, units, strict=True) if unit not in held_units]
    share = f"{section.validation_split:.1%}"
    if len(train) < 2 or len(validation) < 2:
        why = (
            f"none: {share} of {counted(len(encoded), 'row')} would leave fewer than two for "
            "training or for validation; previews use training prompts (set "
            "data.validation_path, or raise "
            "data.validation_split)"
        )
        return encoded, [], why
    return (
        train,
        validation,
        f"{share} of the rows, chosen by a hash of the prompt and seed {seed}; rows with the same "
        "prompt stay together",
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
    prompts: dict[tuple[int, ...], set[str]] = {}
    for item in validation:
        if not is_text(item.row.messages):
            prompts.setdefault(tuple(item.example.prompt_ids), set()).add(item.group)
    lengths = {len(ids) for ids in prompts}
    same: set[str] = set()
    for item in train:
        if item.example.prompt_length in lengths and not is_text(item.row.messages):
            same |= prompts.get(tuple(item.example.prompt_ids), set())
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
        words.append(
            f"{source.name} x {source.weight:g} ({len(own):,} -> {counted(len(used), 'row')})"
        )
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
    also_trained: frozenset[str] = frozenset(),
) -> tuple[PreviewRequest, ...]:
    """The first `count` distinct prompts, those that are nowhere trained on before the others.

    Which these are is decided by the rows as they are in the file: profiles that are compared on
    one file are asked the same rows, also where one of them rewrites two prompts to the same.

    Args:
        items: the rows, in the order in which they are asked.
        count: at most so many prompts.
        is_held_out: the rows are not trained on.
        trained: groups of rows that are trained on.
        also_trained: groups of held-out rows whose prompt is trained on, maybe only after both were
            rewritten or cut.
    """
    source = "validation" if is_held_out else "train"
    chosen: dict[str, PreviewRequest] = {}
    for item in sorted(items, key=lambda item: item.group in trained):
        if len(chosen) == count:
            break
        ids = tuple(item.example.prompt_ids)
        if item.group not in chosen:
            chosen[item.group] = PreviewRequest(
                prompt=item.example.prompt,
                prompt_token_ids=ids,
                golden_answer=item.example.golden_answer,
                prompt_id=f"{source}-{item.row.index}",
                held_out=is_held_out and item.group not in trained | also_trained,
                golden_token_ids=tuple(item.example.golden_ids) or None,
                messages=tuple(dict(turn) for turn in item.example.conversation),
                row=json.loads(json.dumps(item.row.columns, default=str)),
            )
    return tuple(chosen.values())
