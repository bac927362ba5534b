"""Rows of Arrow tables: Parquet files and hub datasets, without the nulls that Arrow added.

A column has one type. Where it holds objects, Arrow gives each of them the members of all, and a
null for those that a row does not have; a template would print them. They are taken out again.
A null that the row itself had cannot be told from these and goes with them, which JSON text in a
column of text avoids.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.json_text import parse
from trainer.data.rows import BadRowError
from trainer.errors import DataError


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (`file[index]`, row) of a Parquet file.

    Raises:
        DataError: it cannot be read.
    """
    # pyarrow is large and most files are text.
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                schema = batch.schema
                # A map keeps its keys apart per row, so its nulls are the row's own.
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield f"{path}[{index}]", own_values(row, schema, is_json_text=True)
                    index += 1
    # The others: cells that are no UTF-8, and dates that Python does not have.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({' '.join(str(error).split())})."
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
