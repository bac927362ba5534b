"""stand-in"""

from trainer.config.schema import TrainerConfig
from trainer.errors import ConfigError


def resolve(config: TrainerConfig) -> TrainerConfig:
    h = config.hyperparams
    if h.learning_rate is not None:
        return config
    lr = 5e-3 if config.model.model_path == "tiny" else 2e-5 if h.training_mode == "full" else 2e-4
    return config.model_copy(update={"hyperparams": h.model_copy(update={"learning_rate": lr})})


def required_for_training(config: TrainerConfig) -> None:
    if not config.model.model_path:
        raise ConfigError("model.model_path is empty: --model")
    if not config.data.dataset_path:
        raise ConfigError("data.dataset_path is empty: --dataset")
