"""Values that depend on other values, filled in one visible place."""

from __future__ import annotations

from trainer.config.schema import TrainerConfig
from trainer.errors import ConfigError

UNTRAINED_MODEL = "tiny"
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
UNTRAINED_LEARNING_RATE = 5e-3
"""The built-in model starts from random weights and must move much further."""


def resolve(config: TrainerConfig) -> TrainerConfig:
    """Fill `hyperparams.learning_rate` where it is empty; doing it twice changes nothing.

    `hyperparams.max_length` stays as it is: it depends on the model, which is not read here.
    """
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
