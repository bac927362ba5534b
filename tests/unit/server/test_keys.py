"""S2: no start with an empty or short key, nor with an open door to other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.server.auth import is_loopback, read_keys

KEY = "k" * 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("\n \n", "holds no key"),
        ("short\n", "has 5 characters"),
        ("k" * 15, "has 15 characters"),
        ("publish:\n", "has 0 characters"),
        (f"publish: {KEY}\ngenerate: short", "has 5 characters"),
        (f"admin: {KEY}", "is not generate or publish"),
        ("\u00fc" * 20, "cannot be read"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_keys(path, "127.0.0.1")


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nothing", "127.0.0.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.20", "example.org", ""])
def test_other_machines_are_let_in_only_with_a_key(tmp_path: Path, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="no key is set"):
        read_keys(None, host)
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    assert read_keys(path, host) == {KEY: "publish"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert read_keys(None, host) == {}
