"""Rows of Parquet files and of the datasets library hold what they held before Arrow."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data import tables
from trainer.data.row_files import raw_rows
from trainer.data.rows import BadRowError
from trainer.data.sources import Source
from trainer.data.tables import own_values


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(calls: list[dict[str, Any]], tools: list[dict[str, Any]]) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "x", "name": "f"},
    ]
    return {"messages": turns, "tools": tools}


ROWS = [
    row([call("f", city="Paris")], [tool("f", city={"type": "string"})]),
    row([call("g", days=2, deep={"a": [1]})], [tool("g", days={"enum": [1, 2]})]),
    row([call("h"), call("f", place=[{"x": 1}, {"y": 2}])], [tool("h"), tool("f", city={})]),
]
"""No two have the same members: Arrow gives each those of all, at every depth."""


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def through_parquet(folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    return [found for _, found in raw_rows(parquet(folder / "d.parquet", rows))]


def check_rows(folder: Path) -> None:
    assert through_parquet(folder, ROWS) == ROWS


def test_objects_have_the_members_of_their_own_row_only(tmp_path: Path) -> None:
    check_rows(tmp_path)


def test_mutant_objects_with_the_members_of_other_rows_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "own_values", lambda row, schema, **_: row)
    with pytest.raises(AssertionError):
        check_rows(tmp_path)


def test_mutant_only_the_outermost_nulls_are_dropped_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outer(row: dict[str, Any], schema: Any, **_: Any) -> Any:
        return {key: value for key, value in row.items() if value is not None}

    monkeypatch.setattr(tables, "own_values", outer)
    with pytest.raises(AssertionError):
        check_rows(tmp_path)


def test_a_null_of_a_column_and_of_a_list_stays(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": None, "list": [None, "a"]}, {"answer": "a"}]
    assert through_parquet(tmp_path, rows) == [
        rows[0],
        {"question": None, "answer": "a", "list": None},
    ]


def test_a_null_in_json_text_is_the_rows_own(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    own = row([call("f", city=None)], [tool("f", city={"default": None})])
    assert [found for _, found in raw_rows(write_rows([own]))] == [own]
    as_text = {"messages": json.dumps(own["messages"]), "tools": json.dumps(own["tools"])}
    assert through_parquet(tmp_path, [as_text]) == [as_text]


def test_a_map_keeps_the_keys_and_the_nulls_of_each_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    column = pyarrow.array([[("city", "Paris")], [("day", None)], []], kind)
    parquet.write_table(pyarrow.table({"arguments": column}), tmp_path / "d.parquet")
    found = [found["arguments"] for _, found in raw_rows(tmp_path / "d.parquet")]
    assert found == [{"city": "Paris"}, {"day": None}, {}]


def test_dates_in_objects_are_text_and_numbers_that_are_none_a_bad_row(tmp_path: Path) -> None:
    day = dt.datetime(2024, 1, 2, 3)
    rows = [{"x": {"day": day}, "seen": day}, {"x": {"n": float("nan")}, "seen": day}]
    good, bad = through_parquet(tmp_path, rows)
    assert good == {"x": {"day": "2024-01-02T03:00:00"}, "seen": day}
    assert isinstance(bad, BadRowError)


def library_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: Any) -> list[Any]:
    """The rows of files as the datasets library gives them under a hub's id."""
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, **options: load(str(folder), cache_dir=str(folder / "cache"), **options),
    )
    return [found for _, found in Source("owner/name").rows()]


def test_rows_of_a_hub_dataset_in_parquet_have_their_own_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train.parquet", ROWS)
    assert library_rows(tmp_path / "data", monkeypatch) == ROWS


def test_rows_of_a_hub_dataset_in_json_keep_the_nulls_that_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., Path]
) -> None:
    (tmp_path / "data").mkdir()
    rows = [*ROWS, row([call("f", city=None)], [])]
    write_rows(rows, "data/train.jsonl")
    assert library_rows(tmp_path / "data", monkeypatch) == rows


def test_a_table_of_arrows_own_json_type_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    own = [call("f", city=None), call("g", days=1)]
    column = pyarrow.array([json.dumps(one) for one in own], pyarrow.string())
    table = pyarrow.table({"call": column.cast(pyarrow.json_(pyarrow.string()))})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert [found["call"] for _, found in raw_rows(tmp_path / "d.parquet")] == own


def test_a_row_whose_type_is_not_known_is_left_alone() -> None:
    import pyarrow

    assert own_values({"x": {"a": None}}, pyarrow.schema([])) == {"x": {"a": None}}
