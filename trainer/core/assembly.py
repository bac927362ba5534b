"""What a run is put together from once its model is there: evaluation, callbacks, HF's Trainer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer.config.schema import TrainerConfig
from trainer.core.arguments import RateSchedule
from trainer.core.checkpoint import save_checkpoint
from trainer.core.checks import (
    MemoryProbe,
    check_documents_apart,
    forget_peak_memory,
    is_loss_equal,
    pack_collator,
    takes_borders,
)
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import loss_share, supervised_loss
from trainer.core.optim import build_optimizer
from trainer.core.preparation import epoch_order, num_steps
from trainer.core.previews import build_scheduler
from trainer.core.resume import SEMANTICS, package_versions
from trainer.core.run import RunContext, is_main_process
from trainer.data.batches import EncodedDataset, PackedDataset, PadCollator, on_device
from trainer.data.dataset import RunData
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError
from trainer.files import CHECKPOINTS_NAME, checkpoint_steps
from trainer.models.load import embedding_rows, harmless_pad_id
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback
from trainer.monitoring.control import ControlFile
from trainer.monitoring.events import CheckpointSaved
from trainer.monitoring.tracking import guard_trackers, tensorboard_callback
from trainer.preview.neutral import undisturbed
from trainer.publish.lane import PublishedPreviews

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
"""Rows in, one batch out."""


@dataclass(frozen=True)
class Evaluation:
    """A measured loss."""

    loss: float
    """Mean nats per supervised token over all rows, each token by its loss weight."""
    num_rows: int
    num_trained_tokens: int


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
    ) -> None:
        """Choose the first `max_rows` rows, and batch rows of like length together."""
        chosen = sorted(range(min(len(dataset), max_rows)), key=lambda i: dataset.lengths[i])
        self.dataset, self.collate = dataset, collate
        self.batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        self.autocast_dtype = autocast_dtype

    def __call__(self, model: Any) -> Evaluation:
        """Evaluate the unwrapped model; its mode and all random states are put back."""
        device = next(model.parameters()).device
        total = share = torch.zeros((), dtype=torch.float64)
        tokens = rows = 0
        with undisturbed(model), self._autocast(device):
            for indices in self.batches:
                batch = self.collate([self.dataset[i] for i in indices])
                tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                rows += len(indices)
                share = share + loss_share(batch)
                batch = on_device(batch, device)
                total = total + supervised_loss(model, model, batch, 1).double().cpu()
        return Evaluation(float(total) / (float(share) or 1.0), rows, tokens)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def build_evaluator(run: RunContext, *, collate: Collate) -> Evaluator | None:
    """The micro-evaluation of a run; None where no rows are held out."""
    if run.data.validation is None:
        return None
    return Evaluator(
        run.data.validation,
        collate=collate,
        max_rows=run.config.monitoring.micro_eval_rows,
        batch_size=run.config.hyperparams.batch_size,
        autocast_dtype=run.precision.autocast_dtype,
    )


# ---- what a run is put together from once its model is there: callbacks, and HF's Trainer


def assemble_callbacks(run: RunContext, config: TrainerConfig) -> list[Any]:
    """The live monitor with its preview scheduler, and TensorBoard.

    Raises:
        ConfigError: a preview backend that is misconfigured.
    """
    hyper = config.hyperparams
    order = epoch_order(config, run.data)
    stopping = EarlyStopping(hyper.early_stopping_patience, hyper.early_stopping_min_delta)
    if run.resume is not None:
        stopping.restore(run.resume.run_state["early_stopping"])
        kept = checkpoint_steps(Path(config.output.output_dir) / CHECKPOINTS_NAME)
        if stopping.lowest_step not in kept:  # its weights are gone, so a later step is the best
            stopping.lowest_loss, stopping.lowest_step = None, 0
    run.callback = LiveMonitorCallback(
        config.monitoring,
        observers=run.observers,
        evaluate=build_evaluator(run, collate=PadCollator(_pad_id(run))),
        early_stopping=stopping,
        checkpoint_interval=config.output.checkpoint_interval,
        is_stop_requested=lambda: run.stop.is_signalled,
        request_stop=lambda: run.stop.ask("the control file"),
        control=ControlFile(run.folder.path, run.notice) if run.folder is not None else None,
        row_of_step=lambda step: run.data.train_texts[order.first_row_of_step(step)],
    )
    if is_main_process():
        run.scheduler = build_scheduler(run, run.callback.deliver_previews)
        run.callback.scheduler = run.scheduler
    callbacks: list[Any] = [run.callback]
    if "tensorboard" in config.monitoring.report_to and run.folder is not None:
        start_step = run.resume.step if run.resume else 0
        callback, tracker = tensorboard_callback(run.folder.logs_dir, start_step=start_step)
        run.observers.add(tracker)
        callbacks.append(callback)
    return callbacks


def assemble_trainer(
    run: RunContext,
    config: TrainerConfig,
    *,
    model: Any,
    data: RunData,
    arguments: TrainingArguments,
    callbacks: list[Any],
) -> SupervisedTrainer:
    """HF's Trainer with our loss, order, optimizer and checkpoints; loss and packing are checked.

    Raises:
        ConfigError: sharded weights, or a model that cannot be trained as asked.
    """
    packs = data.train if isinstance(data.train, PackedDataset) else None
    pad_id = _pad_id(run)
    optimizer = build_optimizer(model, config.hyperparams)
    memory = MemoryProbe()
    schedule = RateSchedule(optimizer, config.hyperparams, num_steps(config, data))
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=pack_collator(model, pad_id) if packs is not None else PadCollator(pad_id),
        optimizers=(optimizer, schedule),
        callbacks=[memory, *callbacks],  # before the previews of step 0
        order=epoch_order(config, data),
        save_checkpoint=_checkpoint_saver(run),
        run_state=lambda: _run_state(run),
        tokenizer=run.tokenizer,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "this run was started under FSDP or DeepSpeed, whose sharded weights this version "
            "cannot save; start it with plain torchrun (DDP)."
        )
    if run.scheduler is not None and isinstance(run.scheduler.lane, PublishedPreviews):
        run.scheduler.lane.snapshotter.guard(trainer.optimizer)
    trainer.remove_callback(PrinterCallback)  # it prints dicts into the terminal view
    guard_trackers(trainer)
    run.trainer = memory.trainer = trainer
    if run.callback is not None:
        run.callback.trainer = trainer
    if packs is not None:
        _check_packing(trainer)
    trainer.use_own_forward = not is_loss_equal(run, trainer, packs.rows if packs else data.train)
    forget_peak_memory(trainer.args.device)
    return trainer


def _pad_id(run: RunContext) -> int:
    return harmless_pad_id(run.tokenizer, embedding_rows(run.model))


def _check_packing(trainer: SupervisedTrainer) -> None:
    """Refuse packing where documents see each other, before the first step.

    In fp32 where the model allows it, which hides least. Varlen kernels take half precision only.
    """
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    needs_autocast = takes_borders(trainer.model) or len(dtypes) > 1
    autocast = trainer.accelerator.autocast() if needs_autocast else contextlib.nullcontext()
    with undisturbed(trainer.model), autocast:
        check_documents_apart(
            trainer.model,
            batch_size=trainer.args.per_device_train_batch_size,
            collate=trainer.data_collator,
        )


def _checkpoint_saver(run: RunContext) -> Callable[[int, Callable[[Path], None]], None]:
    def save(step: int, write_state: Callable[[Path], None]) -> None:
        assert run.folder is not None, "only the main process saves"
        started = time.perf_counter()
        run.checkpoint = save_checkpoint(
            run.folder.checkpoints_dir,
            step,
            write_state,
            keep=run.config.output.keep_checkpoints,
            protect=run.callback.protected_steps if run.callback else set(),
            metadata={
                "config": run.config.model_dump(mode="json"),
                "data_fingerprint": run.data.train.fingerprint(),
                "date": run.date.isoformat(),
                "versions": package_versions(),
                "semantics": SEMANTICS,
            },
        )
        seconds = time.perf_counter() - started
        run.observers.emit(CheckpointSaved(step=step, path=str(run.checkpoint), duration_s=seconds))

    return save


def _run_state(run: RunContext) -> dict[str, Any]:
    """What a checkpoint keeps of the run beside HF's own state."""
    assert run.callback is not None, "built before training"
    return {"early_stopping": run.callback.early_stopping.state()}
