"""Addresses: what is this machine, and a socket that is bound before anything slow is done."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from trainer.errors import ConfigError
from trainer.monitor.small_files import read_regular_file

MIN_KEY = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    listener: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); is "
            "another monitor running? Choose another --port (0 picks a free one)."
        ) from error
    return listener


def read_page_key(path: Path | None, host: str) -> str | None:
    """The key that the page asks for; None: none is needed.

    Raises:
        ConfigError: unreadable or short, or no key for a bind that other machines reach.
    """
    if path is None:
        if is_loopback(host):
            return None
        raise ConfigError(
            f"--host {host} is reachable from other machines and no key is set; give --key-file "
            f"FILE (one line of at least {MIN_KEY} characters, mode 600), or keep --host 127.0.0.1 "
            "and use an ssh tunnel."
        )
    data = read_regular_file(path, 4096)
    if data is None:
        raise ConfigError(f"--key-file {path}: cannot be read; it must be a file with one line.")
    key = data.decode("utf-8", "replace").strip()
    if len(key) < MIN_KEY or "\n" in key:
        raise ConfigError(
            f"--key-file {path}: one line of at least {MIN_KEY} characters is needed; make one "
            "with `openssl rand -hex 32`."
        )
    return key
