"""Rows -> messages: which layout a file has, and its bad rows with file:line.

Reading is in `files.py`, the layouts are in `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.data.files import RawRow, raw_rows
from trainer.data.layouts import FORMATS, Format, messages_of
from trainer.data.rows import MAX_ERRORS_SHOWN, BadRowError, Row, RowErrors, RowNotes
from trainer.data.turns import check_messages
from trainer.errors import DataError

__all__ = [
    "FORMATS",
    "MAX_ERRORS_SHOWN",
    "BadRowError",
    "Format",
    "Row",
    "RowErrors",
    "check_messages",
    "detect_format",
    "read_rows",
    "to_rows",
]

NO_FORMAT = "no known format"


def read_rows(
    path: Path,
    format_name: str,
    errors: RowErrors,
    max_rows: int | None,
    *,
    columns: Mapping[str, str] | None = None,
    first_index: int = 0,
    source: int = 0,
) -> tuple[list[Row], str]:
    """Read one file.

    Args:
        path: of a kind that `files.py` reads.
        format_name: `auto` or one of FORMATS.
        errors: receives the bad rows.
        max_rows: read no more than this many rows, bad ones counted.
        columns: a format's key -> the file's name for it.
        first_index: index of the first row.
        source: which of the run's files this is.
    Returns:
        The rows in file order and the name of their format.
    Raises:
        DataError: the file is missing, empty or damaged.
    """
    return to_rows(
        raw_rows(path),
        str(path),
        format_name,
        errors,
        max_rows,
        columns=columns,
        first_index=first_index,
        source=source,
    )


def to_rows(
    raw: Iterable[RawRow],
    name: str,
    format_name: str,
    errors: RowErrors,
    max_rows: int | None,
    *,
    columns: Mapping[str, str] | None = None,
    first_index: int = 0,
    source: int = 0,
) -> tuple[list[Row], str]:
    """Turn raw rows of the file called `name` into messages; the rest is as in `read_rows`."""
    rows: list[Row] = []
    strange: list[str] = []
    known = None if format_name == "auto" else format_name
    count = 0
    for index, (where, parsed) in enumerate(raw, start=first_index):
        if max_rows is not None and count >= max_rows:
            break
        count += 1
        try:
            if isinstance(parsed, BadRowError):
                raise parsed
            row = _renamed(_as_object(parsed), columns or {})
            row = _in_usual_spelling(row, known)
            known = known or detect_format(row)
            _refuse_change(row, known, is_found=format_name == "auto")
            notes = RowNotes()
            rows.append(Row(where, index, messages_of(row, known, notes), source, notes))
        except BadRowError as error:
            errors.add(where, str(error), error.reason)
            if error.reason == NO_FORMAT:
                strange.append(f"{where}: {error}")
    if count == 0:
        raise DataError(f"{name}: the file is empty. Give a file with at least one row.")
    if known is None and count == len(strange) > 1:
        raise DataError(
            f"{strange[0]}. None of the file's {count:,} rows has the keys of a known format."
        )
    return rows, known or format_name


def _as_object(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise BadRowError(
            f"row is a JSON {type(parsed).__name__}; it must be an object such as "
            '{"question": "...", "answer": "..."}',
            "not an object",
        )
    return parsed


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's own keys."""
    renamed = {key: value for key, value in row.items() if key not in columns}
    for key, column in columns.items():
        if column not in row:
            raise BadRowError(
                f"row has no {column!r}, which data.columns names for {key!r}; "
                f"found keys {sorted(row)}",
                f"no {column}",
            )
        renamed.pop(column, None)
    return renamed | {key: row[column] for key, column in columns.items()}


def _in_usual_spelling(row: dict[str, Any], known: str | None) -> dict[str, Any]:
    """The row with a format's own keys where its keys differ in capitals or outer spaces only."""
    formats = [FORMATS[known]] if known else list(FORMATS.values())
    folded = {key.strip().casefold() for key in row}
    if any(layout.keys <= set(row) for layout in formats) or len(folded) < len(row):
        return row
    for layout in formats:
        if layout.keys <= folded:
            names = layout.keys | layout.optional
            usual = {key: key.strip().casefold() for key in row}
            return {usual[key] if usual[key] in names else key: row[key] for key in row}
    return row


def detect_format(row: dict[str, Any]) -> str:
    """Name the format of a row by its keys.

    Raises:
        BadRowError: no format has these keys.
    """
    for name, known in FORMATS.items():
        if known.fits(row):
            return name
    wanted = "; ".join(" and ".join(sorted(known.keys)) for known in FORMATS.values())
    raise BadRowError(
        f"row has the keys {sorted(row)}; it needs one of: {wanted} "
        "(data.columns maps other names to these)",
        NO_FORMAT,
    )


def _refuse_change(row: dict[str, Any], name: str, *, is_found: bool) -> None:
    """A row of another layout than the file's is named as that, not as a row with holes."""
    if FORMATS[name].fits(row):
        return
    others = [other for other, known in FORMATS.items() if known.fits(row)]
    if others:
        why = "as its first row says" if is_found else "as data.format says"
        raise BadRowError(
            f"row is of format {others[0]!r}, but the file is {name!r}, {why}; "
            "put rows of one format into a file",
            "another format",
        )
