"""The config of a run: schema, loader, origins. Loads no torch."""

from __future__ import annotations

from trainer.config.loader import (
    ConfigLoader,
    LoadedConfig,
    create_default_config,
    find_config_file,
    resolve,
)
from trainer.config.schema import (
    DataSection,
    EnvironmentSection,
    Hyperparams,
    LockedSection,
    LoraSection,
    ModelSection,
    MonitoringConfig,
    OutputSection,
    ProfileSection,
    TrainerConfig,
)

__all__ = [
    "ConfigLoader",
    "DataSection",
    "EnvironmentSection",
    "Hyperparams",
    "LoadedConfig",
    "LockedSection",
    "LoraSection",
    "ModelSection",
    "MonitoringConfig",
    "OutputSection",
    "ProfileSection",
    "TrainerConfig",
    "create_default_config",
    "find_config_file",
    "resolve",
]
