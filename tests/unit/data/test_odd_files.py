"""What people bring as a file of rows: read right, or refused by one error that says what to do."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.collected import collected
from trainer.data.row_files import raw_rows, to_rows
from trainer.data.rows import RowErrors
from trainer.errors import DataError

ROWS = [{"question": f"q{n} \u00fc", "answer": f"a{n} \u20ac"} for n in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False)
TABLE = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
OBJECTS = "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS)


def read(path: Path, content: str | bytes) -> tuple[list[tuple[str, str]], list[str]]:
    """(question, answer) of the rows, and what is wrong with the others."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    errors = RowErrors("strict")
    rows, _ = collected(to_rows(raw_rows(path), str(path), "auto", errors, None))
    return [
        (row.messages[0]["content"], row.messages[-1]["content"]) for row in rows
    ], errors.errors


def marked(encoding: str, text: str) -> bytes:
    """Text with its byte order mark."""
    return ("\ufeff" + text).encode(encoding)


SAME_ROWS: dict[str, tuple[str, str | bytes]] = {
    "UTF-16 lines": ("d.jsonl", marked("utf-16-le", LINES)),
    "UTF-16 of the other end": ("d.json", marked("utf-16-be", PRETTY)),
    "UTF-16 table": ("d.csv", marked("utf-16-le", TABLE.replace("\n", "\r\n"))),
    "UTF-16 with tabs, as Excel's Unicode text": (
        "d.csv",
        marked("utf-16-le", TABLE.replace(",", "\t")),
    ),
    "UTF-32 table": ("d.csv", marked("utf-32-le", TABLE)),
    "packed UTF-16": ("d.csv.gz", gzip.compress(marked("utf-16-be", TABLE))),
    "array on one line": ("d.jsonl", json.dumps(ROWS)),
    "array over lines": ("d.jsonl", PRETTY),
    "array under no suffix": ("d", PRETTY),
    "objects over lines": ("d.jsonl", OBJECTS),
    "objects over lines of a .json": ("d.json", OBJECTS + "\n"),
    "wrapped in one line": ("d.json", json.dumps({"data": ROWS})),
    "wrapped over lines": ("d.jsonl", json.dumps({"rows": ROWS}, indent=2)),
    "CR line ends": ("d.jsonl", LINES.replace("\n", "\r") + "\r"),
    "CR line ends of a table": ("d.csv", TABLE.replace("\n", "\r")),
    "CR line ends of an array": ("d.json", PRETTY.replace("\n", "\r")),
    "semicolons": ("d.csv", TABLE.replace(",", ";")),
    "tabs in a .csv": ("d.csv", TABLE.replace(",", "\t")),
    "bars": ("d.csv", TABLE.replace(",", "|")),
    "commas in a .tsv": ("d.tsv", TABLE),
    "Excel's sep line": ("d.csv", "sep=;\r\n" + TABLE.replace(",", ";")),
    "Excel's empty columns and rows": (
        "d.csv",
        ",,,\n" + TABLE.replace("\n", ",,\n") + ",,,\n , ,,\n",
    ),
    "more empty cells than columns": ("d.csv", TABLE.replace("0 \u20ac\n", "0 \u20ac,,\n")),
    "pandas' index": (
        "d.csv",
        "".join(f"{n - 1 if n else ''},{line}\n" for n, line in enumerate(TABLE.splitlines())),
    ),
    "capitals and spaces": (
        "d.csv",
        TABLE.replace("question,answer", "Question, Answer ").replace(",a", ", a"),
    ),
    "capitals in lines": (
        "d.jsonl",
        LINES.replace("question", "Question").replace("answer", "ANSWER"),
    ),
    "joined tables": ("d.csv", marked("utf-8", TABLE).replace(b"q1", b"\xef\xbb\xbfq1")),
    "JSONL in a .txt": ("d.txt", LINES),
}


