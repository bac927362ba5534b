"""Rows become messages; what is wrong is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.collected import collected
from trainer.data.row_files import raw_rows, to_rows
from trainer.data.rows import RowErrors
from trainer.errors import DataError

GOOD = {"question": "q", "answer": "a"}
AS_MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(path: Path, policy: str = "strict", **options: Any) -> tuple[list[Any], str, RowErrors]:
    errors = RowErrors(policy)
    format_name, max_rows = options.get("format_name", "auto"), options.get("max_rows")
    rows, name = collected(to_rows(raw_rows(path), str(path), format_name, errors, max_rows))
    return rows, name, errors


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (GOOD, "question_answer"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"messages": AS_MESSAGES}, "messages"),
    ],
)
def test_each_format_is_found_and_gives_the_same_messages(
    write_rows: Callable[..., Path], row: dict[str, Any], name: str
) -> None:
    rows, found, errors = read(write_rows([row, row]))
    assert found == name
    assert [r.messages for r in rows] == [AS_MESSAGES, AS_MESSAGES]
    assert not errors.errors


def test_a_json_array_is_read_like_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    rows, _, _ = read(path)
    assert [row.where for row in rows] == [f"{path}[0]", f"{path}[1]"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \n")
    rows, _, errors = read(path)
    assert len(rows) == 1
    assert not errors.errors


BAD_LINES = {
    "not json": ("{'question': 1}", "not valid JSON"),
    "cut": ('{"question": "q", "ans', "not valid JSON"),
    "nan": ('{"question": NaN, "answer": "a"}', "NaN"),
    "number": ("42", "must be an object"),
    "keys": ('{"frage": "x"}', "no 'question'"),
    "another format": ('{"text": "x"}', "row is of format 'text', but the file is"),
    "type": ('{"question": {}, "answer": "a"}', "'question' is dict"),
    "empty answer": ('{"question": "q", "answer": "  "}', "empty"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_reason(
    write_rows: Callable[..., Path], case: str
) -> None:
    line, reason = BAD_LINES[case]
    path = write_rows([GOOD, line, GOOD])
    rows, _, errors = read(path)
    assert len(rows) == 2
    assert len(errors.errors) == 1
    assert errors.errors[0].startswith(f"{path}:2: ")
    assert reason in errors.errors[0]


BAD_MESSAGES = {
    "no assistant": ([{"role": "user", "content": "q"}], "no assistant turn"),
    "role": ([{"role": "robot", "content": "q"}, *AS_MESSAGES], "role 'robot'"),
    "no user": ([{"role": "assistant", "content": "a"}], "no user turn"),
    "tool calls": (
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "tool_calls": [1]},
        ],
        "tool_calls",
    ),
    "content": ([{"role": "user", "content": None}], "'content' is NoneType"),
    "not a dict": (["q"], "messages[0] is a str"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_a_conversation_that_cannot_be_trained_on_is_named(
    write_rows: Callable[..., Path], case: str
) -> None:
    messages, reason = BAD_MESSAGES[case]
    _, _, errors = read(write_rows([{"messages": messages}]))
    assert reason in errors.errors[0]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xff", "answer": "a"}\n')
    _, _, errors = read(path)
    assert errors.errors == [f"{path}:2: not UTF-8 text (byte 14 of the line)"]


def test_strict_stops_with_the_first_twenty_errors_and_their_number(
    write_rows: Callable[..., Path],
) -> None:
    _, _, errors = read(write_rows([GOOD] + ["nope"] * 25))
    with pytest.raises(DataError) as caught:
        errors.raise_if_strict()
    assert str(caught.value).startswith("25 bad rows:")
    assert str(caught.value).count("not valid JSON") == 20
    assert "and 5 more" in str(caught.value)


def test_skip_counts_by_reason_and_does_not_stop(write_rows: Callable[..., Path]) -> None:
    _, _, errors = read(write_rows([GOOD, "nope", "{}"]), policy="skip")
    errors.raise_if_strict()
    assert errors.reasons == {"not JSON": 1, "no question": 1}


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty"):
        read(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nope.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_max_rows_reads_no_more_than_that(write_rows: Callable[..., Path]) -> None:
    rows, _, errors = read(write_rows([GOOD, GOOD, "nope"]), max_rows=2)
    assert len(rows) == 2
    assert not errors.errors
