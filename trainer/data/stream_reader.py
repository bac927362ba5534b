"""The rows of a run's files again and again, encoded a piece at a time, from any place on.

What is trained and what is held out is decided row by row: nothing waits for the end of a file.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from trainer.config.data_section import DataSection
from trainer.data.encode_processes import PIECE, Batch, encode_batches
from trainer.data.pieces import Piece
from trainer.data.preparer import Preparer
from trainer.data.rendered import read_back
from trainer.data.rows import Dropped, Row, RowErrors, RowTooLongError, is_text, is_tokens
from trainer.data.sides import is_in, largest_unit
from trainer.data.sources import Source, read_rows
from trainer.errors import ConfigError, DataError, ResumeError
from trainer.net import names_without_secrets
from trainer.profiles import DataProfile

Array = np.ndarray[Any, Any]


LOOK = 2_048
"""Rows that show which prompts many rows share."""


@dataclass(frozen=True)
class Mark:
    """A place between two rows of the stream, and what was counted up to it."""

    epoch: int = 0
    """Passes that are complete."""
    row: int = 0
    """Rows of the current pass before it, those that could not be read left out."""
    number: int = 0
    """Training rows of all passes before it: the number of the next one."""
    digest: str = ""
    """Hash of the rows of the current pass before it."""
    rows_per_pass: int | None = None
    """Training rows of a pass; None before the first one is complete."""
    pass_digest: str = ""
    """Hash of the rows of a pass, once that is known."""
    num_read: int = 0
    """Rows, bad ones included; this and what follows are of the first pass."""
    num_held_out: int = 0
    num_dropped: int = 0
    """Rows that data.truncation=drop left out."""
    num_dropped_tokens: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Reason -> bad rows."""
    errors: Sequence[str] = ()
    """The first of these, with their places."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "rejected": dict(self.rejected), "errors": list(self.errors)}

    def words(self) -> str:
        """What was read up to here."""
        trained = self.number if self.rows_per_pass is None else self.rows_per_pass
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())
        counts = (
            f"{trained:,} to train, {self.num_held_out:,} held out, rejected: {rejected or 'none'}"
        )
        if self.num_dropped:
            counts += f", {self.num_dropped:,} dropped (longer than max_length)"
        if not self.epoch:
            return (
                f"the last step was within the first {self.num_read:,} rows, of a pass that is not "
                f"over: {counts}"
            )
        passes = "a pass" if self.epoch == 1 else f"{self.epoch} passes"
        return f"{passes} over {self.num_read:,} rows read, and some of the next: {counts}"


@dataclass(frozen=True)
class StreamPiece:
    """Some rows in the order of the files, encoded, and the places before and after them."""

    before: Mark
    after: Mark
    rows: list[Row]
    piece: Piece
    is_held_out: Array
    """Of each example."""
    is_last: bool
    """The pass ends here."""


@dataclass(frozen=True)
class _Chunk(Batch):
    """Rows that are encoded at once, and what is known of them before."""

    errors: RowErrors = field(default_factory=lambda: RowErrors("skip"))
    num_rows: int = 0
    """Of the pass, up to its end."""
    digest: str = ""
    """Of the pass, up to its end."""
    is_last: bool = False


class _Errors(RowErrors):
    """Hands bad rows to the chunk that is being filled."""

    now: RowErrors = RowErrors("skip")

    def add(self, where: str, message: str, reason: str) -> None:
        """Note one bad row."""
        self.now.add(where, message, reason)


class StreamReader:
    """Reads the sources; every pass has the same rows in the same order."""

    def __init__(
        self,
        section: DataSection,
        sources: list[Source],
        preparer: Preparer,
        *,
        with_columns: bool = False,
    ) -> None:
        """Read nothing yet.

        Args:
            section: format, split and policy.
            sources: of the training rows.
            preparer: what decides what becomes of a row. Its tokenizer is copied: rows are encoded
                by a thread, while the run uses its own.
            with_columns: keep all that a file says of its rows.
        """
        self.section, self.sources, self.with_columns = section, sources, with_columns
        self.preparer = copy.copy(preparer)
        self.preparer.encoder = pickle.loads(pickle.dumps(preparer.encoder))
        self.errors = RowErrors(section.on_bad_row, section.max_bad_rows)
        """Of the first pass, up to the piece that was given last."""
        self.dropped = Dropped()
        self.formats = ""
        self._frequent: Array | None = None
        """Hashes of prompts that too many of the first rows share; None before these are read."""

    def sizes(self) -> list[int | None]:
        """Bytes of each source, None where nobody knows: of a file that grew another one."""
        return [source.size() for source in self.sources]

    def pieces(self, start: Mark) -> Iterator[StreamPiece]:
        """Encode the rows from a place on, pass after pass, without an end.

        Raises:
            DataError: bad rows under `strict` or too many of them, a file that is missing, damaged
                or changed since the pass before, or no row to train.
            ResumeError: the rows before `start` are others than they were.
        """
        mark, first = start, start.number
        self.errors = RowErrors(self.section.on_bad_row, self.section.max_bad_rows)
        for reason, count in start.rejected.items():
            self.errors.add_known(reason, count)
        self.errors.errors = list(start.errors)
        self.dropped = Dropped(start.num_dropped, start.num_dropped_tokens)
        num_bytes = sum(source.num_bytes(self.section.max_rows) for source in self.sources)
        batches = self._chunks(start)
        configured = self.section.encode_processes
        encoded = encode_batches(self.preparer, batches, configured, num_bytes)
        for chunk, piece in self._looked_at(encoded):
            self._check_text(chunk)
            found = self._piece(mark, chunk, piece)
            if found.is_last and found.after.number == first:
                raise self.nothing_to_train()
            if found.is_last:
                first = found.after.number
            yield found
            mark = found.after

    def _looked_at(self, encoded: Iterator[tuple[Batch, Piece]]) -> Iterator[tuple[_Chunk, Piece]]:
        """The same, once the first rows have shown which prompts are too frequent to be held out
        together: a run that goes on from elsewhere knows them from its start."""
        looked: list[tuple[Batch, Piece]] = []
        if self._frequent is None:
            num_rows = 0
            for chunk, piece in encoded:
                looked.append((chunk, piece))
                num_rows += len(piece.groups)
                if num_rows >= LOOK or (isinstance(chunk, _Chunk) and chunk.is_last):
                    break
            groups = np.concatenate([piece.groups for _, piece in looked])
            different, sizes = np.unique(groups, return_counts=True)
            self._frequent = different[sizes > largest_unit(self.section, num_rows)]
        for chunk, piece in itertools.chain(looked, encoded):
            assert isinstance(chunk, _Chunk), "as it was given"
            yield chunk, piece

    def _piece(self, before: Mark, chunk: _Chunk, piece: Piece) -> StreamPiece:
        if before.epoch == 0:
            self.errors.add_all([chunk.errors])
            self._note_problems(chunk, piece)
            self.errors.raise_if_strict()
        is_held_out = self._is_held_out(piece)
        number = before.number + len(piece.lengths) - int(is_held_out.sum())
        after = replace(before, row=chunk.num_rows, number=number, digest=chunk.digest)
        if before.epoch == 0:
            after = replace(
                after,
                num_read=before.num_read + len(chunk.rows) + chunk.errors.count,
                num_held_out=before.num_held_out + int(is_held_out.sum()),
                num_dropped=self.dropped.num_rows,
                num_dropped_tokens=self.dropped.num_tokens,
                rejected=self.errors.reasons,
                errors=self.errors.errors,
            )
        if chunk.is_last:
            after = self._after_pass(after)
        return StreamPiece(before, after, chunk.rows, piece, is_held_out, chunk.is_last)

    def _after_pass(self, end: Mark) -> Mark:
        """The beginning of the next pass.

        Raises:
            DataError: this pass had other rows than the first one.
        """
        if end.epoch and end.digest != end.pass_digest:
            names = ", ".join(source.name for source in self.sources)
            raise DataError(
                f"{names}: pass {end.epoch + 1} over the rows read others than the first one: a "
                "file changed while the run streamed it. Resume from an earlier checkpoint with "
                "the file as it was, or start a new run."
            )
        per_pass = end.rows_per_pass if end.rows_per_pass is not None else end.number
        return replace(
            end,
            epoch=end.epoch + 1,
            row=0,
            digest="",
            rows_per_pass=per_pass,
            pass_digest=end.digest,
        )

    def _is_held_out(self, piece: Piece) -> Array:
        """By the hash of the prompt alone: rows of one prompt go to one side, wherever they are.

        Those of the most frequent prompts go by the hash of their content.
        """
        section = self.section
        if section.validation_path is not None or not section.validation_split:
            return np.zeros(len(piece.lengths), bool)
        limit = np.uint64(int(section.validation_split * 2**64))
        assert self._frequent is not None, "found out at the start"
        units = np.where(is_in(piece.groups, self._frequent), piece.keys, piece.groups)
        is_held: Array = units.astype(np.uint64) < limit
        return is_held

    def _note_problems(self, chunk: _Chunk, piece: Piece) -> None:
        for problem in piece.problems:
            row, error = chunk.rows[problem.place], problem.error
            if isinstance(error, RowTooLongError):
                self.dropped.num_rows += 1
                self.dropped.num_tokens += error.num_tokens
            else:
                self.errors.add(row.where, str(error), error.reason)

    def _check_text(self, chunk: _Chunk) -> None:
        """Refuse a profile that plain text would ignore, wherever the first such row stands."""
        profile = self.preparer.profile
        if type(profile).transform is DataProfile.transform:
            return
        for row in chunk.rows:
            if is_text(row.messages) or is_tokens(row.messages):
                what = "plain text" if is_text(row.messages) else "tokens"
                raise ConfigError(
                    f"profile.name={profile.name!r} rewrites turns, and {row.where} is {what}, "
                    "which has none; use the profile plain, or another data.format."
                )

    def nothing_to_train(self) -> DataError:
        """That no row is left, and what became of all."""
        return DataError(
            f"{names_without_secrets(self.section.dataset_path)}: nothing to train: "
            f"{self.errors.count} rows were rejected ({'; '.join(self.errors.errors[:3])}), "
            f"{self.dropped.num_rows} are longer "
            f"than hyperparams.max_length={self.preparer.encoder.max_length} and dropped, and the "
            f"prompts of the others are held out (data.validation_split="
            f"{self.section.validation_split})."
        )

    # ---- rows in chunks

    def _chunks(self, start: Mark) -> Iterator[_Chunk]:
        yield from self._pass(skip=start.row, digest=start.digest)
        while True:
            yield from self._pass()

    def _pass(self, *, skip: int = 0, digest: str = "") -> Iterator[_Chunk]:
        """The rows of all sources in chunks, the last of which may be empty.

        Args:
            skip: rows that were read before a resume: they are not encoded again.
            digest: what their hash must be.
        """
        seen, errors = xxhash.xxh3_128(), _Errors("skip")
        errors.now = RowErrors("skip")
        rows: list[Row] = []
        count = 0
        for row in read_back(
            self._rows(errors), self.preparer.encoder, errors, self.section.text_markers
        ):
            if count == skip:
                self._check_skipped(seen.hexdigest(), digest, skip)
            seen.update(json.dumps(row.messages, ensure_ascii=False).encode(errors="replace"))
            count += 1
            if count <= skip:
                if count == skip:
                    errors.now = RowErrors("skip")  # counted before the resume
                continue
            rows.append(row)
            if len(rows) == PIECE:
                yield _Chunk(rows, True, errors.now, count, seen.hexdigest())
                rows, errors.now = [], RowErrors("skip")
        if count <= skip:
            self._check_skipped(seen.hexdigest() if count == skip else "", digest, skip)
        yield _Chunk(rows, True, errors.now, count, seen.hexdigest(), is_last=True)

    def _check_skipped(self, found: str, expected: str, num_rows: int) -> None:
        if num_rows and found != expected:
            raise ResumeError(
                "--resume: the training rows are not those of the checkpoint (the first "
                f"{num_rows:,} rows of {names_without_secrets(self.section.dataset_path)}, which "
                "it had read, are others now). Restore the data file, or start a new run in "
                "another --output."
            )

    def _rows(self, errors: RowErrors) -> Generator[Row, None, None]:
        formats = yield from read_rows(
            self.sources,
            self.section,
            errors,
            max_rows=self.section.max_rows,
            with_columns=self.with_columns,
        )
        self.formats = formats
