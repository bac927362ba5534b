"""LineTail gives every whole line exactly once, whatever happens to the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.monitoring import status_reader
from trainer.monitoring.status_reader import LineTail


def test_a_half_written_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntw")
    lines = LineTail(path)
    assert lines.poll().lines == [b"one"]
    assert lines.poll().lines == []
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert lines.poll().lines == [b"two", b"three"]


@given(pieces=st.lists(st.binary(max_size=12), max_size=12), chunk=st.integers(1, 7))
def test_any_split_of_writes_gives_the_lines_of_the_file(pieces: list[bytes], chunk: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(status_reader, "CHUNK", chunk)
        path = Path(folder) / "f"
        lines, found = LineTail(path), []
        for piece in pieces:
            with path.open("ab") as file:
                file.write(piece)
            found += lines.poll().lines
        assert found == b"".join(pieces).split(b"\n")[:-1]


@pytest.mark.parametrize("size", [5, 500])
def test_a_replaced_file_is_read_from_its_beginning(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old line\n" * 10)
    lines = LineTail(path)
    lines.poll()
    new = b"n" * size + b"\n"
    path.write_bytes(new * 3)  # the same inode, shorter or longer than before
    found = lines.poll()
    assert found.is_reset
    assert found.lines == [new[:-1]] * 3


def test_a_file_that_goes_away_is_a_reset_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    lines = LineTail(path)
    assert not lines.poll().is_reset
    path.write_bytes(b"one\n")
    lines.poll()
    path.unlink()
    assert lines.poll().is_reset
    path.write_bytes(b"two\n")
    assert lines.poll().lines == [b"two"]


def test_an_endless_line_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reader, "MAX_LINE", 100)
    monkeypatch.setattr(status_reader, "CHUNK", 30)
    path = tmp_path / "f"
    path.write_bytes(b"a\n" + b"x" * 500 + b"\nb\n")
    found = LineTail(path).poll()
    assert (found.lines, found.num_too_long) == ([b"a", b"b"], 1)


def test_a_pipe_in_its_place_is_an_error_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    with pytest.raises(OSError, match="not a regular file"):
        LineTail(tmp_path / "f").poll()
