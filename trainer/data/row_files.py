"""Files -> rows: JSONL, JSON, CSV, TSV, any of these also packed, and the tables Parquet and Arrow.

A row that cannot be read is noted with its place and reason, so that all of them are told at once;
a file that cannot be read at all, or is no file of rows, is one DataError. What the keys of a row
mean is in `layouts.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trainer.data.data_files import DataFile, LocalFile, as_data_error
from trainer.data.layouts import NO_FORMAT, messages_of, under_format
from trainer.data.rows import BadRowError, Row, RowErrors, RowNotes
from trainer.data.tables import arrow_rows, parquet_rows, table_rows
from trainer.data.text_files import explain, open_text, parse, refuse_single_byte, values
from trainer.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
"""No row worth training is longer; a file without line ends must not fill the memory."""

WRAPPERS = frozenset({"data", "dataset", "examples", "instances", "items", "records", "rows"})
"""Keys under which programs write a list of rows beside what else they know of it."""

RawRow = tuple[str, Any]
"""Where the row stands, and its parsed value or what is wrong with it."""


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
    with_columns: bool = False,
    may_be_empty: bool = False,
) -> Generator[Row, None, str]:
    """Turn the raw rows of one file into messages.

    Args:
        raw: as `raw_rows` gives them.
        name: of the file.
        format_name: `auto` or one of FORMATS.
        errors: receives the bad rows.
        max_rows: read no more than this many rows, bad ones counted.
        columns: a format's key -> the file's name for it.
        first_index: index of the first row.
        source: which of the run's files this is.
        with_columns: keep all that the file says of a row.
        may_be_empty: it is one of several, of which others have rows.
    Yields:
        The rows in file order.
    Returns:
        The name of their format; nothing where there is no row.
    Raises:
        DataError: the file has no row, or none of a known format.
    """
    first_strange, num_strange = "", 0
    known = None if format_name == "auto" else format_name
    count = 0
    for index, (where, parsed) in enumerate(raw, start=first_index):
        if max_rows is not None and count >= max_rows:
            break
        count += 1
        try:
            if isinstance(parsed, BadRowError):
                raise parsed
            is_found = format_name == "auto"
            row, known = under_format(_as_object(parsed), columns or {}, known, is_found=is_found)
            notes = RowNotes()
            messages = messages_of(row, known, notes)
        except BadRowError as error:
            errors.add(where, str(error), error.reason)
            if error.reason == NO_FORMAT:
                first_strange, num_strange = first_strange or f"{where}: {error}", num_strange + 1
            continue
        kept = parsed if with_columns else {}
        yield Row(where, index, messages, source, notes, columns=kept)
    if count == 0 and may_be_empty:
        return ""
    if count == 0:
        raise DataError(f"{name}: the file is empty. Give a file with at least one row.")
    if known is None and count == num_strange > 1:
        raise DataError(
            f"{first_strange}. None of the file's {count:,} rows has the keys of a known format."
        )
    return known or format_name


def _as_object(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise BadRowError(
            f"row is a JSON {type(parsed).__name__}; it must be an object such as "
            '{"question": "...", "answer": "..."}',
            "not an object",
        )
    return parsed


# ---- files -> raw rows
#
# A row that cannot be read comes as a BadRowError value.


def raw_rows(path: Path | DataFile) -> Iterator[RawRow]:
    """Yield the rows of a file in order; blank lines are no rows.

    Raises:
        DataError: the file is missing, cannot be opened, or is damaged as a whole.
    """
    file = path if isinstance(path, DataFile) else LocalFile(path)
    file.check()
    try:
        yield from _rows_of_kind(file)
    except DataError:
        raise
    except Exception as error:
        told = as_data_error(file, error)
        if told is None:
            raise
        raise told from error


def _rows_of_kind(path: DataFile) -> Iterator[RawRow]:
    kind = path.kind
    if kind in (".parquet", ".arrow") and path.packing:
        raise DataError(f"{path}: such a table is packed within; unpack the file.")
    if kind == ".parquet":
        yield from parquet_rows(path)
    elif kind == ".arrow":
        yield from arrow_rows(path)
    elif kind in (".csv", ".tsv"):
        yield from table_rows(path, kind, MAX_LINE_BYTES)
    elif _is_one_text(path, kind):
        yield from _whole_rows(path)
    else:
        yield from _json_lines_only(path, _line_rows(path))


# ---- one row a line


def _line_rows(path: DataFile) -> Iterator[RawRow]:
    is_checked = False
    with open_text(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            where = f"{path}:{number}"
            if isinstance(line, BadRowError):
                yield where, line
                continue
            content = line.strip()
            if not content:
                continue
            row = parse(content)
            if isinstance(row, BadRowError) and row.reason == "not UTF-8" and not is_checked:
                refuse_single_byte(path)
                is_checked = True
            yield where, row


def _lines(file: IO[bytes]) -> Iterator[bytes | BadRowError]:
    """Lines of bounded length; a longer one is skipped to its end and comes back as an error."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
            length += len(line)
        yield BadRowError(
            f"the line has {length:,} bytes; a row may have {MAX_LINE_BYTES:,}", "line too long"
        )


