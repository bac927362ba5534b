"""How the rows of several sources share an epoch: `data.mix_probabilities`, and what each has.

As with `datasets.interleave_datasets` an epoch ends with the first source that runs out, or with
the last one. There the source of each row is drawn by itself, so that an epoch's length changes
with the draw. Here every epoch has as many rows of each source as its share says, in an order that
is drawn: the length of a run is known before it begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.errors import ConfigError

MAX_NAME = 40
"""Characters of a source's name in metrics."""

SUFFIXES = (".gz", ".zst", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".arrow")
"""Endings of files that a short name leaves out."""


@dataclass(frozen=True)
class SourceShare:
    """What one source has in an epoch."""

    name: str
    """As metrics name it."""
    source: str
    """As `data.dataset_path` names it."""
    num_rows: int
    """Training rows; with data.weights as often as they are repeated."""
    num_tokens: int
    """Of these."""
    num_epoch_rows: int
    """Rows of an epoch; a pack counts as the rows that a pack has in the mean."""
    num_epoch_tokens: int
    """Their tokens: in the mean, where an epoch has another number of rows."""


def check_mix(section: DataSection, names: Sequence[str]) -> None:
    """Refuse probabilities that do not fit the sources of `data.dataset_path`.

    Raises:
        ConfigError: another number of probabilities than of sources, or a single source.
    """
    shares = section.mix_probabilities
    if shares and len(shares) != len(names):
        raise ConfigError(
            f"data.mix_probabilities has {len(shares)} numbers, data.dataset_path has "
            f"{counted(len(names), 'name')} (a folder or a pattern is one); give one for each, or "
            "none."
        )


def short_names(sources: Sequence[str]) -> tuple[str, ...]:
    """A name for each source that is short and no other one's: the end of its path or hub id."""
    parts = [_parts(source) for source in sources]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(one[-depth:])[-MAX_NAME:] for one in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{number}-{name}" for number, name in enumerate(names, start=1))


def _parts(source: str) -> list[str]:
    *folders, name = PurePath(source).parts or (source,)
    while name.lower().endswith(SUFFIXES) and PurePath(name).stem != name:
        name = PurePath(name).stem
    # Of a pattern what is written out, if there is any: `rows/a/*.jsonl` is `a`.
    plain = [re.sub(r"[*?\[\]]+", "", part) for part in (*folders, name)]
    parts = [part for part in plain if part.strip("-") and part not in ("/", ".", "..")] or [source]
    return [re.sub(r"[^\w.-]", "-", part) for part in parts]


def rows_per_epoch(
    sizes: Sequence[int], probabilities: Sequence[float], *, ends_with: str
) -> list[int]:
    """How many rows of each source an epoch has.

    Args:
        sizes: rows (or packs) of each source, at least one.
        probabilities: of the sources; their sum need not be exactly 1.
        ends_with: `first` or `longest`, as `data.mix_epoch`.
    Returns:
        With `first` at most the size, and for one source just that; with `longest` at least it.
    """
    shares = [share / sum(probabilities) for share in probabilities]
    lengths = [size / share for size, share in zip(sizes, shares, strict=True)]
    is_first = ends_with == "first"
    length, bound = (min(lengths), min) if is_first else (max(lengths), max)
    return [bound(round(length * share), size) for size, share in zip(sizes, shares, strict=True)]
