"""The loop of a run and its end: train, wait for the last previews, evaluate, save the model."""

from __future__ import annotations

import time

from trainer.config.schema import TrainerConfig
from trainer.core.checkpoint import set_aside_newer
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.model_folder import save_final_model
from trainer.core.preparation import num_steps
from trainer.core.previews import final_evaluation
from trainer.core.resume import ResumePoint
from trainer.core.run import RunContext, TrainingResult
from trainer.core.run_folder import RunFolder
from trainer.errors import NonFiniteError, StoppedError
from trainer.monitoring.events import RunStarted


def execute_training(run: RunContext, trainer: SupervisedTrainer, config: TrainerConfig) -> None:
    """Run the training loop; a stop request now waits for the end of the step.

    Raises:
        TrainerError: a non-finite loss or gradient, and what else ends a run.
    """
    total = num_steps(config, run.data)
    _announce(run, trainer, config, total)
    started = time.perf_counter()
    run.durations_s["launch_to_training"] = started - run.started
    if run.resume is not None and run.folder is not None:
        _leave_newer_behind(run, run.resume, run.folder)
    run.stop.can_wait = True
    try:
        if run.resume is not None and _is_trained(run, run.resume, total):
            trainer.restore(run.resume.path)
            run.notice(f"all {run.resume.step} steps are done; nothing is left to train")
        else:
            trainer.train(resume_from_checkpoint=str(run.resume.path) if run.resume else None)
        run.durations_s["training"] = time.perf_counter() - started
        _drain_previews(run, config)
    finally:
        run.stop.can_wait = False
        run.durations_s.setdefault("training", time.perf_counter() - started)
        if run.scheduler is not None:  # a run that fails says what became of its previews too
            run.scheduler.give_up("the run ended before the answer came")


def _leave_newer_behind(run: RunContext, resume: ResumePoint, folder: RunFolder) -> None:
    """From here on the run's newest checkpoint is the one that it goes on from."""
    left = set_aside_newer(folder.checkpoints_dir, resume.step)
    if left is not None:
        run.notice(
            f"newer checkpoints than step {resume.step} are in {left} now; remove it if you need "
            "them no more",
            "warning",
        )
    file = run.callback.control_file if run.callback is not None else None
    if file is not None and file.marked_step > resume.step:
        run.notice(f"step {file.marked_step} is no longer marked as best", "warning")
        file.unmark()


def _announce(
    run: RunContext, trainer: SupervisedTrainer, config: TrainerConfig, total: int
) -> None:
    run.observers.emit(
        RunStarted(
            model_name=config.model.model_path,
            total_steps=total,
            start_step=run.resume.step if run.resume else 0,
            num_epochs=total / trainer.order.steps_per_epoch,
            num_train_rows=run.data.card.num_train_rows,
            num_validation_rows=len(run.data.validation or ()),
            context_window=config.hyperparams.max_length or 0,
            effective_batch_size=trainer.order.group_size,
            output_dir=config.output.output_dir,
        )
    )
    run.phase("training", f"training {total} steps")


def _is_trained(run: RunContext, resume: ResumePoint, total: int) -> bool:
    """Whether the run had reached its end; HF's loop would make one step more."""
    callback = run.callback
    return resume.step >= total or (callback is not None and callback.early_stopping.is_over)


def _drain_previews(run: RunContext, config: TrainerConfig) -> None:
    """Wait for previews that are made elsewhere; a signal ends the wait, not the run's end."""
    if run.scheduler is None or not run.scheduler.lane.pending():
        return
    run.phase("training", "waiting for the last previews")
    started = time.perf_counter()
    run.scheduler.drain(
        config.monitoring.preview_drain_timeout, should_stop=lambda: run.stop.is_signalled
    )
    run.durations_s["preview_drain"] = time.perf_counter() - started


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


def finish_training(run: RunContext, config: TrainerConfig) -> TrainingResult:
    """Final evaluation and final model.

    Raises:
        NonFiniteError: no step moved a weight.
        StoppedError: a run that was stopped by a signal has its checkpoint only.
    """
    if run.stop.is_signalled:
        words = f"by {run.stop.by} after step {run.step}"
        raise StoppedError(words, exit_code=run.stop.exit_code)
    if run.trainer is not None and not run.stop.is_set:
        start = run.resume.step if run.resume is not None else 0
        check_weights_moved(run.step - start, run.trainer.num_overflows)
    if run.folder is None or run.trainer is None:
        return run.ended(None, None)
    if config.monitoring.final_eval_prompts:
        if run.data.validation is None:
            run.notice(
                "the final evaluation asks prompts that were trained on: no rows are held out",
                "warning",
            )
        run.phase("training", f"answering {len(run.data.final_prompts)} held-out prompts")
    evaluation = final_evaluation(run, run.folder.final_evaluation_jsonl)
    run.phase("saving", "saving the final model")
    path = save_final_model(
        run.trainer.accelerator.unwrap_model(run.trainer.model),
        run.tokenizer,
        run.folder.final_model_dir,
        dtype=run.precision.compute_dtype,
        stop_ids=run.data.encoder.template.stop_ids,
        use_cache=run.use_cache,
    )
    return run.ended(path, evaluation)
