"""TrainingStatusReader: what a run folder or a status.json says, safe while it is being written."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from trainer.errors import OutputError
from trainer.files import STATUS_NAME, read_whole_lines
from trainer.monitoring.status_schema import SCHEMA_VERSION, TrainingStatus
from trainer.preview.base import PreviewResult

CHUNK = 8 << 20
"""Bytes read at a time."""

MAX_LINE = 16 << 20
"""A line that is longer is left out and counted: no run writes one."""

MARK = 64
"""Bytes before the place where reading stopped that must still be there at the next poll."""


@dataclass(frozen=True)
class NewLines:
    """What one poll found."""

    lines: list[bytes]
    """Whole lines without line feeds, in order."""
    is_reset: bool = False
    """The file is another one than before (replaced, shortened, gone): forget earlier lines."""
    num_too_long: int = 0
    """Lines above MAX_LINE, left out."""


class LineTail:
    """Remembers how far a file was read. A half-written last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        """Take the file; it may not exist yet."""
        self.path = path
        self._offset = 0
        self._mark = b""
        self._inode: int | None = None
        self._is_skipping = False

    def poll(self) -> NewLines:
        """Read what was added since the last call.

        Raises:
            OSError: the file is there and cannot be read, or is no regular file.
        """
        try:
            # O_NONBLOCK: opening a named pipe that somebody put there must not hang.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            was_read = self._offset > 0 or self._is_skipping
            self._restart(None)
            return NewLines([], is_reset=was_read)
        with os.fdopen(descriptor, "rb", buffering=0):
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{self.path} is not a regular file")
            is_reset = self._is_other(descriptor, found)
            if is_reset:
                self._restart(found.st_ino)
            self._inode = found.st_ino
            lines, num_too_long = self._read(descriptor)
        return NewLines(lines, is_reset=is_reset, num_too_long=num_too_long)

    def _restart(self, inode: int | None) -> None:
        self._offset, self._mark, self._inode, self._is_skipping = 0, b"", inode, False

    def _is_other(self, descriptor: int, found: os.stat_result) -> bool:
        if self._inode is None:
            return False
        if found.st_ino != self._inode or found.st_size < self._offset:
            return True
        start = self._offset - len(self._mark)
        return os.pread(descriptor, len(self._mark), start) != self._mark

    def _read(self, descriptor: int) -> tuple[list[bytes], int]:
        lines: list[bytes] = []
        rest, num_too_long = b"", 0
        position = self._offset
        while chunk := os.pread(descriptor, CHUNK, position):
            position += len(chunk)
            data = rest + chunk
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                found = data[: end - 1].split(b"\n")
                if self._is_skipping:  # the end of a line whose beginning was thrown away
                    self._is_skipping = False
                    del found[0]
                lines += found
            if len(rest) > MAX_LINE:
                num_too_long += not self._is_skipping
                self._is_skipping, rest = True, b""
        self._offset = position - len(rest)
        self._mark = os.pread(descriptor, min(MARK, self._offset), max(0, self._offset - MARK))
        return lines, num_too_long


# ---- TrainingStatusReader: what a run folder or a status.json says, safe while it is being written


logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"

PREVIEWS_NAME = "previews.jsonl"

EVALUATIONS_NAME = "evaluations.jsonl"
"""Answers of the prompts of `monitoring.num_score_prompts`."""

MAX_STEP = 2**53

RESUMED = "resumed"
"""`type` of the line after which an earlier process's steps above its `step` no longer count."""


