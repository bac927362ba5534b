"""Addresses and keys: this machine, where to listen, what of a secret is shown; the model hub."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from trainer.errors import ConfigError
from trainer.files import default_cache_dir, replace_file

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
    return f"//{CUT}@" in address or f"={CUT}" in address or address.endswith(f"?{CUT}")


def name_without_secrets(name: str) -> str:
    """A file's path or address as it may be shown and compared.

    Of an address without a secret nothing is changed. A query with a key in it goes as a whole: in
    signed addresses the rest of it changes from day to day, and the file does not.
    """
    if "://" not in name:
        return name
    shown = without_secrets(name)
    if not is_cut(shown):
        return name
    return f"{shown.partition('?')[0]}?{CUT}" if f"={CUT}" in shown else shown


def names_without_secrets(names: str) -> str:
    """The same of several names with commas between."""
    return ",".join(map(name_without_secrets, names.split(",")))


# ---- addresses: what is this machine, and a socket that is bound before anything slow is done


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int, what: str) -> socket.socket:
    """Bind and listen, before anything slow is done: a taken port is known at once.

    Args:
        what: kind of server that may have the port already, for the message.
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
            f"another {what} running? Choose another --port (0 picks a free one)."
        ) from error
    return listener


def url_of(host: str, port: int) -> str:
    """The address of a listener; an IPv6 address gets its brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ---- keys: one grammar, whoever reads
#
# A key file holds one line `KEY`, or lines `generate: KEY` and `publish: KEY`, with blanks wherever
# a person puts them. `publish` may generate too, and a lone KEY is a `publish` key. A file of
# another form is refused as a whole, so that what it holds is never sent anywhere.


KEY_VARIABLE = "ULTIMATE_TRAINER_KEY"
"""Environment variable with the key of a preview server, where no file is named."""
SCOPES = ("generate", "publish")
MIN_KEY = 16
MAX_KEY_FILE = 4096
"""Bytes."""


def read_key_file(path: str | Path, option: str) -> dict[str, str]:
    """Keys of a file, each with its scope (`generate` or `publish`).

    Args:
        path: a link is followed: secrets are often mounted as one.
        option: what named the file, for messages, such as `--api-key-file `.
    Raises:
        ConfigError: unreadable, no key in it, a short key, or not a key file.
    """
    where = f"{option}{path}"
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_KEY_FILE + 1)
        text = data.decode("ascii")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{where}: cannot be read ({error}); give a text file with one line, the key."
        ) from error
    if len(data) > MAX_KEY_FILE:
        raise ConfigError(f"{where}: a key file has at most {MAX_KEY_FILE} bytes.")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{where}: the file holds no key.")
    keys: dict[str, str] = {}
    for line in lines:
        scope, colon, key = (part.strip() for part in line.partition(":"))
        if not colon and len(lines) == 1:
            scope, key = "publish", line
        if scope not in SCOPES or (not colon and len(lines) > 1) or " " in key:
            named = f"scope {scope[:20]!r} is not generate or publish" if colon else "several lines"
            raise ConfigError(
                f"{where}: {named}; a key file holds one line with the key, or lines "
                "`generate: KEY` and `publish: KEY`."
            )
        if len(key) < MIN_KEY:
            raise ConfigError(
                f"{where}: a key has {len(key)} characters, at least {MIN_KEY} are needed; make "
                "one with `openssl rand -hex 32`."
            )
        keys[key] = scope
    return keys


def key_with_scope(keys: dict[str, str], scope: str) -> str:
    """The key that is meant for `scope`, else the one that there is."""
    return next((key for key, held in keys.items() if held == scope), next(iter(keys)))


def keys_of_listener(path: Path | None, host: str, flag: str) -> dict[str, str]:
    """The keys that a listener on `host` asks for; empty: none is needed.

    Args:
        flag: that names the file, such as `--key-file`.
    Raises:
        ConfigError: a bad file, or no key for a bind that other machines reach.
    """
    if path is not None:
        return read_key_file(path, f"{flag} ")
    if is_loopback(host):
        return {}
    raise ConfigError(
        f"--host {host} is reachable from other machines and no key is set; give {flag} FILE "
        f"(one line of at least {MIN_KEY} characters, mode 600), or keep --host 127.0.0.1 and use "
        "an ssh tunnel."
    )


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
        lines = "".join(f"{one}\n" for one in [*known, place][-MAX_PLACES:])
        replace_file(listed, lines, mode=0o600)
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


# ---- whether the model hub may be asked, and the one switch that all its clients obey
#
# `local_files_only` alone is not enough: PEFT and `datasets` ask the hub on ways of their own, and
# each of them tries for a minute where there is no network.


HUB_TIMEOUT_S = 5.0

HUB_VARIABLE = "HF_HUB_OFFLINE"


def hub_is_offline() -> bool:
    """True when the user's environment forbids asking the model hub."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in (HUB_VARIABLE, "TRANSFORMERS_OFFLINE")
    )


def hub_answers() -> bool:
    """Whether the hub may be asked and can be reached; if not, no client asks it any more."""
    if hub_is_offline():
        return False
    # Both take part of a second to import, and a model folder needs neither.
    import httpx
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.TransportError as error:
        logger.warning(
            "the model hub %s does not answer (%s); using what is cached", constants.ENDPOINT, error
        )
        go_offline()
        return False
    return True


def go_offline() -> None:
    """Keep every client of the hub in this process from asking it."""
    os.environ[HUB_VARIABLE] = "1"
    _set_hub_flags(True)


def hub_setting() -> Callable[[], None]:
    """A function that undoes `go_offline`, for programs that run more than one job."""
    before = os.environ.get(HUB_VARIABLE)

    def put_back() -> None:
        if os.environ.get(HUB_VARIABLE) == before:
            return
        if before is None:
            del os.environ[HUB_VARIABLE]
        else:
            os.environ[HUB_VARIABLE] = before
        _set_hub_flags(hub_is_offline())

    return put_back


def _set_hub_flags(is_offline: bool) -> None:
    """The libraries read the variable once, when they are imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = is_offline
    config = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = is_offline  # type: ignore[attr-defined]
        config.HF_DATASETS_OFFLINE = is_offline  # type: ignore[attr-defined]
