"""A file is put in its place whole, with its mode, or not at all."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import files
from trainer.files import replace_file


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mode", "found"), [(0o600, 0o600), (0o666, 0o644)])
def test_a_file_has_its_mode_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, found: int
) -> None:
    seen = []
    rename = os.replace

    def look(source: Path, target: Path) -> None:
        seen.append(stat.S_IMODE(source.stat().st_mode))
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", look)
    path = tmp_path / "key"
    path.write_text("old, and open to all")
    replace_file(path, "new", mode=mode)
    assert seen == [found]
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", found)


def test_pieces_of_bytes_are_written_one_after_the_other(tmp_path: Path) -> None:
    replace_file(tmp_path / "entry", [b"digest", b"", b"body"], is_synced=True)
    assert (tmp_path / "entry").read_bytes() == b"digestbody"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "entry"
    path.write_text("old")
    monkeypatch.setattr(files.os, name, fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, [b"new"], is_synced=True)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("entry", "old")]


def test_writers_with_their_own_tags_never_meet_in_one_temporary_file(tmp_path: Path) -> None:
    path, errors = tmp_path / "entry", []

    def write(tag: str) -> None:
        try:
            for _ in range(200):
                replace_file(path, [tag.encode() * 5000], tag=tag)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(tag,)) for tag in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in (b"a" * 5000, b"b" * 5000)
    assert list(tmp_path.iterdir()) == [path]
