"""From a loaded model to a trained one: evaluation, callbacks, HF's Trainer, the loop, its end."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer.core.best_step import (
    build_deciding,
    build_stopping,
    choice_words,
    recover_evaluations,
    take_the_rest,
    use_final_weights,
)
from trainer.core.checkpoint import Hashes, save_checkpoint, set_aside_newer
from trainer.core.checks import (
    MemoryProbe,
    choose_loss,
    forget_peak_memory,
    has_unused_parameters,
    tiling_of,
)
from trainer.core.compiling import CompiledBlocks, compiler_errors
from trainer.core.evaluation import build_evaluator
from trainer.core.fused_loss import with_kernel
from trainer.core.hf_trainer import SaveCheckpoint, SupervisedTrainer
from trainer.core.model_card import model_card, write_card
from trainer.core.optim import RateSchedule, build_optimizer
from trainer.core.preparation import epoch_order
from trainer.core.previews import build_scheduler
from trainer.core.proofs import BatchChoice, Collate, TrainingCollator, choose_batches, needs_mask
from trainer.core.publishing import agree_on_previews
from trainer.core.resume import HISTORY, SEMANTICS, STREAM, ResumePoint, package_versions
from trainer.core.run import Job, LoadedModel, Prepared, TrainingResult, is_main_process
from trainer.core.run_folder import RunFolder
from trainer.core.scoring import final_evaluation
from trainer.core.sharded_checkpoint import is_adapted
from trainer.core.sharding import mesh_words, shard, whole_adapter, whole_copy
from trainer.core.shared_files import SharedWriting, shared_tasks
from trainer.core.source_losses import SourceSums
from trainer.core.together import Ask, together
from trainer.counts import counted
from trainer.data.batches import (
    EncodedDataset,
    PackCollator,
    PackedDataset,
    PadCollator,
    length_buckets,
)
from trainer.data.source_shares import names_of
from trainer.data.stream_order import StreamOrder
from trainer.data.stream_rows import StreamedDataset
from trainer.errors import NonFiniteError, OutputError, StoppedError
from trainer.files import CHECKPOINTS_NAME, FAILED, staged
from trainer.models.adapter_files import load_finished_model, save_adapter, write_model
from trainer.models.load import embedding_rows, harmless_pad_id
from trainer.monitoring.callbacks import (
    Commands,
    LiveMonitorCallback,
    MicroEvaluation,
    Previews,
)
from trainer.monitoring.control import ControlFile
from trainer.monitoring.events import CheckpointSaved, RunStarted
from trainer.monitoring.processes import any_process, num_processes
from trainer.monitoring.resuming import resume_flags
from trainer.monitoring.step_report import StepReport
from trainer.monitoring.tracker_texts import WITH_TABLES, TrackerTables
from trainer.monitoring.tracking import guard_trackers, tensorboard_callback
from trainer.preview.neutral import undisturbed
from trainer.preview.scheduler import PreviewScheduler
from trainer.publish.lane import PublishedPreviews


def assemble_callbacks(job: Job, prepared: Prepared, loaded: LoadedModel) -> list[Any]:
    """The live monitor with its preview scheduler, and TensorBoard.

    Raises:
        ConfigError: a preview backend that is misconfigured.
    """
    config, data = prepared.config, prepared.data
    order, observers = epoch_order(config, data), job.observers
    deciding = build_deciding(job, prepared)
    scheduler = build_scheduler(job, prepared, loaded.model, deciding)
    if scheduler is not None:
        job.on_close("previews", scheduler.close)
    job.monitor = LiveMonitorCallback(
        observers,
        report=StepReport(
            observers,
            row_interval=config.monitoring.prompt_snapshot_interval,
            row_of_step=lambda step: data.train_texts[order.first_row_of_step(step)],
        ),
        commands=Commands(
            ControlFile(job.folder.path, observers.notice) if job.folder is not None else None,
            signal_that_came=lambda: job.stop.signal or 0,
            request_stop=job.stop.agree,
        ),
        evaluation=MicroEvaluation(
            build_evaluator(prepared, _held_out(job, _pad_id(prepared, loaded.model))),
            observers,
            interval=config.monitoring.micro_eval_interval,
            is_shared=prepared.is_sharded,
            stopping=build_stopping(prepared),
        ),
        previews=Previews(scheduler, observers, max_tokens=config.monitoring.preview_max_tokens)
        if scheduler is not None
        else None,
        deciding=deciding,
        checkpoint_interval=config.output.checkpoint_interval,
    )
    callbacks: list[Any] = [*([job.trackers] if job.trackers is not None else []), job.monitor]
    with_texts, names = config.monitoring.tracker_texts, config.monitoring.report_to
    if "tensorboard" in names and job.folder is not None:
        callback, tracker = tensorboard_callback(
            job.folder.logs_dir, start_step=prepared.start_step, with_texts=with_texts
        )
        job.observers.add(tracker)
        callbacks.append(callback)
    if with_texts:
        tables = TrackerTables(names)
        job.observers.add(tables)
        callbacks.insert(0, tables)  # it finds the trackers' runs before the previews of step 0
        without = [name for name in names if name not in ("tensorboard", *WITH_TABLES)]
        if without:
            observers.notice(f"{', '.join(without)}: gets no texts of previews", "warning")
    return callbacks


def _held_out(job: Job, pad_id: int) -> Collate:
    """Rows are measured in batches of the kind they are trained in, once that is proved.

    They are never packed: where packs stay rows, they are padded.
    """
    padded = PadCollator(pad_id)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        proved = job.trainer.data_collator if job.trainer is not None else padded
        is_packs = isinstance(getattr(proved, "collate", None), PackCollator)
        return dict(padded(rows) if is_packs else proved(rows))

    return collate


def assemble_trainer(
    job: Job,
    prepared: Prepared,
    model: Any,
    *,
    arguments: TrainingArguments,
    callbacks: Sequence[Any],
) -> SupervisedTrainer:
    """HF's Trainer with our loss, order, optimizer and checkpoints; loss and packing are checked.

    Raises:
        ConfigError: sharded weights, or a model that cannot be trained as asked.
    """
    assert job.monitor is not None, "assemble_callbacks comes first"
    config = prepared.config
    optimizer = build_optimizer(model, config.hyperparams, seed=config.environment.seed)
    memory = MemoryProbe()
    blocks = _compiled_blocks(job, prepared, model)
    buckets = blocks.buckets if blocks is not None else ()
    schedule = RateSchedule(optimizer, config.hyperparams, prepared.num_steps)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.data.train,
        data_collator=PadCollator(
            _pad_id(prepared, model)
        ),  # until it is known which batches are right
        optimizers=(optimizer, schedule),
        # Both before the previews of step 0.
        callbacks=[memory, *([] if blocks is None else [blocks]), *callbacks],
        order=epoch_order(config, prepared.data),
        save_checkpoint=_checkpoint_saver(job, prepared),
        run_state=lambda: _run_state(job),
        note_step=job.monitor.report.note,
        tokenizer=prepared.tokenizer,
        neftune_alpha=config.lora.neftune_alpha,
        resume_flags=resume_flags(config.model_dump()),
    )
    if trainer.is_fsdp_enabled:
        shard(trainer, prepared.precision)
        processes = prepared.strategy.as_json(mesh_words(trainer.model))
        _update_record(job, {"processes": processes})
        is_published = agree_on_previews(job.scheduler.lane if job.scheduler else None)
        if not (is_published or is_main_process()):
            job.monitor.previews = None
    if job.scheduler is not None and isinstance(job.scheduler.lane, PublishedPreviews):
        job.scheduler.lane.snapshotter.guard(trainer.optimizer)
    trainer.remove_callback(PrinterCallback)  # it prints dicts into the terminal view
    guard_trackers(trainer)
    job.trainer = memory.trainer = trainer
    if blocks is not None:
        blocks.trainer = trainer
    job.observers.phase("loading", "proving attention, batches and loss on the model")
    _prove_batches_and_loss(job, prepared, trainer, buckets=buckets)
    handler = trainer.accelerator.ddp_handler
    if prepared.strategy.name == "ddp" and handler is not None and handler.find_unused_parameters:
        rows = _plain_rows(prepared.data.train)
        [handler.find_unused_parameters] = any_process(has_unused_parameters(trainer, rows))
    forget_peak_memory(trainer.args.device)
    return trainer


def _prove_batches_and_loss(
    job: Job, prepared: Prepared, trainer: SupervisedTrainer, *, buckets: Sequence[int]
) -> None:
    """Choose attention, batches and loss, each as it is proved on the loaded model.

    Raises:
        ModelError: the attention that was asked for does not run.
        ConfigError: documents of a pack see each other, or another proof fails that has no way out.
    """
    config, data = prepared.config, prepared.data
    packs = data.train if isinstance(data.train, PackedDataset) else None
    choice = choose_batches(
        trainer,
        prepared.attention,
        is_packed=packs is not None,
        pad_id=_pad_id(prepared, trainer.model),
        buckets=buckets,
    )
    _tell_attention(job, choice)
    rows, dtype = _plain_rows(data.train), prepared.precision.compute_dtype
    choose_loss(trainer, rows, dtype=dtype, notice=job.observers.notice)
    with undisturbed(trainer.model), trainer.accelerator.autocast():
        trainer.tiling = tiling_of(trainer.model, rows, dtype)
        if trainer.tiling is not None:
            trainer.tiling = with_kernel(
                config.hyperparams.loss_kernel,
                trainer.tiling,
                trainer.model,
                dtype=dtype,
                notice=job.observers.notice,
            )
    _look_at_sources(job, prepared, trainer)
    with_mask = not isinstance(choice.collate, PadCollator) or needs_mask(trainer)
    if config.lora.neftune_alpha:
        with_mask = True  # its noise is by the length of each row
    trainer.data_collator = TrainingCollator(choice.collate, with_mask=with_mask)
    if trainer.tiling is None and not trainer.use_own_forward:
        job.observers.notice(
            "how this model changes its logits after the output head is unknown, so the "
            "logits of a whole batch are held at once; a smaller batch_size takes less memory"
        )


def _plain_rows(data: EncodedDataset) -> EncodedDataset:
    """Rows to prove things on: not packed, and there at any time."""
    if isinstance(data, StreamedDataset):
        return data.samples
    return data.rows if isinstance(data, PackedDataset) else data


def _look_at_sources(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> None:
    """Have the loss of each source summed, where rows are of several and the loss tells."""
    names = names_of(prepared.data.source_names)
    if not names:
        return
    is_fused = trainer.tiling is not None and trainer.tiling.fused is not None
    if is_fused or trainer.use_own_forward:
        why = "Liger's kernel" if is_fused else "this model's own loss"
        way = "; hyperparams.loss_kernel=tiles does" if is_fused else ""
        job.observers.notice(
            f"the training loss of each source is not measured, as {why} does not tell the loss of "
            f"each token{way}; that of held-out rows is"
        )
        return
    trainer.by_source = SourceSums(names)


def _compiled_blocks(job: Job, prepared: Prepared, model: Any) -> CompiledBlocks | None:
    if prepared.config.hyperparams.compile == "off":
        return None
    longest = prepared.data.train.longest
    is_packed = isinstance(prepared.data.train, PackedDataset)
    buckets = (longest,) if is_packed else length_buckets(longest)
    job.blocks = CompiledBlocks(model, buckets, job.observers.notice)
    job.on_close("compiled layers", job.blocks.close)
    return job.blocks


def _pad_id(prepared: Prepared, model: Any) -> int:
    return harmless_pad_id(prepared.tokenizer, embedding_rows(model))


def _tell_attention(job: Job, choice: BatchChoice) -> None:
    for text in choice.notices:
        job.observers.notice(text, "warning")
    job.observers.notice(f"attention: {choice.attention}")
    _update_record(job, {"attention": choice.attention})


def _update_record(job: Job, values: dict[str, Any]) -> None:
    """Put into run.json what is known only once the model is loaded."""
    if job.folder is not None and job.is_recorded:
        try:
            job.folder.update_json(job.folder.run_json, values)
        except (OSError, OutputError) as error:  # a full disk stops a run where it loses something
            job.observers.notice(f"run.json could not be written ({error})", "warning")


def _checkpoint_saver(job: Job, prepared: Prepared) -> SaveCheckpoint:
    root = Path(prepared.config.output.output_dir) / CHECKPOINTS_NAME

    def save(
        step: int,
        write_state: Callable[[Path], None],
        write_share: Callable[[Path], Hashes] | None,
    ) -> None:
        def work(ask: Ask) -> Path:
            started = time.perf_counter()
            writing = SharedWriting(ask, write_state, write_share is not None)
            path = save_checkpoint(
                root,
                step,
                writing.write,
                keep=prepared.config.output.keep_checkpoints,
                protect=job.monitor.protected_steps if job.monitor is not None else set(),
                metadata={
                    "config": prepared.config.model_dump(mode="json"),
                    "data_fingerprint": prepared.data.train.fingerprint(),
                    "date": prepared.date.isoformat(),
                    "versions": package_versions(),
                    "semantics": SEMANTICS,
                    HISTORY: prepared.history,
                    "world_size": num_processes(),
                },
                hashing=writing.hash_again,
            )
            seconds = time.perf_counter() - started
            job.observers.emit(CheckpointSaved(step=step, path=str(path), duration_s=seconds))
            return path

        job.checkpoint = together(work, shared_tasks(write_share))

    return save


def use_smaller_batches(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> None:
    """Have what was made for another batch size follow: evaluation, checkpoints, files of the run.

    Args:
        prepared: with the batch size that the trainer has now.
    """
    assert job.monitor is not None, "assemble_callbacks comes first"
    if job.monitor.evaluation is not None:
        pad_id = _pad_id(prepared, trainer.model)
        job.monitor.evaluation.use(build_evaluator(prepared, _held_out(job, pad_id)))
    trainer.save_with(_checkpoint_saver(job, prepared))
    job.record_config(prepared)


def _run_state(job: Job) -> dict[str, Any]:
    """What a checkpoint keeps of the run beside HF's own state."""
    assert job.stopping is not None and job.monitor is not None, "built before training"
    deciding = job.monitor.deciding
    state = {"early_stopping": job.stopping.state()}
    trainer = job.trainer
    if trainer is not None and isinstance(trainer.order, StreamOrder):
        state[STREAM] = trainer.order.state(trainer.state.global_step)
    return state if deciding is None else {**state, "deciding": deciding.state()}


