"""`data.dataset_path` -> the rows of its files and hub datasets, in order."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config.schema import DataSection
from trainer.data.layouts import FORMATS
from trainer.data.mixing import check_mix
from trainer.data.row_files import SUFFIXES, RawRow, raw_rows, to_rows
from trainer.data.rows import Row, RowErrors
from trainer.data.tables import own_values
from trainer.errors import ConfigError, DataError
from trainer.net import hub_answers

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")

DEFAULT_SPLIT = "train"

ROW_BYTES = 2_000
"""A guess at what a row has."""

PACKED, PACKED_SUFFIXES = 3, (".gz", ".parquet")
"""How much more text there is than bytes in such files, about."""


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

    def num_bytes(self, max_rows: int | None = None) -> int:
        """About how much text there is, unpacked; 0 where that is not known.

        Args:
            max_rows: no more rows than that are read.
        """
        most = sys.maxsize if max_rows is None else max_rows * ROW_BYTES
        if self.is_hub:
            return min(int(self._hub_dataset.data.nbytes), most)
        path = Path(self.name)
        try:
            size = path.stat().st_size
        except OSError:
            return 0
        return min(size * (PACKED if path.suffix.lower() in PACKED_SUFFIXES else 1), most)

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
    check_mix(section, [source.name for source in sources])
    if section.validation_path is not None:
        sources += find_sources(section.validation_path)
    for source in sources:
        if not source.is_hub and not Path(source.name).is_file():
            next(source.rows(), None)  # has the words


def read_rows(
    sources: list[Source],
    section: DataSection,
    errors: RowErrors,
    *,
    max_rows: int | None,
    with_columns: bool = False,
) -> Generator[Row, None, str]:
    """The rows of all sources in order; what is returned are the formats they are in.

    Raises:
        DataError: a source is missing, empty or damaged.
        ConfigError: `data.columns` names a key that the format does not have.
    """
    formats: list[str] = []
    first_index = 0
    for number, source in enumerate(sources):
        counted = _Counted(source.rows())
        name = yield from to_rows(
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
        if name not in formats:
            formats.append(name)
        _check_columns(section, name)
    return ", ".join(formats)


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
