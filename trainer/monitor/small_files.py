"""Reading small JSON files that somebody else may have written: capped, no links or pipes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20


def read_regular_file(path: Path, most: int = MAX_BYTES) -> bytes | None:
    """The bytes of a regular file; None when there is none, it is a link, or it is too large."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            return None
        return os.read(descriptor, most)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None when there is none or it is something else."""
    data = read_regular_file(path)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
