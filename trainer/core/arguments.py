"""TrainerConfig -> transformers.TrainingArguments: the one place where names are translated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from trainer.config.schema import TrainerConfig
from trainer.models.precision import ResolvedPrecision

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
