"""`--dry-run`: what a run would train on and need, before any weights are loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.context import RunContext
from trainer.core.estimate import MemoryEstimate, estimate_memory
from trainer.core.manifest import resolved_config
from trainer.core.preparation import num_steps
from trainer.data.dataset import RunData
from trainer.models.load import read_model_config
from trainer.models.precision import ResolvedPrecision


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` found."""

    config: TrainerConfig
    data: RunData
    precision: ResolvedPrecision
    memory: MemoryEstimate
    num_steps: int

    def as_json(self) -> dict[str, Any]:
        """The figures as plain JSON values, sizes in bytes."""
        return {
            "precision": self.precision.reason,
            "num_steps": self.num_steps,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "data_card": self.data.card.as_json(),
        }


def finish_dry_run(run: RunContext) -> DryRun:
    """The sums of a run whose rows are prepared; writes config.resolved.json.

    The file of a run that is to be resumed stays as it is.
    """
    config = run.config
    estimate = estimate_memory(
        config,
        read_model_config(config.model, offline=config.environment.offline),
        run.precision,
        longest_row=max(run.data.train.lengths),
    )
    if run.folder is not None and run.resume is None:
        run.folder.write_json(run.folder.config_resolved, resolved_config(config))
    return DryRun(config, run.data, run.precision, estimate, num_steps(config, run.data))
