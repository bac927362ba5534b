"""Tables -> rows: CSV and TSV files, Parquet and Arrow files, and Arrow tables of the hub."""

from __future__ import annotations

import csv
import datetime as dt
import io
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from trainer.data.data_files import DataFile
from trainer.data.rows import BadRowError
from trainer.data.text_files import as_windows_1252, open_text, parse, refuse_single_byte
from trainer.errors import DataError

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
"""The usual one first; another one only where the header has no second column by the usual one."""

MISSING = frozenset({"NaN", "nan", "<NA>", "#N/A"})
"""What pandas and Excel write into a cell that has no value."""


def table_rows(path: DataFile, kind: str, max_cell: int) -> Iterator[tuple[str, Any]]:
    """Yield (`file:line`, row) of a CSV or TSV file with a header.

    Rows without a cell of text are no rows, and columns without a name and without text are none.

    Args:
        path: of the file.
        kind: `.csv` or `.tsv`.
        max_cell: characters that a cell may have.
    Raises:
        DataError: the file is damaged as a whole, or is no table.
    """
    csv.field_size_limit(max_cell)
    is_checked = False
    with open_text(path) as file:
        lines = _Lines(file)
        reader: Any = None
        try:
            reader, header = _begin(path, lines, kind)
            if header is None:
                return
            end = lines.count
            for cells in reader:
                start, end = end + 1, lines.count  # quoted line ends: a row has several lines
                if not any(cell.strip() for cell in cells):
                    continue
                row = _row(header, cells)
                if isinstance(row, BadRowError) and row.reason == "not UTF-8" and not is_checked:
                    refuse_single_byte(path)
                    is_checked = True
                yield f"{path}:{start}", row
        except csv.Error as error:
            raise DataError(
                f"{path}:{lines.count}: not valid CSV: {error}{_hint(str(error))}. Nothing after "
                "it can be read."
            ) from error


class _Lines:
    """Lines of a file as text, counted, and one that can be put back."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.held = file, 0, ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.held:
            line, self.held = self.held, ""
        else:
            raw = self.file.readline()
            if not raw:
                raise StopIteration
            # Bytes that are no UTF-8 pass as surrogates, and are found in the row that holds them.
            line = raw.decode("utf-8-sig", "surrogateescape")
        self.count += 1
        return line

    def put_back(self, line: str) -> None:
        self.held, self.count = line, self.count - 1


def _begin(path: DataFile, lines: _Lines, kind: str) -> tuple[Any, list[str] | None]:
    """The reader behind the header, and the columns' names (None: there are no lines)."""
    first = next((line for line in lines if line.strip(' \t\r\n,;|"')), None)
    if first is None:
        return None, None
    if re.match(r"\s*(\{|\[\s*\{)\s*[\"']", first):
        raise DataError(
            f"{path}: its name says CSV, but it holds JSON ({first.strip()[:60]!r}); name it "
            ".jsonl (one object a line) or .json."
        )
    named = re.fullmatch(r'"?sep=(.)"?', first.strip("\r\n"))  # Excel's own first line
    if named:
        first = next(lines, "")
        delimiter = named[1]
    else:
        delimiter = _delimiter(first, DELIMITERS[kind])
    lines.put_back(first)
    cells = _cells(first, delimiter)
    is_spaced = len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=is_spaced)
    names = [cell.strip() for cell in next(reader, [])]
    given = [name for name in names if name]
    if len(set(given)) < len(given):
        raise DataError(
            f"{path}:{lines.count}: a column name occurs twice in the header {given}; "
            "rename or remove one."
        )
    if names and not names[0]:
        names[0] = "column 1"  # the index that pandas writes
    return reader, names


def _delimiter(line: str, known: str) -> str:
    """The usual one where it makes columns of the header; else the one that makes the most."""
    counts = {mark: len(_cells(line, mark)) for mark in known}
    return known[0] if counts[known[0]] > 1 else max(known, key=lambda mark: counts[mark])


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _row(header: list[str], cells: list[str]) -> Any:
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
        said = as_windows_1252("\t".join(cells).encode("utf-8", "surrogateescape"))
        return BadRowError(
            f"not UTF-8 text (as Windows-1252 it says {said!r}); save the file as UTF-8",
            "not UTF-8",
        )
    num_named = max((place for place, name in enumerate(header, start=1) if name), default=0)
    num_filled = max(place for place, cell in enumerate(cells, start=1) if cell.strip())
    if len(cells) < num_named or num_filled > len(header):
        return BadRowError(
            f"row has {len(cells)} cells, the header has {len(header)}; put cells that hold the "
            "separator or a line end into double quotes",
            "wrong number of cells",
        )
    for place, (name, cell) in enumerate(zip(header, cells, strict=False), start=1):
        if not name and cell.strip():
            return BadRowError(
                f"cell {place} says {cell[:40]!r}, and its column has no name in the header; name "
                "the column, or put a cell that holds the separator into double quotes",
                "cell without a column",
            )
    return {
        name: None if cell in MISSING else cell
        for name, cell in zip(header, cells, strict=False)
        if name
    }


