"""The engine: one run from config to final model. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.core.engine import TrainerEngine
    from trainer.core.run import TrainingResult

_HOMES = {"TrainerEngine": "engine", "TrainingResult": "run"}

__all__ = ["TrainerEngine", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
