"""Addresses and keys: what is this machine, where to listen, what of a secret may be shown."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from trainer.errors import ConfigError
from trainer.files import default_cache_dir, read_regular_file

CUT = "***"
"""Stands where a secret was."""

_SECRET_NAME = re.compile(r"key|token|secret|sig|pass|pwd|auth|cred|code", re.IGNORECASE)


def without_secrets(address: str) -> str:
    """The address with user name and password, and values of keys in its query, replaced by CUT."""
    try:
        parts = urlsplit(address)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return re.sub(r"//[^/@]*@", f"//{CUT}@", address).partition("?")[0]
    _, at, host = parts.netloc.rpartition("@")
    if any(_SECRET_NAME.search(name) for name, _ in query):
        shown = [
            f"{quote(name)}={CUT if _SECRET_NAME.search(name) else quote(value)}"
            for name, value in query
        ]
        parts = parts._replace(query="&".join(shown))
    return urlunsplit(parts._replace(netloc=f"{CUT}@{host}" if at else host))


def is_cut(address: str) -> bool:
    """Whether a secret was taken out of this address, so that it leads nowhere any more."""
    return f"//{CUT}@" in address or f"={CUT}" in address


# ---- addresses: what is this machine, and a socket that is bound before anything slow is done


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


# ---- which files are keys of preview servers: those that runs and servers of this user use
#
# A run folder can come from somebody else, and its worker.json could name any file of this machine.
# So the places of key files are kept outside of run folders, and only those are read for one.


logger = logging.getLogger(__name__)

MAX_PLACES = 200
"""The newest ones; a run adds one."""


def remember_key_file(path: str | Path) -> None:
    """Note that this user has started something with this key file; say so where one cannot."""
    place = str(Path(path).expanduser().resolve())
    listed = _list_file()
    try:
        known = [one for one in _known() if one != place and Path(one).is_file()]
        listed.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = listed.with_name(f"{listed.name}.{os.getpid()}.new")
        lines = "".join(f"{one}\n" for one in [*known, place][-MAX_PLACES:])
        temporary.touch(mode=0o600)
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(listed)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s); the live page will not find this run's key", listed, error
        )


def is_own_key_file(path: str | Path) -> bool:
    """Whether this user has started a run or a server with this key file."""
    return str(Path(path).expanduser().resolve()) in _known()


def _list_file() -> Path:
    return default_cache_dir() / "key_files"


def _known() -> list[str]:
    try:
        return _list_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return []
