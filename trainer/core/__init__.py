"""The engine: one run from config to final model. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.core.engine import TrainerEngine
    from trainer.core.loss import supervised_loss
    from trainer.core.run import TrainingResult

__all__ = ["TrainerEngine", "TrainingResult", "supervised_loss"]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.core.engine": ["TrainerEngine"],
        "trainer.core.loss": ["supervised_loss"],
        "trainer.core.run": ["TrainingResult"],
    },
)