def _json_lines_only(path: DataFile, rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """The rows; a file of which no line is JSON is named once, with what to do.

    Raises:
        DataError: there are several lines, and none of them is JSON.
    """
    bad: list[tuple[str, BadRowError]] = []
    for where, row in rows:
        if isinstance(row, BadRowError) and row.reason == "not JSON":
            bad.append((where, row))
            continue
        yield from bad
        yield where, row
        yield from rows
        return
    if not bad:
        return
    where, error = bad[0]
    if len(bad) > 1:
        raise DataError(
            f"{where}: {error}, nor is any other of the file's {len(bad):,} lines. {_advice(path)}"
        )
    yield where, BadRowError(f"{error}. {_advice(path)}", error.reason)


def _advice(path: DataFile) -> str:
    """What to do with a text that is no JSONL."""
    first, second = [*_first_lines(path, 2), b"", b""][:2]
    for mark in (b",", b";", b"\t"):
        if b"{" not in first and first.count(mark) == second.count(mark) > 0:
            return "It looks like CSV; if it is, give it a name that ends in .csv."
    if first[:1] not in b"{[":
        return (
            'Plain text is trained from rows such as {"text": "..."}, one a line, in a .jsonl file.'
        )
    return 'Rows are JSON objects such as {"question": "...", "answer": "..."}, one a line.'


# ---- one text: an array, or objects over several lines


def _first_lines(path: DataFile, count: int) -> list[bytes]:
    """The first lines that are not blank, stripped; b"" for one that is too long."""
    found: list[bytes] = []
    with open_text(path) as file:
        for line in _lines(file):
            content = b"" if isinstance(line, BadRowError) else line.strip()
            if content or isinstance(line, BadRowError):
                found.append(content)
            if len(found) == count:
                break
    return found


def _is_one_text(path: DataFile, kind: str) -> bool:
    """Whether the file's rows are read from its whole text, not line by line."""
    first, *others = _first_lines(path, 2) or [b""]
    if first[:1] == b"[":
        # Arrays that stand one a line, or hold no objects, are lines without a row.
        whole = [] if kind == ".json" else parse(first)
        is_line = isinstance(whole, list) and not all(isinstance(row, dict) for row in whole)
        return not is_line and (kind == ".json" or not others or isinstance(whole, BadRowError))
    if first[:1] != b"{":
        return False
    if not others:
        return isinstance(parse(first), dict)  # one object, which may hold the rows
    if all(line.endswith(b"},") for line in (first, *others)):
        return True  # an array without its brackets, which is named as that
    return _is_unfinished(first) and (_is_json(path) or not _has_rows_in_lines(path))


def _is_unfinished(line: bytes) -> bool:
    """Whether an object begins in this line and goes on in the next."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _is_json(path: DataFile) -> bool:
    try:
        return sum(1 for _ in values(_text(path))) > 0
    except (json.JSONDecodeError, RecursionError, UnicodeDecodeError):
        return False


def _has_rows_in_lines(path: DataFile) -> bool:
    """Whether any line that begins an object, not indented, is one: JSONL with a damaged start."""
    with open_text(path) as file:
        lines = (line for line in _lines(file) if not isinstance(line, BadRowError))
        return any(line[:1] == b"{" and isinstance(parse(line.strip()), dict) for line in lines)


def _text(path: DataFile) -> str:
    with open_text(path) as file:
        return file.read().decode("utf-8")


def _whole_rows(path: DataFile) -> Iterator[RawRow]:
    """Rows of an array, or of objects that follow one another.

    Raises:
        DataError: the text is no JSON, or one object that holds no rows.
    """
    try:
        text = _text(path)
        is_array = text.lstrip()[:1] == "["
        found = values(text)
        if not is_array:
            yield from _objects(path, text, list(found))
            return
        for index, row in found:
            yield f"{path}[{index}]", row
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON: {explain(error)}. Rows are one array of "
            "objects in a .json file, or JSONL: one object a line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: not usable JSON: nested too deeply.") from error
    except UnicodeDecodeError as error:
        refuse_single_byte(path, at_least=1)
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8.") from error


def _objects(path: DataFile, text: str, found: list[tuple[int, Any]]) -> Iterator[RawRow]:
    if len(found) == 1 and isinstance(found[0][1], dict):
        inner = _inner_rows(path, found[0][1])
        if inner is not None:
            for index, row in enumerate(inner):
                yield f"{path}[{index}]", row
            return
    line, seen = 1, 0
    for start, row in found:
        line += text.count("\n", seen, start)
        seen = start
        yield f"{path}:{line}", row


def _inner_rows(path: DataFile, whole: dict[str, Any]) -> list[Any] | None:
    """The rows that the file's only object holds; None where it is a row itself.

    Raises:
        DataError: it holds columns, or several lists of rows.
    """
    lists: dict[str, list[Any]] = {key: rows for key, rows in whole.items() if _is_rows(rows)}
    if len(whole) == 1 and lists:
        [rows] = lists.values()
        return rows
    if len(lists) > 1 and len(lists) == len(whole):
        names = ", ".join(f"{key!r} ({len(value):,})" for key, value in lists.items())
        raise DataError(
            f"{path}: holds several lists of rows, {names}; write each into a file of its own."
        )
    for key in WRAPPERS & set(lists):
        others = ", ".join(repr(other) for other in whole if other != key)
        raise DataError(
            f"{path}: holds its rows under {key!r}, beside {others}; write that list alone into a "
            "file (jq .KEY FILE > NEW)."
        )
    if _is_columns(whole):
        raise DataError(
            f"{path}: holds columns ({', '.join(map(repr, whole))}), not rows; write one object "
            "for each row (pandas: frame.to_json(FILE, orient='records', lines=True))."
        )
    return None


def _is_rows(value: Any) -> bool:
    """A list of objects that are not the turns of one conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not {"role", "from"} & set(item) for item in value)
    )


def _is_columns(whole: dict[str, Any]) -> bool:
    """Whether every value is as many cells as the others: lists, or objects {"0": ..., "1": ...}.

    The turns of conversations are objects, so lists of objects are none; nor is a row of tokens.
    """
    ids = whole.get("input_ids")
    if isinstance(ids, list) and all(isinstance(one, int) for one in ids):
        return False
    if all(isinstance(value, list) and value for value in whole.values()):
        cells = [cell for value in whole.values() for cell in value]
        is_even = len({len(value) for value in whole.values()}) == 1
        return is_even and len(cells) > 1 and not any(isinstance(cell, dict) for cell in cells)
    return all(
        isinstance(value, dict) and value and all(re.fullmatch(r"\d+", key) for key in value)
        for value in whole.values()
    )
