"""Every kind of file gives the same rows; damaged ones are named (F12 of the trust page)."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.collected import collected
from trainer.data import row_files
from trainer.data.row_files import raw_rows, to_rows
from trainer.data.rows import Row, RowErrors
from trainer.errors import DataError

ROWS = [{"question": f'q{n}, "x"\n\u00e9', "answer": f"a{n}"} for n in range(3)]
GOOD = json.dumps(ROWS[0]).encode()


def read(path: Path, policy: str = "strict") -> tuple[list[Row], RowErrors]:
    errors = RowErrors(policy)
    rows, _ = collected(to_rows(raw_rows(path), str(path), "auto", errors, None))
    return rows, errors


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def jsonl() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def compressed(path: Path) -> None:
    plain = path.with_suffix("")
    WRITERS[plain.name](plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda path: path.write_bytes(jsonl()),
    "lines.json": lambda path: path.write_bytes(jsonl()),
    "d.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "d.csv": write_csv,
    "d.tsv": lambda path: write_csv(path, "\t"),
    "d.parquet": write_parquet,
    "d.jsonl.gz": compressed,
    "d.json.gz": compressed,
    "d.csv.gz": compressed,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows, errors = read(tmp_path / name)
    assert not errors.errors
    assert [[turn["content"] for turn in row.messages] for row in rows] == [
        [row["question"], row["answer"]] for row in ROWS
    ]
    assert [row.index for row in rows] == [0, 1, 2]


BAD_LINES = {
    "bad utf-8": (b'{"question": "\xff\xfe", "answer": "a"}', "not UTF-8"),
    "cut last line": (b'{"question": "q", "answer": "a', "not valid JSON"),
    "raw NUL": (b'{"question": "q\0", "answer": "a"}', "not valid JSON"),
    "NUL by escape": (rb'{"question": "q\u0000", "answer": "a"}', "NUL"),
    "half a pair": (rb'{"question": "q\ud83d", "answer": "a"}', "surrogate"),
    "wrong type": (b'{"question": ["q"], "answer": "a"}', "'question' is list"),
    "array row": (b'["q", "a"]', "must be an object"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "NaN": (b'{"question": "q", "answer": NaN}', "NaN"),
    "Infinity": (b'{"question": "q", "answer": -Infinity}', "-Infinity"),
    "endless number": (b'{"question": ' + b"1" * 5000 + b', "answer": "a"}', "too many digits"),
    "BOM in the middle": (b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
    "two rows on a line": (GOOD + GOOD, "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_damaged_line_is_named_and_costs_no_other_row(tmp_path: Path, case: str) -> None:
    line, reason = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + b"\r\n" + line)
    rows, errors = read(path)
    assert len(rows) == 2
    assert len(errors.errors) == 1
    assert errors.errors[0].startswith(f"{path}:3: ")
    assert reason in errors.errors[0]


def test_a_line_of_50_mb_is_named_and_the_next_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    long = b'{"question": "' + b"x" * 50_000_000 + b'", "answer": "a"}\n'
    path.write_bytes(GOOD + b"\n" + long + GOOD + b"\n")
    rows, errors = read(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert errors.errors == [
        f"{path}:2: the line has {len(long):,} bytes; a row may have {row_files.MAX_LINE_BYTES:,}"
    ]


def test_a_line_of_exactly_the_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", len(GOOD) + 1)
    assert len(read(path)[0]) == 2
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", len(GOOD))
    rows, errors = read(path)
    assert [row.where for row in rows] == [f"{path}:2"]  # only the first has a line end
    assert [text.split(": ")[0] for text in errors.errors] == [f"{path}:1"]


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv.gz"])
def test_a_cut_or_false_gzip_file_is_one_error(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for broken in (content[:-12], b"no gzip"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match="damaged or cut off"):
            read(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 20, -8])
def test_a_damaged_parquet_file_is_one_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "d.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="Parquet"):
        read(path)


def test_a_parquet_cell_that_is_no_utf8_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9\xe9"))
    with pytest.raises(DataError, match="Parquet"):
        read(path)


def test_csv_rows_with_too_few_cells_or_bad_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer\n"q\nq",a\nonly one\n"q\nq",\xff\n\nq,a\n')
    rows, errors = read(path)
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:8"]
    assert [text.split(": ")[0] for text in errors.errors] == [f"{path}:4", f"{path}:5"]
    assert "1 cells" in errors.errors[0]
    assert "not UTF-8" in errors.errors[1]


def test_a_csv_file_with_an_open_quote_or_twin_columns_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('question,answer\nq,"a\nq,a\n')
    with pytest.raises(DataError, match="not valid CSV"):
        read(path)
    path.write_text("question,question\nq,a\n")
    with pytest.raises(DataError, match="occurs twice"):
        read(path)


@pytest.mark.parametrize("name", ["d.csv", "d.json", "d.jsonl", "d.jsonl.gz"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"d.csv": b"question,answer\n", "d.json": b"[]"}.get(name, b"\n")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match="empty"):
        read(path)


def test_skip_stops_above_max_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\nno\nno\n")
    for limit in (None, 2):
        _, errors = read(path, "skip")
        errors.max_bad_rows = limit
        errors.raise_if_strict()
    errors.max_bad_rows = 1
    with pytest.raises(DataError, match=r"data\.max_bad_rows=1"):
        errors.raise_if_strict()