def _hint(error: str) -> str:
    if "expected after" in error:
        return (
            " (text follows the closing quote of a cell; a quote within a cell is written twice, "
            r'"", not \")'
        )
    if "unexpected end" in error:
        return " (a quote is opened and never closed)"
    return ""


# ---- rows of Arrow tables (Parquet, Arrow, hub datasets) without the nulls that Arrow added
#
# A column has one type. Where it holds objects, Arrow gives each of them the members of all, and a
# null for those that a row does not have; a template would print them. They are taken out again.
# A null that the row itself had cannot be told from these and goes with them, which JSON text in a
# column of text avoids.


ARROW_FILE = b"ARROW1"
"""Begins an Arrow file with an index of its batches; without one it is a stream of them."""

STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

TABLE_ROWS = 1024
"""Read from a table at once."""


def parquet_rows(path: DataFile) -> Iterator[tuple[str, Any]]:
    """Yield (`file[index]`, row) of a Parquet file.

    Raises:
        DataError: it cannot be read.
    """
    # pyarrow is large and most files are text.
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with _sought(path) as stored, parquet.ParquetFile(path.local_path or stored) as file:
            path.position.num_rows = file.metadata.num_rows
            yield from file.iter_batches(batch_size=TABLE_ROWS)

    yield from _table_rows(path, "Parquet", batches())


def arrow_rows(path: DataFile) -> Iterator[tuple[str, Any]]:
    """Yield (`file[index]`, row) of an Arrow file, as a stream of batches or with their index.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow

    def batches() -> Iterator[Any]:
        with _sought(path) as stored:
            if stored.read(len(ARROW_FILE)) == ARROW_FILE:
                stored.seek(0)
                with pyarrow.ipc.open_file(stored) as reader:
                    yield from map(reader.get_batch, range(reader.num_record_batches))
                return
            stored.seek(-min(len(STREAM_END), stored.seek(0, io.SEEK_END)), io.SEEK_END)
            if stored.read() != STREAM_END:  # else pyarrow takes a cut between two batches for it
                raise pyarrow.ArrowInvalid("it is cut off, or no Arrow file")
            stored.seek(0)
            with pyarrow.ipc.open_stream(stored) as reader:
                yield from reader

    yield from _table_rows(path, "Arrow", batches())


def _sought(path: DataFile) -> IO[bytes]:
    """The file's bytes, of which any can be read: those of a web server by way of the disk."""
    stored = path.open()
    if stored.seekable():
        return stored
    with stored:
        copied: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's
        shutil.copyfileobj(stored, copied, 2**20)
    copied.seek(0)
    return copied


def _table_rows(path: DataFile, kind: str, batches: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    import pyarrow

    index = 0
    try:
        for whole in batches:
            for start in range(0, whole.num_rows, TABLE_ROWS):
                batch = whole.slice(start, TABLE_ROWS)
                schema = batch.schema
                # A map keeps its keys apart per row, so its nulls are the row's own.
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield f"{path}[{index}]", own_values(row, schema, is_json_text=True)
                    index += 1
                path.position.row = index
    # The others: cells that are no UTF-8, and dates that Python does not have.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise DataError(
            f"{path}: not a readable {kind} file ({' '.join(str(error).split())})."
        ) from error


def own_values(row: dict[str, Any], schema: Any, *, is_json_text: bool = False) -> Any:
    """The row without what Arrow added to its objects.

    Args:
        row: as `to_pylist` gives it.
        schema: pyarrow's, of the table.
        is_json_text: values of Arrow's JSON type are still text.
    Returns:
        The row, or a BadRowError value where an object in it holds a number that is none.
    """
    try:
        # A null of a column itself stays: formats know what a missing value means.
        return {key: _own(value, _field(schema, key), is_json_text) for key, value in row.items()}
    except BadRowError as error:
        return error


def _own(value: Any, kind: Any, is_json_text: bool) -> Any:
    """The value as its row had it; `kind` is its Arrow type."""
    from pyarrow import types

    if value is None or kind is None:
        return value
    if types.is_struct(kind):
        return {
            key: _as_json(_own(part, _field(kind, key), is_json_text))
            for key, part in value.items()
            if part is not None
        }
    if types.is_map(kind):
        return {key: _own(part, kind.item_type, is_json_text) for key, part in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_own(part, kind.value_type, is_json_text) for part in value]
    if is_json_text and getattr(kind, "extension_name", "") == "arrow.json":
        value = parse(value.encode("utf-8"))
        if isinstance(value, BadRowError):
            raise value
    return value


def _field(parent: Any, name: str) -> Any:
    """The type of a member of a schema or struct."""
    index = parent.get_field_index(name)
    return parent.field(index).type if index >= 0 else None


def _as_json(value: Any) -> Any:
    """A member of an object as JSON would have it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(
            f"an object in the row holds the number {value}, which JSON does not have; write null",
            "not JSON",
        )
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    return value
