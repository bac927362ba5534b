"""What can be wrong with a config and is seen without torch, which takes seconds to load."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config.loader import required_for_training, resolve
from trainer.config.schema import TrainerConfig
from trainer.core.run_folder import RunFolder
from trainer.data.sources import check_files
from trainer.errors import ConfigError
from trainer.models import check_path
from trainer.monitoring.notify import check_notify
from trainer.monitoring.tracking import check_tracker_names
from trainer.preview.canary_set import read_canary_set
from trainer.profiles import get_profile
from trainer.scores.figures import GOLDEN_PROBABILITY, SCORE
from trainer.scores.spec import parse_scores

GOLDEN_PROMPTS = 16
"""Up to so many prompts have their golden answers scored without being asked."""


def check_early(config: TrainerConfig) -> TrainerConfig:
    """Refuse what cannot be trained, as far as files and names tell it.

    Returns:
        The config with derived values filled.
    Raises:
        ConfigError: an option is missing or cannot take effect.
        DataError: a file of rows is not there.
        ModelError: the folder of the model is not there.
        ProfileError: there is no such profile, or it has no such option.
    """
    required_for_training(config)
    check_tracker_names(config.monitoring.report_to)
    parse_scores(config.monitoring.scores)
    check_deciding(config)
    check_notify(config.monitoring.notify)
    get_profile(config.profile.name, dict(config.profile.options))
    config = resolve(config)
    is_resumed = config.output.resume is not None
    check_files(config.data, config.environment.offline, is_resumed=is_resumed)
    read_canary_set(config.monitoring.canary_set)
    if not is_resumed:  # a run that is resumed may have a copy of its base
        check_path(config.model.model_path)
    return config


def check_folder_early(config: TrainerConfig) -> None:
    """Refuse an --output that holds another run, or nothing to resume; the main process does.

    Raises:
        OutputError, ResumeError: as `RunFolder.create`.
    """
    if os.environ.get("RANK", "0") == "0":
        RunFolder.check(
            Path(config.output.output_dir).expanduser(), resume=config.output.resume is not None
        )


def measures_golden(config: TrainerConfig, num_prompts: int) -> bool:
    """Whether golden answers are scored (monitoring.preview_golden_logprobs).

    `auto`: where something is decided by them, and for as few prompts as cost next to nothing.

    Args:
        num_prompts: how many are asked at once.
    """
    wanted = config.monitoring.preview_golden_logprobs
    if wanted == "auto":
        decides = SCORE + GOLDEN_PROBABILITY in config.deciding_scores
        return decides or num_prompts <= GOLDEN_PROMPTS
    return wanted == "on"


def check_deciding(config: TrainerConfig) -> None:
    """Refuse scores that decide and are not computed.

    Raises:
        ConfigError: says which there are, or what to set.
    """
    specs = {SCORE + one.name for one in parse_scores(config.monitoring.scores)}
    known = [*sorted(specs), SCORE + GOLDEN_PROBABILITY]
    for metric in config.deciding_scores:
        where = option_of(config, metric)
        if metric not in known:
            raise ConfigError(
                f"{where}={metric} names no score of this run; there are {', '.join(known)}. Add "
                "it to monitoring.scores, or name one of these."
            )
        is_golden = metric == SCORE + GOLDEN_PROBABILITY
        if is_golden and metric in specs:
            raise ConfigError(
                f"{where}={metric} names two things: the probability of the golden answers, and a "
                "score of monitoring.scores; write the score as ANOTHER_NAME=SCORE there."
            )
        if is_golden and config.monitoring.preview_golden_logprobs == "off":
            raise ConfigError(
                f"{where}={metric} needs the golden answers' probabilities, and "
                "monitoring.preview_golden_logprobs=off; leave it out."
            )


def option_of(config: TrainerConfig, metric: str) -> str:
    """The option by which this metric decides."""
    is_early = config.hyperparams.early_stopping_metric == metric
    return "hyperparams.early_stopping_metric" if is_early else "output.best_by"
