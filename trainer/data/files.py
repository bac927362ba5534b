"""Files -> raw rows: JSONL, JSON arrays, CSV, TSV, Parquet, any of the text kinds also as .gz.

A row that cannot be read comes back as a BadRowError value, so that all of them are told at once;
a file that cannot be read at all is a DataError. What the keys of a row mean is in `formats.py`.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from trainer.data.rows import BadRowError
from trainer.errors import DataError

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 16 * 2**20
"""No row worth training is longer; a file without line ends must not fill the memory."""
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")

RawRow = tuple[str, Any]
"""Where the row stands, and its parsed value or what is wrong with it."""


def raw_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file in order; blank lines are no rows.

    Raises:
        DataError: the file is missing, cannot be opened, or is damaged as a whole.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what}. Give a JSONL, JSON, CSV or Parquet file with --dataset.")
    try:
        yield from _rows_of_kind(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is damaged or cut off ({error}); make or fetch it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _rows_of_kind(path: Path) -> Iterator[RawRow]:
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet_rows(path)
    elif kind in (".csv", ".tsv"):
        yield from _table_rows(path, "," if kind == ".csv" else "\t")
    elif kind == ".json" and _first_byte(path) == b"[":
        yield from _array_rows(path)
    else:
        yield from _line_rows(path)


def kind_of(path: Path) -> str:
    """The suffix that says how the file is read, `.gz` taken off; lower case."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _first_byte(path: Path) -> bytes:
    with _open(path) as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1]


def _line_rows(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            where = f"{path}:{number}"
            if isinstance(line, BadRowError):
                yield where, line
                continue
            # A UTF-8 byte order mark is not part of the first row.
            content = (line.removeprefix(BOM) if number == 1 else line).strip()
            if content:
                yield where, _parse(content)


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


def _array_rows(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        parsed = _parse(file.read().removeprefix(BOM))
    if isinstance(parsed, BadRowError):
        raise DataError(f"{path}: {parsed}. A .json file must be one array of rows, or JSONL.")
    for index, row in enumerate(parsed):
        yield f"{path}[{index}]", row


def _parse(content: bytes) -> Any:
    """Parse strict JSON; what is wrong comes back as a BadRowError value."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 text (byte {error.start} of the line)", "not UTF-8")
    except json.JSONDecodeError as error:
        at = (
            f"line {error.lineno} column {error.colno}"
            if error.lineno > 1
            else f"column {error.colno}"
        )
        return BadRowError(f"not valid JSON: {error.msg} at {at}", "not JSON")
    except RecursionError:
        return BadRowError("not usable JSON: nested too deeply", "not JSON")
    except BadRowError as error:
        return error
    except ValueError:  # Python refuses integers of thousands of digits
        return BadRowError("not usable JSON: a number with too many digits", "not JSON")


def _refuse_constant(name: str) -> None:
    raise BadRowError(f"not valid JSON: {name} is no JSON number", "not JSON")


def _table_rows(path: Path, delimiter: str) -> Iterator[RawRow]:
    """Rows of a CSV or TSV file with a header; every cell is text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open(path) as file:
        # Bytes that are no UTF-8 pass as surrogates, and are found in the row that holds them.
        text = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: a column name stands twice in the header {header}.")
            end = reader.line_num
            for cells in reader:
                start, end = end + 1, reader.line_num  # quoted line ends: a row has several lines
                if cells:
                    yield f"{path}:{start}", _table_row(header, cells)
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: not valid CSV: {error}. Nothing after it can be read."
            ) from error


def _table_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRowError(
            f"row has {len(cells)} cells, the header has {len(header)}", "wrong number of cells"
        )
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
        return BadRowError("not UTF-8 text", "not UTF-8")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    # pyarrow is large and most files are text.
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    # The others: cells that are no UTF-8, and dates that Python does not have.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({' '.join(str(error).split())})."
        ) from error
