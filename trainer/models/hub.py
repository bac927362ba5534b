"""Whether the model hub may be asked, and the one switch that all its clients obey.

`local_files_only` alone is not enough: PEFT and `datasets` ask the hub on ways of their own, and
each of them tries for a minute where there is no network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
VARIABLE = "HF_HUB_OFFLINE"


def hub_is_offline() -> bool:
    """True when the user's environment forbids asking the model hub."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in (VARIABLE, "TRANSFORMERS_OFFLINE")
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
    os.environ[VARIABLE] = "1"
    _set_flags(True)


@contextlib.contextmanager
def hub_setting_kept() -> Iterator[None]:
    """Undo `go_offline` at the end of a block, for programs that run more than one job."""
    before = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        if before is None and os.environ.pop(VARIABLE, None) is not None:
            _set_flags(hub_is_offline())


def _set_flags(is_offline: bool) -> None:
    """The libraries read the variable once, when they are imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = is_offline
    config = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = is_offline  # type: ignore[attr-defined]
        config.HF_DATASETS_OFFLINE = is_offline  # type: ignore[attr-defined]
