"""All rows of a run's files, read and encoded a batch at a time, and what was wrong with some."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.config.data_section import DataSection
from trainer.data.cache import cache_folder
from trainer.data.encode_processes import PIECE, PIECE_CHARS, Batch, encode_batches
from trainer.data.encoded import RowStore, Tally
from trainer.data.pieces import Problem
from trainer.data.preparer import Preparer
from trainer.data.read_progress import ReadProgress
from trainer.data.rendered import check_markers_used, read_back
from trainer.data.rows import MARKED_ROLE, Dropped, Row, RowErrors, RowTooLongError
from trainer.data.sources import Source, read_rows
from trainer.data.spool import Spool

READ, PARSED, REWRITTEN, ENCODED = 0, 2, 4, 5
"""What was being done when a row turned out to be wrong. Bad rows are told in this order, and so in
the same one however many processes encode."""


class Reading:
    """Reads every row once; what is left of it is in `store`."""

    def __init__(self, section: DataSection, preparer: Preparer, *, with_columns: bool) -> None:
        """Nothing is read yet.

        Args:
            section: format, policy, processes, and the folder for what does not fit into memory.
            preparer: what decides what becomes of a row.
            with_columns: keep all that a file says of its rows.
        """
        self.section, self.preparer, self.with_columns = section, preparer, with_columns
        folder = cache_folder(section.cache_dir) if section.cache else Path(tempfile.gettempdir())
        self.store = RowStore(Spool(folder), with_columns=with_columns)
        self.dropped = Dropped()
        self.formats = ""
        """The layouts that the training files have."""
        self._progress: ReadProgress | None = None
        self._errors: dict[int, RowErrors] = {}

    @property
    def tally(self) -> Tally:
        """What was counted while rows passed."""
        return self.store.tally

    def read(
        self,
        sources: list[Source],
        validation_sources: list[Source],
        progress: ReadProgress | None = None,
    ) -> None:
        """Read and encode the training files, then the validation files.

        Args:
            sources: of the training rows.
            validation_sources: of `data.validation_path`.
            progress: told of each row.

        Raises:
            DataError: a file is missing, empty or damaged, or there is no room on the disk.
            ConfigError: `data.text_markers` would have no effect on these rows.
        """
        num_bytes = sum(
            source.num_bytes(max_rows)
            for files, max_rows in ((sources, self.section.max_rows), (validation_sources, None))
            for source in files
        )
        self._progress = progress
        batches = self._batches(sources, validation_sources)
        for batch, piece in encode_batches(
            self.preparer, batches, self.section.encode_processes, num_bytes
        ):
            self._note_problems(batch, piece.problems)
            self.store.add(piece, batch.rows, is_training=batch.is_training)
        check_markers_used(self.tally.num_marked, self.section.text_markers)

    def errors(self) -> RowErrors:
        """What is wrong with rows."""
        found = RowErrors(self.section.on_bad_row, self.section.max_bad_rows)
        found.add_all(self._errors[stage] for stage in sorted(self._errors))
        return found

    def _errors_of(self, stage: int) -> RowErrors:
        return self._errors.setdefault(stage, RowErrors(self.section.on_bad_row))

    def _batches(self, sources: list[Source], validation_sources: list[Source]) -> Iterator[Batch]:
        for files, is_training in ((sources, True), (validation_sources, False)):
            rows: list[Row] = []
            num_chars = 0
            for row in self._rows(files, is_training=is_training):
                if is_training:
                    self.tally.add_read(row)
                self.tally.num_marked += row.messages[0]["role"] == MARKED_ROLE
                rows.append(row)
                num_chars += sum(len(turn["content"]) for turn in row.messages)
                if len(rows) == PIECE or num_chars >= PIECE_CHARS:
                    yield Batch(rows, is_training)
                    rows, num_chars = [], 0
            if rows:
                yield Batch(rows, is_training)

    def _rows(self, files: list[Source], *, is_training: bool) -> Iterator[Row]:
        """The rows of some files as conversations, or as plain text."""
        section = self.section

        def found() -> Iterator[Row]:
            formats = yield from read_rows(
                files,
                section,
                self._errors_of(READ + (not is_training)),
                max_rows=section.max_rows if is_training else None,
                with_columns=self.with_columns,
                progress=self._progress,
            )
            self.formats = self.formats or formats

        errors = self._errors_of(PARSED + (not is_training))
        return read_back(found(), self.preparer.encoder, errors, section.text_markers)

    def _note_problems(self, batch: Batch, problems: list[Problem]) -> None:
        for problem in problems:
            row, error = batch.rows[problem.place], problem.error
            if isinstance(error, RowTooLongError):
                self.dropped.num_rows += 1
                self.dropped.num_tokens += error.num_tokens
                continue
            stage = REWRITTEN if problem.is_profiles else ENCODED
            errors = self._errors_of(stage + 2 * (not batch.is_training))
            errors.add(row.where, str(error), error.reason)
