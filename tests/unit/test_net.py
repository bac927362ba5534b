"""A run folder from somebody else cannot have a file of this machine read as a key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainer.net import KEY_VARIABLE, MAX_PLACES, is_own_key_file, remember_key_file
from trainer.views.page.worker_link import find_worker


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTIMATE_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def announced(folder: Path, key_file: Path) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    values = {"url": "http://127.0.0.1:8765", "key_file": str(key_file)}
    (run / "worker.json").write_text(json.dumps(values))
    return run


@pytest.mark.parametrize("name", ["token", "../token", "run/key", "trainer-weights-1-x/key"])
def test_only_key_files_that_were_used_here_are_read(tmp_path: Path, name: str) -> None:
    secret = tmp_path / name
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("ghp_0123456789abcdef\n")
    secret.chmod(0o600)
    run = announced(tmp_path, secret)
    found = find_worker(run)
    assert found.worker is None
    assert "names a key file that no run or server of yours" in found.reason
    remember_key_file(secret)
    found = find_worker(run)
    assert found.worker is not None
    assert found.worker.key_file == str(secret)


def test_a_link_to_another_file_is_no_key_file_of_ours(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.write_text("k" * 20)
    remember_key_file(mine)
    other = tmp_path / "other"
    other.write_text("x" * 20)
    link.symlink_to(other)
    assert not is_own_key_file(link)
    assert is_own_key_file(tmp_path / "run" / ".." / "mine")


def test_the_key_of_the_environment_serves_where_the_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 20)
    found = find_worker(announced(tmp_path, tmp_path / "secret"))
    assert found.worker is not None
    assert found.worker.key_file is None


def test_the_list_stays_small_private_and_forgets_what_is_gone(tmp_path: Path) -> None:
    for n in range(MAX_PLACES + 20):
        (tmp_path / f"key{n}").write_text("k")
        remember_key_file(tmp_path / f"key{n}")
    (tmp_path / f"key{MAX_PLACES}").unlink()
    remember_key_file(tmp_path / "key0")
    listed = tmp_path / "cache" / "key_files"
    assert len(listed.read_text().splitlines()) == MAX_PLACES
    assert not is_own_key_file(tmp_path / f"key{MAX_PLACES}")
    assert is_own_key_file(tmp_path / "key0")
    assert listed.stat().st_mode & 0o077 == 0
    assert os.listdir(listed.parent) == ["key_files"]
