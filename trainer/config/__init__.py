"""The config of a run: schema, loader, origins. Loads no torch."""

from __future__ import annotations

from trainer.config.data_section import DataSection
from trainer.config.loader import (
    ConfigLoader,
    LoadedConfig,
    create_default_config,
    find_config_file,
    resolve,
)
from trainer.config.monitoring_section import MonitoringConfig
from trainer.config.schema import (
    EnvironmentSection,
    LockedSection,
    OutputSection,
    ProfileSection,
    TrainerConfig,
)
from trainer.config.training_sections import Hyperparams, LoraSection, ModelSection

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