# ---- the loop and its end


def execute_training(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> None:
    """Run the training loop; a stop request now waits for the end of the step.

    Raises:
        TrainerError: a non-finite loss or gradient, and what else ends a run.
    """
    resume = prepared.resume
    scheduler = job.scheduler
    _announce(job, prepared, trainer)
    started = time.perf_counter()
    job.durations_s["launch_to_training"] = started - job.started
    if resume is not None and job.folder is not None:
        _leave_newer_behind(job, resume, job.folder)
    job.stop.can_wait = True
    try:
        recover_evaluations(job, prepared, trainer)
        if resume is not None and _is_trained(job, resume, prepared.num_steps):
            trainer.restore(resume.path)
            job.observers.notice(f"all steps ({resume.step}) are done; nothing is left to train")
        else:
            with compiler_errors(job.stop) if job.blocks else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
        job.durations_s["training"] = time.perf_counter() - started
        _tell_stream(job, trainer)
        if is_main_process():
            take_the_rest(job)
        if scheduler is not None:
            _drain_previews(job, scheduler, prepared.config.monitoring.preview_drain_timeout)
    finally:
        job.stop.can_wait = False
        job.durations_s.setdefault("training", time.perf_counter() - started)
        if scheduler is not None:  # a run that fails says what became of its previews too
            scheduler.give_up("the run ended before the answer came")


def _tell_stream(job: Job, trainer: SupervisedTrainer) -> None:
    """What was read of the rows that were streamed, which the data card could not know."""
    order, step = trainer.order, trainer.state.global_step
    if isinstance(order, StreamOrder) and step > order.rows.start_step:
        read = order.read_up_to(step)
        job.observers.notice(f"streaming: {read.words()}")
        _update_record(job, {STREAM: read.as_json()})


def _leave_newer_behind(job: Job, resume: ResumePoint, folder: RunFolder) -> None:
    """From here on the run's newest checkpoint is the one that it goes on from."""
    left = set_aside_newer(folder.checkpoints_dir, resume.step)
    if left is not None:
        job.observers.notice(
            f"newer checkpoints than step {resume.step} are in {left} now; remove it if you need "
            "them no more",
            "warning",
        )
    commands = job.monitor.commands if job.monitor is not None else None
    file = commands.file if commands is not None else None
    if file is not None and file.marked_step > resume.step:
        job.observers.notice(f"step {file.marked_step} is no longer marked as best", "warning")
        file.unmark()


def _announce(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> None:
    config, data, total = prepared.config, prepared.data, prepared.num_steps
    job.observers.emit(
        RunStarted(
            model_name=config.model.model_path,
            total_steps=total,
            start_step=prepared.start_step,
            num_epochs=0.0
            if config.data.streaming  # not known
            else total / trainer.order.steps_per_epoch,
            num_train_rows=data.card.num_train_rows,
            num_validation_rows=len(data.validation or ()),
            context_window=config.hyperparams.max_length or 0,
            effective_batch_size=trainer.order.group_size,
            output_dir=config.output.output_dir,
        )
    )
    if config.deciding_scores or config.final_choice == "best":
        job.observers.notice(choice_words(prepared))
    job.observers.phase("training", f"training {counted(total, 'step')}")


def _is_trained(job: Job, resume: ResumePoint, total: int) -> bool:
    """Whether the run had reached its end; HF's loop would make one step more."""
    [is_over] = any_process(job.monitor is not None and job.monitor.is_over)
    deciding = job.monitor.deciding if job.monitor is not None else None
    if resume.step < total and deciding is not None and deciding.is_over:
        deciding.stop(resume.step)
    return resume.step >= total or is_over


def _drain_previews(job: Job, scheduler: PreviewScheduler, timeout_s: float) -> None:
    """Wait for previews that are made elsewhere; a signal ends the wait, not the run's end."""
    if scheduler.is_pending:
        job.observers.phase("training", "waiting for the last previews")
        started = time.perf_counter()
        scheduler.drain(timeout_s, should_stop=lambda: job.stop.is_signalled)
        job.durations_s["preview_drain"] = time.perf_counter() - started
    scheduler.lane.settle()


def check_weights_moved(num_steps: int, num_overflows: int) -> None:
    """Refuse to call a run completed that moved nothing.

    Args:
        num_steps: made by this process.
        num_overflows: those of them that fp16's gradient scaler skipped.
    Raises:
        NonFiniteError: all of them.
    """
    if 0 < num_steps <= num_overflows:
        raise NonFiniteError(
            f"the fp16 gradients of all {num_steps} steps overflowed, so the weights did not move; "
            "the scaler needs some steps to find its scale. Train longer, or use bf16 or fp32."
        )


def finish_training(
    job: Job, prepared: Prepared, loaded: LoadedModel, trainer: SupervisedTrainer
) -> TrainingResult:
    """Final evaluation and final model.

    Raises:
        NonFiniteError: no step moved a weight.
        StoppedError: a run that was stopped by a signal has its checkpoint only.
    """
    observers, data = job.observers, prepared.data
    if job.stop.is_signalled:
        words = f"by {job.stop.by} after step {job.step}"
        raise StoppedError(words, exit_code=job.stop.exit_code)
    if not job.stop.is_set:
        check_weights_moved(job.step - prepared.start_step, trainer.num_overflows)
    step = use_final_weights(job, prepared, trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = None
    if prepared.is_sharded and is_adapted(model):
        adapter = whole_adapter(model)
    elif prepared.is_sharded:
        model = whole_copy(model, prepared.precision.compute_dtype)
    if job.folder is None:
        return job.ended(None, None)
    if prepared.config.monitoring.final_eval_prompts:
        if data.validation is None:
            observers.notice(
                "the final evaluation asks prompts that were trained on: no rows are held out",
                "warning",
            )
        observers.phase(
            "training", f"final evaluation: answering {counted(len(data.final_prompts), 'prompt')}"
        )
    asked = model if prepared.is_sharded else loaded.model
    if adapter is not None and data.final_prompts:
        asked = plain_model(prepared, model, adapter)
    evaluation = final_evaluation(job, prepared, asked, step)
    observers.phase("saving", "saving the final model")
    path = save_final_model(
        model,
        prepared.tokenizer,
        job.folder.final_model_dir,
        card=model_card(job, prepared, evaluation),
        dtype=prepared.precision.compute_dtype,
        stop_ids=data.encoder.template.stop_ids,
        use_cache=loaded.use_cache,
        adapter=adapter,
        when_written=job.stop.settle,
    )
    return job.ended(path, evaluation)


def plain_model(prepared: Prepared, model: Any, adapter: dict[str, torch.Tensor]) -> Any:
    """The adapter of a sharded run on a base that is read again, on the CPU of this process."""
    with tempfile.TemporaryDirectory(prefix="trainer-adapter-") as name:
        save_adapter(model, Path(name), adapter)
        return load_finished_model(
            Path(name),
            dtype=prepared.precision.load_dtype,
            trust_remote_code=prepared.config.model.trust_remote_code,
        )


KEPT = "The newest checkpoint holds the trained weights: --resume saves them again."


def save_final_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    use_cache: bool,
    card: str = "",
    adapter: dict[str, torch.Tensor] | None = None,
    when_written: Callable[[], None] = lambda: None,
) -> Path:
    """Write model (or adapter) and tokenizer to `folder`, in place of an earlier one.

    Args: as of `write_model`, and:
        card: text of README.md; "": none is written.
        when_written: called once the files are whole, before they take the folder's name.
    Raises:
        OutputError: the folder cannot be written.
    """
    with staged(folder, advice=f"{FAILED} {KEPT}") as staging:
        write_model(
            model,
            tokenizer,
            staging,
            dtype=dtype,
            stop_ids=stop_ids,
            use_cache=use_cache,
            adapter=adapter,
        )
        if card:
            write_card(staging, card)
        when_written()
    return folder
