"""Values that depend on other values, filled in one visible place."""

from __future__ import annotations

import os

from trainer.config.schema import TrainerConfig
from trainer.errors import ConfigError

UNTRAINED_MODEL = "tiny"
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
UNTRAINED_LEARNING_RATE = 5e-3
"""The built-in model starts from random weights and must move much further."""


def resolve(config: TrainerConfig) -> TrainerConfig:
    """Fill what depends on other values; doing it twice changes nothing.

    `hyperparams.learning_rate` where it is empty, `~` in `output.output_dir`, and
    `data.group_by_length`, which is off where `data.shuffle` is. `hyperparams.max_length` stays
    as it is: it depends on the model, which is not read here.
    """
    if config.data.group_by_length and not config.data.shuffle:
        data = config.data.model_copy(update={"group_by_length": False})
        config = config.model_copy(update={"data": data})
    folder = os.path.expanduser(config.output.output_dir)
    if folder != config.output.output_dir:
        output = config.output.model_copy(update={"output_dir": folder})
        config = config.model_copy(update={"output": output})
    hyper = config.hyperparams
    if hyper.learning_rate is not None:
        return config
    rate = LEARNING_RATES[hyper.training_mode]
    if config.model.model_path.lower() == UNTRAINED_MODEL and hyper.training_mode == "full":
        rate = UNTRAINED_LEARNING_RATE
    return config.model_copy(
        update={"hyperparams": hyper.model_copy(update={"learning_rate": rate})}
    )


def required_for_training(config: TrainerConfig) -> None:
    """Refuse a config without model or rows.

    Raises:
        ConfigError: model_path or dataset_path is empty; both are named if both are.
    """
    missing = []
    if not config.data.dataset_path:
        missing.append("data.dataset_path is empty; give a JSONL file with --dataset")
    if not config.model.model_path:
        missing.append(
            "model.model_path is empty; give an alias (`trainer models`), a hub id or a folder "
            "with --model"
        )
    if missing:
        raise ConfigError("; ".join(missing) + ".")
