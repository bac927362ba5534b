"""Which files are keys of preview servers: those that runs and servers of this user use.

A run folder can come from somebody else, and its worker.json could name any file of this machine.
So the places of key files are kept outside of run folders, and only those are read for one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from trainer.data.cache import default_cache_dir

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