@pytest.mark.parametrize("case", SAME_ROWS)
def test_these_files_are_read_as_the_rows_that_are_meant(tmp_path: Path, case: str) -> None:
    name, content = SAME_ROWS[case]
    rows, errors = read(tmp_path / name, content)
    assert not errors
    assert rows == [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_what_only_looks_like_a_line_end_is_text(tmp_path: Path, name: str, char: str) -> None:
    row = {"question": f"a{char}b", "answer": f"c{char}d"}
    text = f"question,answer\n{row['question']},{row['answer']}\n"
    as_json = json.dumps(row, ensure_ascii=False)
    rows, errors = read(tmp_path / name, text if name == "d.csv" else as_json)
    assert not errors
    assert rows == [(row["question"], row["answer"])]


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "UTF-16 without a mark": ("d.jsonl", LINES.encode("utf-16-le"), "UTF-16LE text without"),
    "UTF-16 table without a mark": ("d.csv", TABLE.encode("utf-16-be"), "UTF-16BE text without"),
    "cut UTF-16": ("d.csv", marked("utf-16-le", TABLE)[:-1], "begins as UTF-16"),
    "cp1252 table": ("d.csv", TABLE.encode("cp1252"), "as Windows-1252"),
    "cp1252 lines": ("d.jsonl", LINES.encode("cp1252"), "as Windows-1252"),
    "Cyrillic": (
        "d.csv",
        "question,answer\n\u043a\u0430\u043a,\u0434\u0430\n\u0433,\u0434\n".encode("cp1251"),
        "single-byte",
    ),
    "latin-1 array": ("d.json", PRETTY.replace("\u20ac", "e").encode("latin-1"), "single-byte"),
    "packed latin-1": ("d.csv.gz", gzip.compress(TABLE.encode("cp1252")), "single-byte"),
    "commas behind lines": ("d.jsonl", LINES.replace("}\n", "},\n"), "a comma between"),
    "commas between objects": ("d.json", OBJECTS.replace("}\n", "},\n"), "a comma between"),
    "trailing comma": ("d.json", PRETTY[:-2] + ",\n]", "comma before the closing ']'"),
    "trailing comma in objects": ("d.json", PRETTY.replace('"\n  }', '",\n  }'), "closing '}'"),
    "cut array": ("d.json", PRETTY[:-30], "cut off"),
    "Python dicts": ("d.jsonl", "\n".join(map(repr, ROWS)), "single quotes"),
    "a Python list": ("d.json", repr(ROWS), "single quotes"),
    "Python's None": ("d.jsonl", LINES.replace("}", ', "x": None}'), "JSON writes null"),
    "typographic quotes": ("d.jsonl", LINES.replace('"', "\u201c"), "typographic"),
    "columns": ("d.json", '{"question": [1, 2], "answer": ["a", "b"]}', "holds columns"),
    "columns of pandas": ("d.json", '{"question": {"0": "a"}, "answer": {"0": "b"}}', "columns"),
    "one column": ("d.json", '{"text": ["a", "b"]}', "holds columns"),
    "several lists": ("d.json", json.dumps({"train": ROWS, "test": ROWS}), "several lists of rows"),
    "wrapped beside others": ("d.json", json.dumps({"version": 1, "data": ROWS}), "under 'data'"),
    "plain text": ("d.txt", "hello world\nthis is plain text\n", '{"text": "..."}'),
    "CSV by another name": ("d.jsonl", TABLE, "looks like CSV"),
    "JSONL by another name": ("d.csv", LINES, "it holds JSON"),
    "unknown columns": ("d.csv", "a,b\n1,2\n3,4\n", "None of the file's 2 rows"),
    "a backslash before a quote": (
        "d.csv",
        'question,answer\n"a \\"b\\"",c\nq,a\n',
        "written twice",
    ),
    "text behind a quote": ("d.csv", 'question,answer\n"a" b,c\n', "written twice"),
    "Excel workbook": ("d.xlsx", b"PK\x03\x04" + bytes(99), "Excel"),
    "Excel workbook by another name": ("d.csv", b"PK\x03\x04" + bytes(99), "Excel"),
    "zstd": ("d.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(range(99)), "zstd"),
    "gzip without .gz": ("d.jsonl", gzip.compress(LINES.encode()), ".gz"),
    "Parquet by another name": ("d.json", b"PAR1" + bytes(99), ".parquet"),
    "bytes": ("d.dat", bytes(range(256)) * 3, "binary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_these_files_are_one_error_that_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert words in message
    assert "\n" not in message


GOOD = '{"question": "q", "answer": "a"}'
BAD_ROWS: dict[str, tuple[str, str | bytes, str, str]] = {
    "key twice": (
        "d.jsonl",
        f'{GOOD}\n{{"question": "q", "answer": "a", "answer": "b"}}',
        ":2",
        "'answer' occurs twice",
    ),
    "key of a turn twice": (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n' + GOOD,
        ":1",
        "'content' occurs twice",
    ),
    "key twice in an array": (
        "d.json",
        f'[{GOOD}, {{"question": "q", "question": "q"}}]',
        "[1]",
        "'question' occurs twice",
    ),
    "NaN": (
        "d.jsonl",
        f'{GOOD}\n{{"question": "q", "answer": "a", "score": NaN}}',
        ":2",
        "write null",
    ),
    "NaN in an array": (
        "d.json",
        f'[{GOOD}, {{"question": "q", "answer": "a", "s": NaN}}]',
        "[1]",
        "write null",
    ),
    "a mark in the middle": ("d.jsonl", f"{GOOD}\n\ufeff{GOOD}", ":2", "byte order mark"),
    "comment": ("d.jsonl", f"// mine\n{GOOD}", ":1", "no comments"),
    "another comment": ("d.jsonl", f"{GOOD}\n# mine", ":2", "no comments"),
    "tab in a text": (
        "d.jsonl",
        GOOD.replace('q"', 'q\t"') + "\n" + GOOD,
        ":1",
        r"JSON writes \n or \t",
    ),
    "backslash": (
        "d.jsonl",
        GOOD.replace(': "q', ': "\\d') + "\n" + GOOD,
        ":1",
        "a single backslash",
    ),
    "cut first line": ("d.jsonl", f'{{"question": "q", "answ\n{GOOD}\n{GOOD}', ":1", "cut off"),
    "cut first line between keys": (
        "d.jsonl",
        f'{{"question": "q",\n{GOOD}\n{GOOD}',
        ":1",
        "cut off",
    ),
    "comma behind one line": ("d.jsonl", f"{GOOD}\n{GOOD},\n{GOOD}", ":2", "a comma after the row"),
    "one line in cp1252": (
        "d.jsonl",
        f"{GOOD}\n{GOOD}".encode().replace(b'"q"', b'"gr\xfcn"', 1),
        ":1",
        "gr\u00fcn",
    ),
    "comma in a cell": ("d.csv", "question,answer\nq,hello, world\nq,a\n", ":2", "double quotes"),
    "comma in a cell beside empty columns": (
        "d.csv",
        "question,answer,,\nq,hello, world,\n",
        ":2",
        "has no name",
    ),
    "few cells": ("d.csv", "question,answer\nq\nq,a\n", ":2", "row has 1 cells"),
    "missing value": ("d.csv", "question,answer\nq,NaN\nq,a\n", ":2", "'answer'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_wrong_is_named_and_costs_no_other(tmp_path: Path, case: str) -> None:
    name, content, place, words = BAD_ROWS[case]
    _, errors = read(tmp_path / name, content)
    assert len(errors) == 1
    assert errors[0].startswith(f"{tmp_path / name}{place}: ")
    assert words in errors[0]


def test_a_missing_value_in_a_column_that_is_not_needed_is_none(tmp_path: Path) -> None:
    table = "question,answer,system,score\nq,a,NaN,nan\nq,a,#N/A,1\n"
    rows, errors = read(tmp_path / "d.csv", table)
    assert not errors
    assert rows == [("q", "a")] * 2


def test_one_object_whose_lists_are_turns_is_a_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    whole = {"prompt": turns[:1], "completion": turns[1:]}
    for row in ({"messages": turns}, whole):
        for indent in (None, 1):
            assert read(tmp_path / "d.json", json.dumps(row, indent=indent)) == ([("q", "a")], [])


@pytest.mark.parametrize("make", [codecs.BOM_UTF8.__add__, lambda text: text])
def test_a_file_of_one_line_that_is_no_json_says_what_to_do(
    tmp_path: Path, make: Callable[[bytes], bytes]
) -> None:
    rows, errors = read(tmp_path / "d.txt", make(b"once upon a time"))
    assert not rows
    assert '{"text": "..."}' in errors[0]


def test_a_damaged_line_in_a_utf8_file_costs_no_other(tmp_path: Path) -> None:
    lines = LINES.encode() + b"\n" + LINES.encode("cp1252")
    rows, errors = read(tmp_path / "d.jsonl", lines)
    assert (len(rows), len(errors)) == (3, 3)
