"""`data.dataset_path` -> the rows of its files and hub datasets, in order."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.data.data_files import SUFFIXES, DataFile
from trainer.data.find_files import Found, find_files
from trainer.data.layouts import FORMATS
from trainer.data.mixing import check_mix
from trainer.data.read_progress import ReadProgress
from trainer.data.remote_files import scheme_of
from trainer.data.row_files import RawRow, raw_rows, to_rows
from trainer.data.rows import Row, RowErrors
from trainer.data.tables import own_values
from trainer.errors import ConfigError, DataError
from trainer.net import hub_answers, name_without_secrets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")

DEFAULT_SPLIT = "train"

ROW_BYTES = 2_000
"""A guess at what a row has."""

HASHED_AT_ONCE = 16
"""Files of a store that are asked for their version at once."""


@dataclass(frozen=True)
class Source:
    """One name of `data.dataset_path`: a file, the files of a folder or pattern, a hub dataset."""

    name: str
    """As it may be shown: without secrets."""
    weight: float = 1.0
    offline: bool = False
    is_streamed: bool = False
    """Of a hub dataset: its rows are fetched while they are read."""
    address: str = field(default="", repr=False)
    """With them, where they differ."""

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

    @cached_property
    def found(self) -> Found:
        """Its files, looked for once: all that is asked of them is of the same ones.

        Raises:
            ConfigError: the address was written down without its secret.
            DataError: there are none.
        """
        if self.is_hub:
            return Found(())
        return find_files(self.address or self.name, offline=self.offline)

    def check(self) -> None:
        """See that its files are there.

        Raises:
            ConfigError, DataError: they are not.
        """
        for file in self.found.files:
            file.check()

    def rows(self) -> Iterator[RawRow]:
        """The raw rows in order."""
        if self.is_hub:
            yield from self.hub_rows()
        for file in self.found.files:
            yield from raw_rows(file)

    def num_bytes(self, max_rows: int | None = None) -> int:
        """About how much text there is, unpacked; 0 where that is not known.

        Args:
            max_rows: no more rows than that are read.
        """
        most = sys.maxsize if max_rows is None else max_rows * ROW_BYTES
        if self.is_hub and self.is_streamed:
            return most
        if self.is_hub:
            return min(int(self._hub_dataset.data.nbytes), most)
        return min(sum(file.num_text_bytes() for file in self.found.files), most)

    def size(self) -> int | None:
        """Bytes of its files as they are stored; None where that is not known."""
        try:
            sizes = [file.size() for file in self.found.files]
        except OSError:
            return None
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None

    def content_hash(self) -> str:
        """sha256 of the file, or of the names and hashes of several; what a store says of the
        version of a remote file; or the hub dataset's own fingerprint.

        Raises:
            DataError: it is not there.
        """
        if self.is_hub:
            return f"hub:{self._hub_dataset._fingerprint}"
        files = self.found.files
        if len(files) == 1:
            return _hash_of(files[0])
        with ThreadPoolExecutor(HASHED_AT_ONCE, thread_name_prefix="hash") as threads:
            parts = list(threads.map(_hash_of, files))
        lines = "\n".join(f"{file}\0{part}" for file, part in zip(files, parts, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def hub_rows(self) -> Iterator[RawRow]:
        """The rows of a hub dataset."""
        features = self._hub_dataset.features  # of a stream they need not be known
        schema = None if features is None else features.arrow_schema
        for index, row in enumerate(self._hub_dataset):
            yield f"{self.name}[{index}]", row if schema is None else own_values(row, schema)

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
                streaming=self.is_streamed,
                download_config=datasets.DownloadConfig(local_files_only=offline),
            )
        except Exception as error:  # what the hub, the network and the format raise
            why = "offline, and not in the cache" if offline else " ".join(str(error).split())
            raise DataError(
                f"{self.name}: no such file, and as a hub dataset it cannot be loaded ({why}). "
                "Give a file, or an id owner/name:split that can be reached or was loaded before."
            ) from error


def _hash_of(file: DataFile) -> str:
    try:
        return file.content_hash()
    except OSError as error:
        file.check()  # has better words for what is not there
        why = error.strerror or error
        raise DataError(f"{file}: cannot be read ({why}).") from error


def find_sources(
    text: str,
    weights: Sequence[float] = (),
    *,
    offline: bool = False,
    is_streamed: bool = False,
) -> list[Source]:
    """Cut `data.dataset_path` or `data.validation_path` into sources.

    Args:
        text: one name, or several with commas between; a comma in the name of a file that is
            there does not cut it.
        weights: one for each name, or none.
        offline: never ask the hub, nor any other machine.
        is_streamed: rows of hub datasets are fetched while they are read.
    Raises:
        ConfigError: another number of weights than of names, or a name given twice.
    """
    is_one = not scheme_of(text) and Path(text).exists()
    addresses = [text] if is_one else [part.strip() for part in text.split(",")]
    addresses = [os.path.expanduser(name) for name in addresses if name] or [text]
    names = [name_without_secrets(name) for name in addresses]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"data: {twice[0]!r} is named twice; name it once (data.weights repeats rows)."
        )
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"data.weights has {counted(len(weights), 'number')}, data.dataset_path has "
            f"{counted(len(names), 'name')} (a folder or a pattern is one); give one for each, or "
            "none."
        )
    return [
        Source(name, weight, offline, is_streamed, "" if address == name else address)
        for name, address, weight in zip(
            names, addresses, weights or [1.0] * len(names), strict=True
        )
    ]


def check_files(section: DataSection, offline: bool = False, *, is_resumed: bool = False) -> None:
    """Look for the data files before anything slow is done.

    Args:
        section: names them.
        offline: never ask another machine.
        is_resumed: a run goes on with what it began with, files that two names hold included.
    Raises:
        ConfigError: as `find_sources` does, or two names hold one file.
        DataError: a file is not there, or a folder or pattern has none.
    """
    sources = find_sources(section.dataset_path, section.weights, offline=offline)
    check_mix(section, [source.name for source in sources])
    held_out: list[Source] = []
    if section.validation_path is not None:
        held_out = find_sources(section.validation_path, offline=offline)
    for source in [*sources, *held_out]:
        source.check()
    if not is_resumed:
        _refuse_files_twice(sources, held_out)


def _refuse_files_twice(sources: Sequence[Source], held_out: Sequence[Source]) -> None:
    """One file in two folders or patterns: its rows would count twice, or be trained and measured.

    The same name on both sides is meant: the card counts its rows as leaks.

    Raises:
        ConfigError: names the file and both.
    """
    seen: dict[str, Source] = {}
    for source in [*sources, *held_out]:
        for file in source.found.files:
            key = str(file.local_path.resolve()) if file.local_path else str(file)
            first = seen.setdefault(key, source)
            is_trained = any(first is one for one in sources)
            is_held_out = any(source is one for one in held_out)
            if first is source or (is_trained and is_held_out and first.name == source.name):
                continue
            if is_trained and is_held_out:
                raise ConfigError(
                    f"data.validation_path: {file} is among the files of data.dataset_path too "
                    f"({first.name}), so it would be trained on; move it elsewhere, or name the "
                    "training files by a pattern without it."
                )
            raise ConfigError(
                f"data: {file} is in {first.name!r} and in {source.name!r}; name it once "
                "(data.weights repeats rows)."
            )


def read_rows(
    sources: list[Source],
    section: DataSection,
    errors: RowErrors,
    *,
    max_rows: int | None,
    with_columns: bool = False,
    progress: ReadProgress | None = None,
) -> Generator[Row, None, str]:
    """The rows of all sources in order; what is returned are the formats they are in.

    Args:
        sources: to be read.
        section: format and columns.
        errors: receives the bad rows.
        max_rows: read no more of each source.
        with_columns: keep all that a file says of its rows.
        progress: told of each row.
    Raises:
        DataError: a source is missing, empty or damaged.
        ConfigError: `data.columns` names a key that the format does not have.
    """
    formats: list[str] = []
    first_index = 0
    for number, source in enumerate(sources):
        files: tuple[DataFile | None, ...] = source.found.files or (None,)  # None: of the hub
        num_read = 0
        for place, file in enumerate(files):
            left = None if max_rows is None else max_rows - num_read
            if left == 0:
                break
            counted = _Counted(raw_rows(file) if file else source.hub_rows(), progress)
            if progress is not None:
                progress.begin(file or source.name, f"{place + 1} of {len(files)}")
            name = yield from to_rows(
                counted,
                str(file or source.name),
                section.format,
                errors,
                left,
                columns=section.columns,
                first_index=first_index,
                source=number,
                with_columns=with_columns,
                may_be_empty=len(files) > 1,
            )
            first_index += counted.count
            num_read += counted.count
            if name and name not in formats:
                formats.append(name)
            _check_columns(section, name)
        if not num_read:
            raise DataError(f"{source.name}: none of its {len(files):,} files has a row.")
    return ", ".join(formats)


class _Counted:
    """An iterator that knows how many rows it gave."""

    def __init__(self, rows: Iterator[RawRow], progress: ReadProgress | None) -> None:
        self.rows, self.count, self.progress = rows, 0, progress

    def __iter__(self) -> Iterator[RawRow]:
        for row in self.rows:
            self.count += 1
            yield row
            if self.progress is not None:
                self.progress.add_row()


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
