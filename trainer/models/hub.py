"""Names of models: short ones for what people fine-tune at home, and the hub. No torch here."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# ---- whether the model hub may be asked, and the one switch that all its clients obey
#
# `local_files_only` alone is not enough: PEFT and `datasets` ask the hub on ways of their own, and
# each of them tries for a minute where there is no network.


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


def hub_setting() -> Callable[[], None]:
    """A function that undoes `go_offline`, for programs that run more than one job."""
    before = os.environ.get(VARIABLE)

    def put_back() -> None:
        if os.environ.get(VARIABLE) == before:
            return
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        _set_flags(hub_is_offline())

    return put_back


def _set_flags(is_offline: bool) -> None:
    """The libraries read the variable once, when they are imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = is_offline
    config = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = is_offline  # type: ignore[attr-defined]
        config.HF_DATASETS_OFFLINE = is_offline  # type: ignore[attr-defined]


# ---- short names for models that people fine-tune at home. No torch here


@dataclass(frozen=True)
class Alias:
    """A short name and what it stands for."""

    path: str
    """Hub id; `tiny` is built in."""
    size: str
    note: str


TINY = "tiny"

ALIASES: dict[str, Alias] = {
    TINY: Alias("tiny", "0.8M", "built in, untrained; for trying things without a download"),
    "qwen3": Alias("Qwen/Qwen3-0.6B", "0.6B", "the usual first choice for one GPU"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "0.6B", ""),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B", "1.7B", ""),
    "qwen3-4b": Alias("Qwen/Qwen3-4B", "4B", "lora on 24 GB"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B", "8B", "lora on 24 GB with short rows"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B-Instruct", "0.5B", ""),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B-Instruct", "1.5B", ""),
}


def resolve_alias(name: str) -> str:
    """The hub id or path that `name` stands for; a name that is no alias stands for itself."""
    alias = ALIASES.get(name.lower())
    return alias.path if alias else os.path.expanduser(name)


def nearest_alias(name: str) -> str | None:
    """The alias that `name` was probably meant to be."""
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    return near[0] if near else None


ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()
