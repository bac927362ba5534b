"""What a run is put together from once its model is there: callbacks, and HF's Trainer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer.config.schema import TrainerConfig
from trainer.core.checkpoint import save_checkpoint
from trainer.core.context import RunContext, is_main_process
from trainer.core.evaluate import build_evaluator
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss_check import is_loss_equal
from trainer.core.optim import build_optimizer
from trainer.core.packing_check import check_documents_apart
from trainer.core.preparation import epoch_order
from trainer.core.previews import build_scheduler
from trainer.core.run_folder import package_versions
from trainer.data.batches import PadCollator
from trainer.data.dataset import RunData
from trainer.data.packing import PackCollator
from trainer.errors import ConfigError
from trainer.models.vocabulary import embedding_rows, harmless_pad_id
from trainer.monitoring.callbacks import EarlyStopping, LiveMonitorCallback
from trainer.monitoring.control import ControlFile
from trainer.monitoring.events import CheckpointSaved
from trainer.monitoring.tracking import guard_trackers, tensorboard_callback
from trainer.preview.neutral import undisturbed
from trainer.preview.published import PublishedPreviews


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
    run.callback = LiveMonitorCallback(
        config.monitoring,
        observers=run.observers,
        evaluate=build_evaluator(run, collate=_collator(run)),
        early_stopping=stopping,
        checkpoint_interval=config.output.checkpoint_interval,
        is_stop_requested=lambda: run.stop.is_set,
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
    is_packed = config.data.enable_packing
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=_collator(run, is_packed=is_packed),
        optimizers=(build_optimizer(model, config.hyperparams), None),
        callbacks=callbacks,
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
    run.trainer = trainer
    if run.callback is not None:
        run.callback.trainer = trainer
    if is_packed:
        _check_packing(trainer)
    collate = _collator(run, is_packed=is_packed)
    trainer.use_own_forward = not is_loss_equal(run, trainer, collate)
    return trainer


def _collator(run: RunContext, *, is_packed: bool = False) -> PadCollator | PackCollator:
    pad_id = harmless_pad_id(run.tokenizer, embedding_rows(run.model))
    return PackCollator(pad_id) if is_packed else PadCollator(pad_id)


def _check_packing(trainer: SupervisedTrainer) -> None:
    """Refuse packing where documents see each other, before the first step."""
    attention = getattr(trainer.model.config, "_attn_implementation", None)
    is_flash = attention == "flash_attention_2"  # takes half precision only
    is_mixed = len({p.dtype for p in trainer.model.parameters()}) > 1
    needs_autocast = is_flash or is_mixed
    autocast = trainer.accelerator.autocast() if needs_autocast else contextlib.nullcontext()
    with undisturbed(trainer.model), autocast:
        check_documents_apart(trainer.model)


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
            },
        )
        seconds = time.perf_counter() - started
        run.observers.emit(CheckpointSaved(step=step, path=str(run.checkpoint), duration_s=seconds))

    return save


def _run_state(run: RunContext) -> dict[str, Any]:
    """What a checkpoint keeps of the run beside HF's own state."""
    assert run.callback is not None, "built before training"
    return {"early_stopping": run.callback.early_stopping.state()}
