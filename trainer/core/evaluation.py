"""The loss on held-out rows, measured on the same rows each time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.config.schema import TrainerConfig
from trainer.core.checks import tiling_of
from trainer.core.loss import loss_share, supervised_loss
from trainer.core.run import Prepared
from trainer.core.sharding import dealt
from trainer.core.source_losses import SourceSums
from trainer.core.tiles import Tiling
from trainer.data.batches import EncodedDataset, on_device
from trainer.data.rows import IGNORE_INDEX
from trainer.data.source_shares import names_of
from trainer.monitoring.processes import num_processes
from trainer.preview.neutral import undisturbed

MEASUREMENTS = 10
"""So often the loss is measured in a run that is short, where nobody said how often."""

MAX_SHARE = 0.2
"""Of the time of training, at most, where it is measured more often than the default says."""

FORWARD_SHARE = 1 / 3
"""Of a training step, the part that a measurement makes for as many rows: no backward pass."""


def with_eval_interval(config: TrainerConfig, total: int, num_held_out: int) -> TrainerConfig:
    """A config whose `micro_eval_interval`, if nobody set it, suits the length of the run.

    The default, or what gives MEASUREMENTS in the run if that is shorter, but not so short that
    they would take more than MAX_SHARE of its time. With `num_score_prompts`, whose answers take
    far longer, it stays as it is.

    Args:
        total: optimizer steps of the run.
        num_held_out: rows by which the loss can be measured.
    """
    monitoring, hyper = config.monitoring, config.hyperparams
    is_set = "micro_eval_interval" in monitoring.model_fields_set
    if is_set or not num_held_out or monitoring.num_score_prompts:
        return config
    rows = min(num_held_out, monitoring.micro_eval_rows)
    rows_of_step = hyper.batch_size * hyper.gradient_accumulation * num_processes()
    cheapest = math.ceil(rows * FORWARD_SHARE / (MAX_SHARE * rows_of_step))
    interval = max(total // MEASUREMENTS, cheapest, 1)
    if interval >= monitoring.micro_eval_interval:
        return config
    changed = monitoring.model_copy(update={"micro_eval_interval": interval})
    return config.model_copy(update={"monitoring": changed})


Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
"""Rows in, one batch out."""


@dataclass(frozen=True)
class Evaluation:
    """A measured loss."""

    loss: float
    """Mean nats per supervised token over all rows, each token by its loss weight."""
    num_rows: int
    num_trained_tokens: int
    source_losses: dict[str, float] = field(default_factory=dict)
    """The same of the rows of each source, where there are several."""


class Evaluator:
    """Measures the loss of a model on the same rows each time."""

    def __init__(
        self,
        dataset: EncodedDataset,
        *,
        collate: Collate,
        max_rows: int,
        batch_size: int,
        autocast_dtype: torch.dtype | None,
        dtype: torch.dtype = torch.float32,
        is_shared: bool = False,
        source_names: Sequence[str] = (),
    ) -> None:
        """Choose the first `max_rows` rows, and batch rows of like length together.

        Args:
            source_names: of the sources that rows say they are of; none: rows do not say.
            is_shared: all processes call it at the same time, and each takes its share of the
                batches; the result is the same on all.
        """
        chosen = sorted(range(min(len(dataset), max_rows)), key=lambda i: dataset.lengths[i])
        self.dataset, self.collate = dataset, collate
        self.batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        self.autocast_dtype, self._dtype = autocast_dtype, dtype
        self._is_shared = is_shared
        self._source_names = source_names
        self._tiling: Tiling | None = None
        self._is_proved = False

    def __call__(self, model: Any) -> Evaluation:
        """Evaluate the unwrapped model; its mode and all random states are put back."""
        device = next(model.parameters()).device
        total = share = torch.zeros((), dtype=torch.float64)
        tokens = rows = 0
        by_source = SourceSums(self._source_names)
        with undisturbed(model), self._autocast(device):
            if not self._is_proved:
                self._tiling = tiling_of(model, self.dataset, self._dtype)
                self._is_proved = True
            for indices, is_mine in self._share_of_batches():
                batch = self.collate([self.dataset[i] for i in indices])
                found = self._sum(model, on_device(batch, device), by_source if is_mine else None)
                if is_mine:
                    tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                    rows += len(indices)
                    share = share + loss_share(batch)
                    total = total + found
        sums = torch.tensor([float(total), float(share), tokens, rows], dtype=torch.float64)
        sums = torch.cat([sums, by_source.take(sums.device, sums.dtype).flatten()])
        if self._is_shared:
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        summed, weight, num_tokens, num_rows, *of_sources = sums.tolist()
        return Evaluation(
            summed / (weight or 1.0), int(num_rows), int(num_tokens), by_source.means(of_sources)
        )

    def _share_of_batches(self) -> Iterator[tuple[list[int], bool]]:
        """Rows of each forward pass of this process, and whether its loss counts."""
        return dealt(self.batches) if self._is_shared else ((b, True) for b in self.batches)

    def _sum(
        self, model: Any, batch: dict[str, torch.Tensor], by_source: SourceSums | None
    ) -> torch.Tensor:
        found = supervised_loss(model, model, batch, 1, tiling=self._tiling, by_source=by_source)
        return found.double().cpu()

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def build_evaluator(prepared: Prepared, collate: Collate) -> Evaluator | None:
    """The micro-evaluation of a run; None where no rows are held out."""
    if prepared.data.validation is None:
        return None
    return Evaluator(
        prepared.data.validation,
        collate=collate,
        max_rows=prepared.config.monitoring.micro_eval_rows,
        batch_size=prepared.config.hyperparams.batch_size,
        autocast_dtype=prepared.precision.autocast_dtype,
        dtype=prepared.precision.compute_dtype,
        is_shared=prepared.is_sharded,
        source_names=names_of(prepared.data.validation_names),
    )
