"""What each source has of a run's rows: the numbers that rows carry, and the lines of the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.config.data_section import DataSection
from trainer.data.batches import PackedDataset
from trainer.data.dataset import RunData
from trainer.data.mixing import SourceShare, rows_per_epoch, short_names


def with_sources(section: DataSection, data: RunData) -> RunData:
    """The data whose rows carry the number of their source, where there are several.

    Before any packing.
    """
    train, validation = data.train, data.validation
    if len(data.source_names) > 1:
        is_mixed = bool(section.mix_probabilities)
        train = train.of_sources(data.train_sources, is_mixed=is_mixed)
    if validation is not None and len(data.validation_names) > 1:
        validation = validation.of_sources(data.validation_sources, is_mixed=False)
    return replace(data, train=train, validation=validation)


def with_shares(section: DataSection, data: RunData) -> RunData:
    """The data whose card says what each source has of an epoch; after any packing."""
    if len(data.source_names) < 2:
        return data
    shares = tuple(_shares(section, data))
    ends_with = section.mix_epoch if section.mix_probabilities else ""
    return replace(data, card=replace(data.card, sources=shares, mix_epoch=ends_with))


def _shares(section: DataSection, data: RunData) -> list[SourceShare]:
    train = data.train
    is_packed = isinstance(train, PackedDataset)
    lengths = np.asarray(getattr(train, "document_lengths" if is_packed else "lengths"))
    count = len(data.source_names)
    rows = np.bincount(data.train_sources, minlength=count)
    tokens = np.bincount(data.train_sources, weights=lengths, minlength=count).astype(np.int64)
    drawn = np.ones(count)  # how often a row comes in an epoch, in the mean
    if section.mix_probabilities and train.sources is not None and rows.all():
        units = np.bincount(train.sources, minlength=count)  # rows, or packs
        ends_with = section.mix_epoch
        wanted = rows_per_epoch(units.tolist(), section.mix_probabilities, ends_with=ends_with)
        drawn = np.asarray(wanted) / units
    return [
        SourceShare(
            name=name,
            source=source,
            num_rows=int(rows[number]),
            num_tokens=int(tokens[number]),
            num_epoch_rows=round(rows[number] * drawn[number]),
            num_epoch_tokens=round(tokens[number] * drawn[number]),
        )
        for number, (name, source) in enumerate(
            zip(names_of(data.source_names), data.source_names, strict=True)
        )
    ]


def names_of(sources: Sequence[str]) -> tuple[str, ...]:
    """The sources as metrics name them; none where there is only one, which needs no name."""
    return short_names(sources) if len(sources) > 1 else ()
