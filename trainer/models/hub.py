"""Whether the model hub may be asked, and seeing to it that it is not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def hub_is_offline() -> bool:
    """True when the user's environment forbids asking the model hub."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


@contextlib.contextmanager
def asking_hub(*, is_allowed: bool) -> Iterator[None]:
    """Within the block the hub's client sends nothing, unless it is allowed to.

    `local_files_only` is not enough: the client looks up a list of its own meanwhile.
    """
    # Takes half a second to load.
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
