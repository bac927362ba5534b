"""`hyperparams.auto_batch_size`: the batch size that fits, found by trying the longest rows."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32

from trainer.config.schema import TrainerConfig
from trainer.core.checks import try_longest
from trainer.core.hf_trainer import SupervisedTrainer, smaller_batch_size
from trainer.core.preparation import epoch_order
from trainer.core.resume import ResumePoint
from trainer.core.run import Job, Prepared
from trainer.core.training import use_smaller_batches
from trainer.errors import ConfigError


def fit_batch_size(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> Prepared:
    """Lower the batch size of an assembled run until its longest rows fit into memory.

    The effective batch stays, so that the steps are those of the config as it was asked for.

    Returns:
        The run with the batch size that was found, which is on disk too.
    Raises:
        ConfigError: not even one row fits.
    """
    if not prepared.config.hyperparams.auto_batch_size:
        return prepared
    asked = trainer.args.per_device_train_batch_size
    effective = asked * trainer.args.gradient_accumulation_steps
    found = _largest_that_fits(trainer, asked, effective)
    if found == asked:
        return prepared
    config = with_batch_size(prepared.config, found, effective // found)
    smaller = dataclasses.replace(prepared, config=config)
    trainer.use_batch_size(found, epoch_order(config, prepared.data))
    use_smaller_batches(job, smaller, trainer)
    job.observers.notice(
        f"batch_size={asked} does not fit into the memory of {trainer.args.device}; going on with "
        f"batch_size={found} and gradient_accumulation={effective // found}, which make the same "
        "steps",
        "warning",
    )
    return smaller


def with_batch_size(config: TrainerConfig, batch_size: int, accumulation: int) -> TrainerConfig:
    """The config with its steps cut in another way."""
    values = {"batch_size": batch_size, "gradient_accumulation": accumulation}
    hyper = config.hyperparams.model_copy(update=values)
    return config.model_copy(update={"hyperparams": hyper})


def keep_found_batch_size(config: TrainerConfig, point: ResumePoint | None) -> TrainerConfig:
    """A resumed run begins with the batch size that it had found, where the steps are the same."""
    if point is None or not config.hyperparams.auto_batch_size:
        return config
    before, now = point.metadata["config"]["hyperparams"], config.hyperparams
    found, accumulation = before["batch_size"], before["gradient_accumulation"]
    is_same_step = found * accumulation == now.batch_size * now.gradient_accumulation
    if not is_same_step or found >= now.batch_size:
        return config
    return with_batch_size(config, found, accumulation)


def _largest_that_fits(trainer: SupervisedTrainer, asked: int, effective: int) -> int:
    size: int | None = asked
    problem = None
    with _as_in_training(trainer):
        while size is not None:
            problem = try_longest(trainer, trainer.model, size)
            if _all_processes(trainer, problem is None):
                return size
            gc.collect()
            if trainer.args.device.type == "cuda":
                torch.cuda.empty_cache()
            size = smaller_batch_size(size, effective)
    raise ConfigError(problem or "the longest row does not fit into the memory of another process")


def _all_processes(trainer: SupervisedTrainer, does_fit: bool) -> bool:
    """Whether it fits on all of them, which all of them are told."""
    if trainer.accelerator.num_processes == 1:
        return does_fit
    mine = torch.tensor([does_fit], dtype=torch.int32, device=trainer.args.device)
    return bool(trainer.accelerator.gather(mine).min())


@contextlib.contextmanager
def _as_in_training(trainer: SupervisedTrainer) -> Iterator[None]:
    """The model as HF's loop and accelerate make it, which is not to be made twice."""
    model, args = trainer.model, trainer.args
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=dict(args.activation_checkpointing_kwargs or {})
        )
    buckets: list[torch.Tensor] = []
    if trainer.accelerator.num_processes > 1:  # of DDP: a second copy of the gradients
        buckets = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
    own, plain = vars(model).get("forward"), model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        with trainer.accelerator.autocast():
            return plain(*inputs, **named)

    model.forward = convert_outputs_to_fp32(forward) if trainer.accelerator.native_amp else plain
    try:
        yield
    finally:
        buckets.clear()
        if own is None:
            del model.forward
        else:
            model.forward = own
