"""The folder where uploads and committed sets of one server lie, and what killed ones left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "trainer-serve-"

LOCK = "lock"


class PrivateFolder:
    """A folder (mode 700) that is this server's while it runs: its lock file is held.

    A server that was killed leaves its folder behind with a lock that nobody holds; the next one
    removes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Remove what is left of killed servers, and make a folder of our own.

        Args:
            parent: None: the system's folder for temporary files.
        Raises:
            OSError: no folder can be made there.
        """
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove the folder; the lock is held until nothing is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove folders of servers that no longer run; gives them."""
    return [path for path in sorted(parent.glob(f"{PREFIX}*")) if _remove_if_abandoned(path)]


def _remove_if_abandoned(path: Path) -> bool:
    try:
        state = path.lstat()
        if path.is_symlink() or not path.is_dir() or state.st_uid != os.getuid():
            return False  # whoever else may write to a folder for all made it
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False  # gone by now, or just being made: it has no lock file yet
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its server runs
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(lock)
