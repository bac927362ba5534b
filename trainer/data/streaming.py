"""`prepare_stream`: rows that are trained while they are read (`data.streaming`).

What comes first is read and encoded before the first step: the shuffle buffer, the held-out rows
and the prompts. All figures of the card are of these rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.data_section import DataSection
from trainer.data.batches import EncodedDataset
from trainer.data.cache import cache_folder
from trainer.data.card import DataCard, draw_card
from trainer.data.dataset import RunData, check_fit, dataset_arrays, kept_arrays
from trainer.data.encode import RowEncoder
from trainer.data.encoded import EncodedRows, RowReader, RowStore
from trainer.data.preparer import Preparer
from trainer.data.read_progress import ReadProgress
from trainer.data.reading import Reading
from trainer.data.rendered import check_markers_used
from trainer.data.ring import Ring
from trainer.data.rows import MARKED_ROLE, RowErrors
from trainer.data.sides import Sides, choose_prompts, trained_too
from trainer.data.sources import Source, find_sources, read_rows
from trainer.data.spool import Spool
from trainer.data.stream_reader import Mark, StreamReader
from trainer.data.stream_rows import StreamedDataset, StreamedTexts, fingerprint_of
from trainer.errors import DataError, ResumeError
from trainer.profiles import DataProfile, get_profile

Array = np.ndarray[Any, Any]

DEFAULT_BUFFER = 10_000

MIN_HELD_OUT = 64
"""Held-out rows that are looked for before the first step, at least: those of an evaluation."""

PATIENCE = 4
"""So many times the rows are read in which these should be found."""

NUM_SAMPLES = 100

NUM_FORMAT_ROWS = 20
"""Of a source, in which its format shows."""


def prepare_stream(
    section: DataSection,
    *,
    encoder: RowEncoder,
    profile: DataProfile | None = None,
    system_prompt: str | None = None,
    is_prompt_configured: bool = False,
    seed: int = 42,
    num_preview: int = 0,
    num_final: int = 0,
    num_score: int = 0,
    with_columns: bool = False,
    offline: bool = False,
    resume: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> RunData:
    """Read what training begins with, and be ready to read the rest; as `prepare_data` otherwise.

    Args:
        resume: what `StreamOrder.state` said at the checkpoint; None: begin with the first row.
        progress: told in words how many rows are read, where that takes longer than two seconds.
    Raises:
        DataError: a file that is missing, bad rows under `strict`, nothing to train, or no room.
        ConfigError: an option that would have no effect on these rows.
        ResumeError: the rows are not those of the checkpoint.
    """
    sources = find_sources(section.dataset_path, offline=offline, is_streamed=True)
    preparer = Preparer(profile or get_profile("plain"), encoder, system_prompt, seed)
    reader = StreamReader(section, sources, preparer, with_columns=with_columns)
    folder = cache_folder(section.cache_dir) if section.cache else Path(tempfile.gettempdir())
    limit = section.cache_max_gib
    rows = StreamedDataset(
        reader.pieces(Mark()),
        Ring(folder, None if limit is None else int(limit * 2**30)),
        encoder,
        buffer_size=section.shuffle_buffer or DEFAULT_BUFFER,
    )
    try:
        wanted = max(num_preview + num_score + num_final, MIN_HELD_OUT)
        start = _Start(section, reader, rows, RowStore(Spool(folder), with_columns=with_columns))
        start.read(wanted, None if progress is None else ReadProgress(progress))
        start.check(is_prompt_configured=is_prompt_configured)
        data = start.run_data(
            preparer,
            with_columns=with_columns,
            validation_sources=find_sources(section.validation_path, offline=offline)
            if section.validation_path is not None
            else [],
            counts=(num_preview, num_score, num_final),
        )
        if resume is not None:
            _go_on(reader, rows, resume)
    except BaseException:
        rows.close()
        raise
    return data


def _go_on(reader: StreamReader, rows: StreamedDataset, state: Mapping[str, Any]) -> None:
    """Read on where a checkpoint stood.

    Raises:
        ResumeError: a file has another size than it had, or other rows up to there.
    """
    before = state["sizes"]
    for source, was, now in zip(reader.sources, before, rows.sizes, strict=len(before) > 0):
        if was != now and None not in (was, now):
            raise ResumeError(
                f"--resume: {source.name} has {now:,} bytes, and at the checkpoint it had {was:,}. "
                "Restore the data file, or start a new run in another --output."
            )
    mark = Mark(**state["mark"])
    rows.begin_at(reader.pieces(mark), mark, int(state["step"]))


class _Start:
    """What is read before the first step, and what is known from it."""

    def __init__(
        self, section: DataSection, reader: StreamReader, rows: StreamedDataset, store: RowStore
    ) -> None:
        """Nothing is read yet.

        Args:
            section: format, split and policy.
            reader: of the rows.
            rows: receives those that are trained.
            store: receives all of them.
        """
        self.section, self.reader, self.rows, self.store = section, reader, rows, store
        self.mark = Mark()
        """Up to where it was read."""
        self._is_held_out: list[Array] = []
        self._num_sources = 0

    @property
    def is_whole(self) -> bool:
        """The pass ended: these are all rows there are."""
        return self.mark.rows_per_pass is not None

    def read(self, wanted: int, progress: ReadProgress | None = None) -> None:
        """Fill the buffer, and read on until enough rows are held out, as far as that makes sense.

        Args:
            wanted: rows to be held out.
            progress: told of each row.
        """
        if progress is not None:
            progress.begin("", "")
        share = 0.0 if self.section.validation_path is not None else self.section.validation_split
        buffer = self.rows.buffer_size
        most = max(buffer, PATIENCE * wanted / share) if share else buffer
        while not self.is_whole:
            is_full = self.mark.number >= buffer
            if is_full and (not share or self.mark.num_held_out >= wanted):
                break
            if is_full and self.mark.number >= most:
                break
            piece = self.rows.read_piece()
            tally = self.store.tally
            for row in piece.rows:
                tally.add_read(row)
                if progress is not None:
                    progress.add_row()
                tally.num_marked += row.messages[0]["role"] == MARKED_ROLE
                self._num_sources = max(self._num_sources, row.source + 1)
            self.store.add(piece.piece, piece.rows, is_training=True)
            self._is_held_out.append(piece.is_held_out)
            self.mark = piece.after
        if not self.mark.number:
            raise self.reader.nothing_to_train()

    def check(self, *, is_prompt_configured: bool) -> None:
        """Refuse options that these rows ignore; what later rows may have is not known.

        Raises:
            ConfigError: names the option.
        """
        tally = self.store.tally
        profile = self.reader.preparer.profile
        check_fit(
            self.section,
            tally,
            profile,
            is_prompt_configured=is_prompt_configured and self.is_whole,
        )
        if self.is_whole:
            check_markers_used(tally.num_marked, self.section.text_markers)

    def run_data(
        self,
        preparer: Preparer,
        *,
        with_columns: bool,
        validation_sources: list[Source],
        counts: tuple[int, int, int],
    ) -> RunData:
        """The run's data, with all that is known before training.

        Args:
            preparer: with the run's own tokenizer.
            with_columns: prompts keep all that the file says of their row.
            validation_sources: of `data.validation_path`.
            counts: prompts of previews, for scores, and of the final evaluation.
        """
        errors = RowErrors("skip")
        errors.add_all([self.reader.errors])
        self._read_validation(preparer, validation_sources, with_columns, errors)
        rows = self.store.finish()
        sides = self._sides(rows)
        encoder, seen = preparer.encoder, RowReader(rows)
        card = draw_card(
            self.section,
            rows,
            sides,
            seen,
            self.store.tally,
            formats=self._formats(),
            encoder=encoder,
            profile=preparer.profile,
            profile_report=self.reader.preparer.report(),
            system_prompt=preparer.system_prompt,
            rejected=errors,
            dropped=self.reader.dropped,
            left_out=[name for source in self.reader.sources for name in source.found.left_out],
        )
        asked = choose_prompts(rows, sides, seen, counts, encoder.sayer)
        card = replace(card, num_final_asked=asked.num_final_asked)
        self._note_rows(rows, sides)
        return RunData(
            preview_prompts=asked.previews,
            final_prompts=asked.final,
            score_prompts=asked.scores,
            card=self._as_streamed(card),
            system_prompt=preparer.system_prompt,
            file_hashes={source.name: source.content_hash() for source in validation_sources},
            source_names=tuple(source.name for source in self.reader.sources),
            train=self.rows,
            validation=_dataset(rows, sides.validation) if len(sides.validation) else None,
            train_texts=StreamedTexts(self.rows),
            train_sources=rows.source[sides.train],
            validation_names=tuple(one.name for one in validation_sources or self.reader.sources),
            validation_sources=rows.source[sides.validation],
            encoder=encoder,
        )

    def _read_validation(
        self,
        preparer: Preparer,
        sources: list[Source],
        with_columns: bool,
        errors: RowErrors,
    ) -> None:
        """All rows of `data.validation_path`."""
        if not sources:
            return
        reading = Reading(self.section, preparer, with_columns=with_columns)
        reading.store = self.store
        reading.read([], sources)
        found = reading.errors()
        found.raise_if_strict()
        errors.add_all([found])

    def _sides(self, rows: EncodedRows) -> Sides:
        held = np.concatenate(self._is_held_out)
        train, validation = np.flatnonzero(~held), np.flatnonzero(held)
        section = self.section
        share = f"{section.validation_split:.1%}"
        how = (
            f"about {share}, by a hash of the prompt and the seed; the {len(validation):,} read "
            "before the first step are measured, later ones are left out of training too"
        )
        if section.validation_path is not None:
            validation = np.arange(rows.num_of_training, len(rows))
            how = f"all rows of {section.validation_path}"
            if not len(validation):
                raise DataError(f"{section.validation_path}: no usable row to validate on.")
        elif not section.validation_split:
            how = "none (data.validation_split=0); previews use training prompts"
        elif len(validation) < 2:
            how = (
                f"none: of the first {len(held):,} rows fewer than two are held out by the hash of "
                f"their prompt (about {share}); previews use training prompts (set "
                "data.validation_path, or raise data.validation_split)"
            )
            validation = validation[:0]
        return Sides(train, validation, how, "", trained_too(rows, validation, train))

    def _note_rows(self, rows: EncodedRows, sides: Sides) -> None:
        """What the streamed rows know of those that were read first."""
        stream = self.rows
        stream.lengths = rows.lengths[sides.train].tolist()
        stream.has_weights = bool(rows.num_weights[sides.train].any())
        stream.samples = _dataset(rows, sides.train[:NUM_SAMPLES], with_weights=stream.has_weights)
        stream.sizes = self.reader.sizes()
        first = _dataset(rows, sides.train, with_weights=stream.has_weights)
        stream.start_fingerprint = fingerprint_of(first, len(sides.train), stream.buffer_size)

    def _formats(self) -> str:
        """The layouts of the sources that were begun."""
        if self.reader.formats:
            return self.reader.formats
        names: list[str] = []
        for source in self.reader.sources[: self._num_sources]:
            rows = read_rows([source], self.section, RowErrors("skip"), max_rows=NUM_FORMAT_ROWS)
            try:
                while True:
                    next(rows)
            except StopIteration as end:
                names.append(end.value)
            except DataError:  # bad rows first
                names.append(self.section.format)
        return ", ".join(dict.fromkeys(names))

    def _as_streamed(self, card: DataCard) -> DataCard:
        """The card with what cannot be known before the rows are read."""
        words = f"{self.mark.num_read:,} rows are read before the first step"
        if self.is_whole:
            words += ", which are all. "
        else:
            words += ", the others while training; all figures here are of these. "
        words += (
            f"Order: drawn within a buffer of {self.rows.buffer_size:,} rows. Not known: the exact "
            "share that is held out, rows that repeat earlier ones, prompts of validation rows "
            "that later rows train"
        )
        return replace(
            card,
            streaming=words,
            cache="none (data.streaming)",
            shared_prompts=(),
            num_shared_prompts=0,
        )


def _dataset(rows: EncodedRows, order: Array, *, with_weights: bool = False) -> EncodedDataset:
    """Some of the rows as a dataset, in memory or, where they are large, in nameless files."""
    arrays = dataset_arrays("rows", rows, order, with_weights=with_weights)
    kept = kept_arrays({name.removeprefix("rows_"): array for name, array in arrays.items()})
    return EncodedDataset.from_arrays(kept)
