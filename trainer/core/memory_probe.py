"""The longest batch before the first step, so that running out of memory shows at the start.

It is a probe only: its gradients are thrown away, and random state and buffers are put back, so
that the steps are those of a run without it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import full_loss, supervised_loss
from trainer.core.loss_check import forget_peak_memory
from trainer.core.optim import state_placeholders
from trainer.errors import ConfigError
from trainer.preview.neutral import rng_preserved

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


class MemoryProbe(TrainerCallback):  # type: ignore[misc]
    """Acts once, when model and optimizer are ready; also in a run that is resumed."""

    def __init__(self) -> None:
        """Wait for `trainer` to be set."""
        self.trainer: SupervisedTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe, unless an epoch is a single step, which then holds the longest row anyway."""
        assert self.trainer is not None, "set by assemble_trainer"
        if self.trainer.order.steps_per_epoch > 1:
            probe(self.trainer)


def probe(trainer: SupervisedTrainer) -> None:
    """One forward and backward pass over as many of the longest rows as a device takes at once.

    Room for the optimizer's state is held meanwhile, where it has none yet.

    Raises:
        ConfigError: they do not fit into memory.
    """
    rows = trainer.order.longest_rows(trainer.args.per_device_train_batch_size)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    model = trainer.model_wrapped
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with rng_preserved():
            _pass_over(trainer, model, batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not _is_out_of_memory(error):
            raise
        count, length = batch["input_ids"].shape
        raise ConfigError(
            f"the longest batch ({count} x {length} tokens) does not fit into the memory of "
            f"{trainer.args.device} ({' '.join(str(error).split())[:160]}); lower "
            "hyperparams.batch_size (and raise gradient_accumulation as much), lower max_length, "
            "or set gradient_checkpointing=true."
        ) from error
    for buffer, before in buffers:
        buffer.data.copy_(before)
    forget_peak_memory(trainer.args.device)


def _pass_over(trainer: SupervisedTrainer, model: Any, batch: dict[str, Any]) -> None:
    model.train()
    room = state_placeholders(trainer.optimizer)
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        if trainer.use_own_forward:
            loss = full_loss(model, inputs)
        else:
            loss = supervised_loss(model, trainer.accelerator.unwrap_model(model), inputs)
    trainer.accelerator.backward(loss)
    model.zero_grad()
    del room  # held until here


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)
