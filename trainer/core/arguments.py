"""TrainerConfig -> transformers.TrainingArguments, and the learning rate of every step."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from trainer.config.schema import Hyperparams, TrainerConfig
from trainer.errors import ConfigError
from trainer.models.precision import ResolvedPrecision

# ---- the learning rate of every step: a closed form of the step and the length of the run alone
#
#     step   = optimizer steps done before this one: 0 ... total - 1
#     warm-up (step < warmup):  peak * (step + 1) / (warmup + 1)
#     then, with share = (step - warmup) / (total - warmup):
#         linear    peak * (1 - share)
#         cosine    peak * (1 + cos(pi * share)) / 2
#         constant  peak
#
# So the first step has a positive rate, step `warmup` the peak, and the last one is above 0 too: 0
# is where the step after it would be.


def warmup_length(warmup_steps: float, total: int) -> int:
    """Steps before the one at the peak rate.

    Args:
        warmup_steps: a whole number, or below 1 a share of all steps, rounded up; a share leaves
            at least one step at the peak, also in a run of one step.
        total: steps of the whole run.
    """
    if warmup_steps >= 1:
        return int(warmup_steps)
    return min(math.ceil(warmup_steps * total), total - 1)


def rate_factor(name: str, step: int, *, warmup: int, total: int) -> float:
    """The share of the peak rate, 0 to 1, at which the step after `step` others is made.

    Args:
        name: `linear`, `cosine` or `constant`.
        step: optimizer steps done; from `total` on what the curve ends in.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    if name == "linear":
        return 1 - share
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    assert name == "constant", name
    return 1.0


class RateSchedule(LambdaLR):
    """Sets the rate of every parameter group; a resume takes back its position only.

    Torch's own keeps the rate it had computed last, so the first step of a run that is made longer
    would be at the rate of the shorter one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hyperparams: Hyperparams, total: int):
        """Begin before the first step.

        Args:
            optimizer: each group's own `lr` is its peak.
            hyperparams: lr_scheduler and warmup_steps.
            total: steps of the whole run.
        """
        warmup = warmup_length(hyperparams.warmup_steps, total)
        name = hyperparams.lr_scheduler
        super().__init__(
            optimizer, lambda step: rate_factor(name, step, warmup=warmup, total=total)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint, at this run's own rates.

        Call it after the optimizer's, which brings the rates of the checkpoint along.
        """
        super().load_state_dict(state_dict)
        rates = [
            peak * factor(self.last_epoch)
            for peak, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def check_schedule(hyperparams: Hyperparams, total: int, *, start: int = 0) -> None:
    """Refuse a run whose steps could not move a weight.

    Args:
        hyperparams: with learning_rate filled in.
        total: steps of the whole run.
        start: steps that are done already.
    Raises:
        ConfigError: the warm-up is as long as the run, or every rate that is left is 0.
    """
    if hyperparams.warmup_steps >= total:
        raise ConfigError(
            f"hyperparams.warmup_steps={hyperparams.warmup_steps:g} is not below the {total} steps "
            "that these rows and epochs make; lower it or train longer."
        )
    peak = hyperparams.learning_rate or 0.0
    warmup = warmup_length(hyperparams.warmup_steps, total)
    left = range(start, total)
    name = hyperparams.lr_scheduler
    if left and not any(peak * rate_factor(name, n, warmup=warmup, total=total) for n in left):
        raise ConfigError(
            f"hyperparams.learning_rate={peak:g} makes every rate of steps {start + 1} to {total} "
            "0, so that no weight would move; raise it."
        )


# ---- TrainerConfig -> transformers.TrainingArguments: the one place where names are translated


OWN_TRACKERS = {"tensorboard", "none"}
"""Not for HF to start: TensorBoard's callback is ours, with previews in the same file."""

# The rates are made by schedule.py; these names and the warm-up are what trackers show of them.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def build_training_arguments(
    config: TrainerConfig, *, precision: ResolvedPrecision, device: torch.device, run_dir: Path
) -> TrainingArguments:
    """Translate a resolved config; saving, evaluation and logging of HF's own are off.

    Args:
        config: with learning_rate filled in (`resolve`).
        precision: decides the bf16 and fp16 flags.
        device: of this process.
        run_dir: HF's output_dir; HF writes nothing into it.
    """
    hyper = config.hyperparams
    if device.type == "cuda" and device.index:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # accelerate takes cuda:0 otherwise
    options: dict[str, Any] = {}
    if hyper.gradient_checkpointing:
        options["activation_checkpointing"] = True
        options["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    if device.type == "cpu":
        options["use_cpu"] = True
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            options["ddp_backend"] = "gloo"
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=hyper.batch_size,
        gradient_accumulation_steps=hyper.gradient_accumulation,
        num_train_epochs=hyper.num_epochs,
        max_steps=hyper.max_steps or -1,
        learning_rate=hyper.learning_rate,
        lr_scheduler_type=SCHEDULERS[hyper.lr_scheduler],
        warmup_steps=hyper.warmup_steps,
        weight_decay=hyper.weight_decay,
        adam_beta1=hyper.adam_beta1,
        adam_beta2=hyper.adam_beta2,
        adam_epsilon=hyper.adam_epsilon,
        max_grad_norm=hyper.max_grad_norm,
        bf16=precision.use_bf16,
        fp16=precision.use_fp16,
        seed=config.environment.seed,
        data_seed=config.environment.seed,
        dataloader_num_workers=config.environment.num_workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=config.monitoring.status_update_interval,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it hides NaN losses in the log
        report_to=[name for name in config.monitoring.report_to if name not in OWN_TRACKERS],
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        log_level="error",
        **options,
    )
    if arguments.n_gpu > 1:
        # HF would wrap the model in DataParallel, which copies it at every step and goes round
        # our hook; several GPUs are used through torchrun, one process each.
        arguments._n_gpu = 1
    return arguments
