"""ultimate-trainer: fine-tune a language model while watching what it says.

Public names are loaded when they are first used, so that `import trainer.config` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import ConfigLoader, TrainerConfig, create_default_config
    from trainer.core import TrainerEngine, TrainingResult
    from trainer.profiles import get_profile

__version__ = "0.1.0"

_HOMES = {
    "ConfigLoader": "trainer.config",
    "TrainerConfig": "trainer.config",
    "create_default_config": "trainer.config",
    "TrainerEngine": "trainer.core",
    "TrainingResult": "trainer.core",
    "get_profile": "trainer.profiles",
}

__all__ = [
    "ConfigLoader",
    "TrainerConfig",
    "TrainerEngine",
    "TrainingResult",
    "__version__",
    "create_default_config",
    "get_profile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
