"""Key files: one grammar for whoever reads them, and no open door to other machines (S2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.net import is_loopback, key_with_scope, keys_of_listener, read_key_file
from trainer.preview.http import server_key
from trainer.views.page.worker_link import WorkerAddress, _key_of

KEY, OTHER = "k" * 16, "o" * 16


def read_keys(path: Path) -> dict[str, str]:
    return read_key_file(path, "--api-key-file ")


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
        (f"{KEY}\n{OTHER}", "several lines"),
        (f"publish: {KEY}\n{OTHER}", "several lines"),
        ("-----BEGIN PRIVATE KEY-----\n" + "A" * 64, "several lines"),
        ("publish: two words of a key", "several lines|blank|generate"),
        ("k" * 5000, "at most 4096 bytes"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_keys(path)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nothing")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.20", "example.org", ""])
def test_other_machines_are_let_in_only_with_a_key(tmp_path: Path, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="no key is set"):
        keys_of_listener(None, host, "--key-file")
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    assert keys_of_listener(path, host, "--key-file") == {KEY: "publish"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert keys_of_listener(None, host, "--key-file") == {}


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"{KEY}\n",
        f"\n  {KEY}  \n\n",
        f"publish: {KEY}",
        f"publish : {KEY}",
        f"  publish:{KEY}\r\ngenerate: {OTHER}\r\n",
        f"generate : {OTHER}\npublish : {KEY}\n",
        f"generate: {OTHER}\npublish:{KEY}",
    ],
)
def test_server_trainer_and_page_read_the_same_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text.encode())
    of_server = keys_of_listener(path, "0.0.0.0", "--api-key-file")
    assert of_server[KEY] == "publish"
    assert server_key(str(path)) == KEY
    may_generate = _key_of(WorkerAddress(url="http://127.0.0.1:1", key_file=str(path)))
    assert may_generate == (OTHER if OTHER in text else KEY)
    assert may_generate in of_server
    assert key_with_scope(of_server, "publish") == KEY


def test_a_key_may_be_a_link_as_mounted_secrets_are(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(KEY)
    (tmp_path / "keys").symlink_to(tmp_path / "secret")
    assert server_key(str(tmp_path / "keys")) == KEY