def parse_lines(lines: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Objects with a whole-number step, and how many lines were none."""
    if all(line[:1] == b"{" and line[-1:] == b"}" for line in lines):
        try:  # one call for all of them: twice as fast as one each
            rows = orjson.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            rows = []
        if len(rows) == len(lines) and all(map(_has_step, rows)):
            return rows, 0
    kept, num_bad = [], 0
    for line in lines:
        try:
            values = orjson.loads(line)
        except ValueError:
            values = None
        if _has_step(values):
            kept.append(values)
        else:
            num_bad += 1
    return kept, num_bad


def _has_step(values: Any) -> bool:
    return (
        type(values) is dict
        and type(step := values.get("step")) is int
        and -MAX_STEP <= step <= MAX_STEP
    )


def as_preview(values: dict[str, Any]) -> PreviewResult | int | bool:
    """The preview of a line, the step of a resumed line, or False for neither."""
    if values.get("type") == RESUMED:
        step: int = values["step"]
        return step
    try:
        return PreviewResult.model_validate(values)
    except ValidationError:
        return False


def limit_of_resume(step: int) -> int:
    """The highest step that still counts; a start at step 0 makes those of step 0 again too."""
    return step if step > 0 else -1


class TrainingStatusReader:
    """Reads status.json, metrics.jsonl and previews.jsonl; writes nothing."""

    def __init__(self, path: str | Path) -> None:
        """Take a run folder, or a status.json (its folder holds the other two files)."""
        self.path = Path(path)
        self._reported: set[Path] = set()

    def read(self) -> TrainingStatus:
        """The status as it was last written.

        Raises:
            OutputError: there is no status, or it is not one that this version understands.
        """
        path = self.path / STATUS_NAME if self.path.is_dir() else self.path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise OutputError(
                f"{path}: no such status file. Give the folder of a run that was started, or the "
                "path of its status.json."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(
                f"{path}: cannot be read ({error}). It must be a status.json that you may read."
            ) from error
        return _parse_status(path, text)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl that count, in order; none when there is no file.

        Each has `type` (`StepDone`, `EvaluationDone` or `DriftMeasured`), `created_at` and the
        event's fields.
        """
        return self._lines(METRICS_NAME)

    def previews(self) -> Iterator[PreviewResult]:
        """The previews that count, in the order of writing; none when there is no file."""
        return self._results(PREVIEWS_NAME)

    def evaluations(self) -> Iterator[PreviewResult]:
        """The same for the answers that were made for scores only."""
        return self._results(EVALUATIONS_NAME)

    def _results(self, name: str) -> Iterator[PreviewResult]:
        for values in self._lines(name):
            try:
                yield PreviewResult.model_validate(values)
            except ValidationError as error:
                self._report(self.folder / name, f"step {values.get('step')}: {error}")

    @property
    def folder(self) -> Path:
        """The folder that holds metrics.jsonl and previews.jsonl."""
        return self.path if self.path.is_dir() else self.path.parent

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Objects of a file, without those that a resumed run made again."""
        path = self.folder / name
        try:
            lines = read_whole_lines(path)
        except FileNotFoundError:
            return
        limits = _step_limits(lines)
        for index, line in enumerate(lines):
            if limits and index >= limits[0][0]:
                limits.pop(0)
                continue
            rows, _ = parse_lines([line])
            if not rows:
                self._report(path, f"line {index + 1} is not a JSON object with a step")
            elif not limits or rows[0]["step"] <= limits[0][1]:
                yield rows[0]

    def _report(self, path: Path, what: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            logger.warning("%s: %s; left out, like any other such line of it", path, what)


def _parse_status(path: Path, text: str) -> TrainingStatus:
    try:
        values = json.loads(text)
        version = values["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{path}: not a status.json of this program ({type(error).__name__}: {error}). "
            "Give the folder of a run."
        ) from error
    if version != SCHEMA_VERSION:
        raise OutputError(
            f"{path}: schema_version={version!r}, and this program reads {SCHEMA_VERSION}. "
            "Read it with the version that wrote it."
        )
    try:
        return TrainingStatus.model_validate(values)
    except ValidationError as error:
        raise OutputError(f"{path}: not a whole status.json: {error}") from error


def _step_limits(lines: list[bytes]) -> list[tuple[int, int]]:
    """Index of each resumed line, with the highest step that still counts in lines before it."""
    limits: list[tuple[int, int]] = []
    limit: int | None = None
    for index in range(len(lines) - 1, -1, -1):
        if RESUMED.encode() not in lines[index]:  # cheap: parse only what may be one
            continue
        rows, _ = parse_lines([lines[index]])
        if rows and rows[0].get("type") == RESUMED:
            step = limit_of_resume(rows[0]["step"])
            limit = step if limit is None else min(step, limit)
            limits.insert(0, (index, limit))
    return limits
