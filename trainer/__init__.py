"""ultimate-trainer: fine-tune a language model while watching what it says.

Public names are loaded when they are first used, so that `import trainer.config` needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import ConfigLoader, TrainerConfig, create_default_config
    from trainer.core import TrainerEngine, TrainingResult
    from trainer.job import run_job
    from trainer.profiles import get_profile

__version__ = "0.1.0"

__all__ = [
    "ConfigLoader",
    "TrainerConfig",
    "TrainerEngine",
    "TrainingResult",
    "__version__",
    "create_default_config",
    "get_profile",
    "run_job",
]


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make a package's `__getattr__`, which imports a public name when it is first used.

    Args:
        package: the package's `__name__`.
        homes: module -> the public names that it defines.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load


__getattr__ = lazy_names(
    __name__,
    {
        "trainer.config": ["ConfigLoader", "TrainerConfig", "create_default_config"],
        "trainer.core": ["TrainerEngine", "TrainingResult"],
        "trainer.job": ["run_job"],
        "trainer.profiles": ["get_profile"],
    },
)
