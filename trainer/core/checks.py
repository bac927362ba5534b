"""Checks at the start: the loss is the model's own, and the longest batch fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from trainer.core.hf_trainer import SupervisedTrainer, is_out_of_memory
from trainer.core.loss import (
    compare_with_own_loss,
    full_loss,
    prove_tiling,
    supervised_loss,
)
from trainer.core.optim import state_placeholders
from trainer.core.tiles import Tiling
from trainer.counts import counted
from trainer.data.batches import LOSS_WEIGHTS, EncodedDataset, PadCollator, on_device
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError
from trainer.preview.neutral import rng_preserved, undisturbed

NUM_SUPERVISED = 256
"""Tokens whose loss is compared, at most: the model's own loss makes logits of every position."""

NUM_ROWS_SEEN = 100


def choose_loss(
    trainer: SupervisedTrainer,
    rows: EncodedDataset,
    *,
    dtype: torch.dtype,
    notice: Callable[..., None],
) -> None:
    """Our loss where it is the model's own on a part of one row, else that; without a trace.

    Args:
        rows: the training rows, not packed.
        dtype: in which the model computes.
        notice: told (text, level) where they differ.
    Raises:
        ConfigError: they differ, and the rows weigh their answers, which an own loss cannot.
    """
    row = telling_part(rows)
    batch = on_device(PadCollator(0)([row]), trainer.args.device)
    with undisturbed(trainer.model), trainer.accelerator.autocast():
        check = compare_with_own_loss(trainer.model, batch, dtype)
    trainer.use_own_forward, trainer.router = not check.is_equal, check.router
    if check.is_equal:
        return
    words = (
        f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
        f"{check.own:.6f}: this model adds something of its own"
    )
    if LOSS_WEIGHTS in row:
        raise ConfigError(
            f"{words}, and the rows have loss weights, which its own loss does not support; remove "
            "the weights from the rows (or use only 0 and 1), or turn off the extra loss in the "
            "model's config.json."
        )
    notice(
        f"{words}, so its own forward is used (slower; what it adds counts once a forward pass, so "
        "that gradient_accumulation multiplies it)",
        "warning",
    )


def tiling_of(model: Any, rows: EncodedDataset, dtype: torch.dtype) -> Tiling | None:
    """`prove_tiling` on a part of one row; the caller sets eval, autocast and no_grad."""
    batch = PadCollator(0)([telling_part(rows)])
    return prove_tiling(model, on_device(batch, next(model.parameters()).device), dtype)


def telling_part(rows: EncodedDataset) -> dict[str, Any]:
    """The stretch of at most 257 tokens with the most supervised ones, of the first 100 rows."""
    best: tuple[int, int, int] = (0, 0, 0)  # supervised tokens, row, first token
    for index in range(min(len(rows), NUM_ROWS_SEEN)):
        # A stretch's first token is predicted by none, so that its label does not count.
        trained = (rows[index]["labels"][1:] != IGNORE_INDEX).long()
        before = torch.cat([torch.zeros(1, dtype=torch.int64), trained.cumsum(0)])
        ends = torch.arange(len(before)).add(NUM_SUPERVISED).clamp(max=len(before) - 1)
        counts = before[ends] - before
        start = int(counts.argmax())
        if int(counts[start]) > best[0]:
            best = (int(counts[start]), index, start)
        if best[0] == NUM_SUPERVISED:
            break
    _, index, start = best
    return {key: value[start : start + NUM_SUPERVISED + 1] for key, value in rows[index].items()}


def has_unused_parameters(trainer: SupervisedTrainer, rows: EncodedDataset) -> bool:
    """Whether a pass over text leaves parameters that are trained without a gradient.

    Such as those for images; where experts are chosen by the text it is taken to be so. DDP waits
    for the gradients of all others, or must look for these in every step.
    """
    if _chooses_parts(trainer.model.config):
        return True
    model, was_training = trainer.model, trainer.model.training
    batch = trainer._prepare_inputs(PadCollator(0)([telling_part(rows)]))
    try:
        with untraced(model):
            model.train()
            with trainer.accelerator.autocast():  # which the model does itself once it is wrapped
                loss = training_loss(trainer, model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        return any(one.requires_grad and one.grad is None for one in model.parameters())
    except RuntimeError as error:
        if not is_out_of_memory(error):  # which is told where the longest rows are tried
            raise
        return True
    finally:
        model.zero_grad()
        model.train(was_training)


def _chooses_parts(config: Any) -> bool:
    """Whether a model leaves out experts or layers, each time others."""
    values = config.get_text_config().to_dict()
    experts = [value for key, value in values.items() if "expert" in key]
    if any(isinstance(one, int) and not isinstance(one, bool) and one > 1 for one in experts):
        return True
    return any(value for key, value in values.items() if "layerdrop" in key)


def forget_peak_memory(device: torch.device) -> None:
    """Memory that only the checks at start took is not what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# ---- the longest batch before the first step, so that running out of memory shows at the start
#
# It is a probe only: its gradients are thrown away, and random state and buffers are put back, so
# that the steps are those of a run without it.


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

    Raises:
        ConfigError: they do not fit into memory.
    """
    problem = try_longest(trainer, trainer.model_wrapped, trainer.args.per_device_train_batch_size)
    if problem is not None:
        raise ConfigError(problem)


def try_longest(trainer: SupervisedTrainer, model: Any, count: int) -> str | None:
    """A pass over the `count` longest rows, which leaves nothing behind.

    Room for the optimizer's state is held meanwhile, where it has none yet.

    Args:
        model: in train mode from here on.
    Returns:
        None where they fit, else the message that says so: not the error, whose traceback would
        keep what the pass has made.
    """
    rows = trainer.order.longest_rows(count)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    problem = None
    try:
        with untraced(model):
            _pass_over(trainer, model, batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        problem = _refusal(trainer, rows, error)
        model.zero_grad()  # of a backward pass that was cut short
    forget_peak_memory(trainer.args.device)
    return problem


def _refusal(trainer: SupervisedTrainer, rows: list[int], error: RuntimeError) -> str:
    length = len(trainer.train_dataset[rows[0]]["input_ids"])
    return (
        f"the longest batch ({len(rows)} x {counted(length, 'token')}) does not fit into the "
        f"memory of {trainer.args.device} ({' '.join(str(error).split())[:160]}); lower "
        "hyperparams.batch_size (and raise gradient_accumulation as much; auto_batch_size=true "
        "does both), lower max_length, or set gradient_checkpointing=true."
    )


@contextlib.contextmanager
def untraced(model: Any) -> Iterator[None]:
    """Put random states and buffers back as they were, however the block ends."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with rng_preserved():
            yield
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)


def _pass_over(trainer: SupervisedTrainer, model: Any, batch: dict[str, Any]) -> None:
    model.train()
    room = state_placeholders(trainer.optimizer)
    trainer.accelerator.backward(training_loss(trainer, model, trainer._prepare_inputs(batch)))
    model.zero_grad()
    del room  # held until here


def training_loss(trainer: SupervisedTrainer, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of one batch, made as training makes it, with nothing noted of it."""
    with trainer.compute_loss_context_manager():
        if trainer.use_own_forward:
            return full_loss(model, batch)
        unwrapped = trainer.accelerator.unwrap_model(model)
        return supervised_loss(
            model, unwrapped, batch, tiling=trainer.tiling, router=trainer.router
        )
