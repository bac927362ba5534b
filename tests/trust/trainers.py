"""The real Trainer, order, collators and arguments on rows of token ids, without files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import PrinterCallback

from tests.trust.reference import AnyRows, weights
from trainer.config import create_default_config
from trainer.config.loader import resolve
from trainer.core.hf_trainer import SupervisedTrainer, build_training_arguments
from trainer.core.proofs import TrainingCollator, pack_collator, takes_borders
from trainer.core.source_losses import SourceSums
from trainer.data.batches import EncodedDataset, EpochOrder, PackedDataset, PadCollator
from trainer.data.mixed_order import MixedOrder
from trainer.data.rows import Example
from trainer.models.precision import resolve_precision

CPU = torch.device("cpu")


def dataset(rows: AnyRows) -> EncodedDataset:
    """Rows of ids and labels, and loss weights where a row has a third part."""
    return EncodedDataset(
        [
            Example(ids, labels, "", "", 0, False, True, weights=rest[0] if rest else None)
            for ids, labels, *rest in rows
        ]
    )


def sgd(model: Any) -> torch.optim.Optimizer:
    """Rate 1: AdamW would hide errors of scale, smaller rates drown in rounding."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


def make_trainer(
    model: Any,
    rows: AnyRows,
    *,
    batch_size: int,
    accumulation: int = 1,
    num_epochs: float = 1,
    world: int = 1,
    capacity: int | None = None,
    mix: tuple[float, ...] = (),
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    folder: Path | None = None,
    distributed: dict[str, Any] | None = None,
    **hyper: Any,
) -> SupervisedTrainer:
    """A trainer over `rows`, shuffled, not clipped, at a constant rate; packed up to `capacity`.

    With `mix` the rows are of as many sources in turn, and each epoch has these shares of them.
    """
    data = dataset(rows)
    if mix:
        data = data.of_sources(np.arange(len(data)) % len(mix), is_mixed=True)
    packed = PackedDataset(data, capacity) if capacity is not None else None
    folder = folder or Path(tempfile.gettempdir())
    config = create_default_config(
        model_path="tiny",
        dataset_path="rows",
        output_dir=str(folder),
        hyperparams={
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "num_epochs": num_epochs,
            "max_grad_norm": 0.0,
            "warmup_steps": 0,
            "lr_scheduler": "constant",
            "fp_precision": "fp32",
            **hyper,
        },
        monitoring={"report_to": ()},
        distributed=distributed or {},
    )
    used = packed or data
    options = {
        "group_size": batch_size * accumulation * world,
        "seed": config.environment.seed,
        "group_by_length": False,
        "multiple_of": batch_size * world if world > 1 else 1,
    }
    order = EpochOrder(used.lengths, **options)
    if used.sources is not None:
        order = MixedOrder(used.lengths, used.sources, mix, ends_with="longest", **options)
    is_joined = packed is not None or takes_borders(model)
    trainer = SupervisedTrainer(
        model=model,
        args=build_training_arguments(
            resolve(config),
            precision=resolve_precision("fp32", "full", CPU),
            device=CPU,
            run_dir=folder,
        ),
        train_dataset=used,
        data_collator=TrainingCollator(pack_collator(model, 0) if is_joined else PadCollator(0)),
        optimizers=(optimizer(model), None),
        order=order,
        save_checkpoint=lambda step, write, share: None,
        run_state=dict,
    )
    trainer.by_source = SourceSums([f"s{n}" for n in range(len(mix))]) if mix else None
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained_change(model: Any, rows: AnyRows, **options: Any) -> torch.Tensor:
    """By how much the real training loop moves the weights of `model`."""
    before = weights(model)
    make_trainer(model, rows, **options).train()
    return weights(model) - before
