"""UltimateTrainer: the classic object of `core/train.py`, each method a line to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.commands.train import load_config
from trainer.config import TrainerConfig
from trainer.config.flags import parse_flags
from trainer.core.engine import TrainerEngine
from trainer.core.run import TrainingResult
from trainer.views.terminal import create_display


class UltimateTrainer:
    """Runs a job in steps: load_model, prepare_dataset, setup_training, setup_live_monitor, run.

    `run` does whatever was not done before, so that calling it alone is enough.
    """

    def __init__(self, args: Sequence[str] | Any) -> None:
        """Take command-line words, or an object with their names as attributes.

        Args:
            args: `["--dataset", "data.jsonl", ...]`, a TrainerConfig, or an argparse.Namespace
                whose attributes are short flags (dataset, model, output, batch_size, ...).
        """
        self.config = (
            args
            if isinstance(args, TrainerConfig)
            else load_config(parse_flags(_words(args), prog="core/train.py")).config
        )
        self.engine = TrainerEngine(observers=[create_display(self.config.monitoring.display)])

    def load_model(self) -> Any:
        """Model and tokenizer, on the CPU."""
        return self.engine.load_model(self.config)

    def prepare_dataset(self) -> Any:
        """Encoded rows and their data card."""
        return self.engine.prepare_dataset(self.config)

    def setup_live_monitor(self) -> list[Any]:
        """The callbacks that write status and make previews."""
        return self.engine.build_callbacks(self.config)

    def setup_training(self) -> Any:
        """The Trainer, ready to run."""
        return self.engine.create_trainer(self.config)

    def run(self) -> TrainingResult:
        """Train, save, and return how it ended; never raises."""
        return self.engine.run_job(self.config)


def _words(args: Any) -> list[str]:
    """Attributes of a namespace as flags; None and False are left out."""
    if isinstance(args, Sequence):
        return [str(word) for word in args]
    words: list[str] = []
    for name, value in vars(args).items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words
