"""Which step of a run is the best one, by what, and whose weights the final model gets.

The rule of scores is in `trainer/scores/rule.py`; who waits for them is in
`trainer/monitoring/deciding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import TrainerConfig
from trainer.config.section import VAL_LOSS
from trainer.core.checkpoint import MARK, step_dir, verify_checkpoint
from trainer.core.early_checks import option_of
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.run import Job, Prepared, is_main_process
from trainer.data.dataset import RunData
from trainer.errors import CheckpointError, ConfigError, StoppedError
from trainer.files import CHECKPOINTS_NAME, checkpoint_steps
from trainer.monitoring.callbacks import EarlyStopping
from trainer.monitoring.control import read_mark
from trainer.monitoring.deciding import DecidingScores
from trainer.monitoring.processes import any_process, highest, wait_for_main
from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.preview.base import PreviewResult
from trainer.scores.figures import GOLDEN_PROBABILITY, SCORE
from trainer.scores.rule import ScoreRule, values_by_prompt
from trainer.scores.spec import ScoreSpec, parse_scores
from trainer.scores.standard import PLAIN
from trainer.scores.statistics import MIN_PROMPTS

# ---- what cannot decide


def check_deciding_rows(config: TrainerConfig, data: RunData) -> None:
    """Refuse scores that decide and have too few prompts to do so.

    Raises:
        ConfigError: too few rows are held out, or too few have a golden answer that it reads.
    """
    specs = {SCORE + one.name: one for one in parse_scores(config.monitoring.scores)}
    for metric in config.deciding_scores:
        where, prompts = option_of(config, metric), data.score_prompts
        if len(prompts) < MIN_PROMPTS:
            raise ConfigError(
                f"{where}={metric} decides by at least {MIN_PROMPTS} held-out prompts beside those "
                f"of the previews, and there are {len(prompts)}; hold out more rows "
                "(data.validation_split, data.validation_path)."
            )
        spec = specs.get(metric)
        usable = sum(_has_score(spec, one.golden_answer) for one in prompts)
        if usable < MIN_PROMPTS:
            raise ConfigError(
                f"{where}={metric} needs a golden answer that it can be compared with, and "
                f"{usable} of the {len(prompts)} prompts have one; at least {MIN_PROMPTS} must. "
                "Name another score."
            )


def _has_score(spec: ScoreSpec | None, golden: str | None) -> bool:
    """Whether a prompt can have a score: as far as that is told by its golden answer."""
    if spec is None:
        return bool(golden)
    plain = PLAIN.get(spec.kind)
    return plain is None or plain(golden or "", golden) is not None


# ---- what a run begins or goes on with


def build_stopping(prepared: Prepared) -> EarlyStopping:
    """What is known of validation losses; it stops the run where no score does."""
    hyper = prepared.config.hyperparams
    patience = hyper.early_stopping_patience if hyper.early_stopping_metric == VAL_LOSS else 0
    stopping = EarlyStopping(patience, hyper.early_stopping_min_delta)
    if prepared.resume is not None:
        stopping.restore(prepared.resume.run_state["early_stopping"])
        if stopping.lowest_step not in _kept(prepared):
            # Its weights are gone, so a later step is the best.
            stopping.lowest_loss, stopping.lowest_step = None, 0
    return stopping


def build_deciding(job: Job, prepared: Prepared) -> DecidingScores | None:
    """The scores that choose the best step or stop the run; None: the validation loss does.

    Raises:
        ConfigError: nobody can answer: there are no previews of these sharded weights.
    """
    config = prepared.config
    if not config.deciding_scores:
        return None
    if is_main_process() and not config.monitoring.inference_interval:
        raise ConfigError(
            f"{option_of(config, config.deciding_scores[0])}={config.deciding_scores[0]} needs "
            "answers, and this run has no previews (told above); give "
            "monitoring.preview_backend=remote_3090 a server, or let val_loss decide."
        )
    hyper = config.hyperparams
    patience = hyper.early_stopping_patience
    rules = {
        one: ScoreRule(one, patience if one == hyper.early_stopping_metric else 0)
        for one in config.deciding_scores
    }
    deciding = DecidingScores(
        job.observers,
        stop_rule=rules.get(hyper.early_stopping_metric) if patience else None,
        best_rule=rules.get(config.best_metric),
        interval=config.monitoring.micro_eval_interval,
        lag=config.monitoring.score_lag,
        timeout_s=config.monitoring.preview_drain_timeout,
        should_stop=lambda: job.stop.is_signalled,
    )
    if prepared.resume is not None:
        deciding.restore(prepared.resume.run_state.get("deciding"), _kept(prepared))
    return deciding


def _kept(prepared: Prepared) -> list[int]:
    return checkpoint_steps(_root(prepared))


def _root(prepared: Prepared) -> Path:
    return Path(prepared.config.output.output_dir) / CHECKPOINTS_NAME


def choice_words(prepared: Prepared) -> str:
    """What decides, said before the first step."""
    config = prepared.config
    parts = [f"final_model gets the weights of the {config.final_choice} step"]
    hyper = config.hyperparams
    if config.final_choice == "best" or config.deciding_scores:
        parts.append(f"the best step is the one by {config.best_metric}")
    if hyper.early_stopping_patience:
        parts.append(
            f"training stops after {hyper.early_stopping_patience} evaluations without "
            + (
                "a lower val_loss"
                if hyper.early_stopping_metric == VAL_LOSS
                else f"a clear rise of {hyper.early_stopping_metric}"
            )
        )
    if config.deciding_scores:
        parts.append(
            f"training is at most {config.monitoring.score_lag} evaluation(s) ahead of the scores"
        )
    return ", ".join(parts)


# ---- a resume has the evaluations that the interrupted run was waiting for


def recover_evaluations(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> None:
    """Have what the interrupted run asked and did not take: from its file, or asked again.

    All processes of the run call it, before training. Weights of the checkpoints of these steps
    pass through the model.

    Raises:
        StoppedError: a signal came while answers were waited for; nothing was decided.
    """
    monitor, resume = job.monitor, prepared.resume
    if monitor is None or monitor.deciding is None or resume is None:
        return
    deciding, is_ready = monitor.deciding, False
    if deciding.unasked(resume.step, is_last=resume.step >= prepared.num_steps):
        deciding.note_asked(resume.step)
    known = _known_answers(prepared, deciding) if is_main_process() else {}
    for step in list(deciding.pending):
        folder = step_dir(_root(prepared), step)
        is_known, is_there = any_process(step in known, is_main_process() and folder.is_dir())
        if is_known or not is_there:
            if is_main_process():
                deciding.arrive(step, known.get(step, []))
            continue
        job.observers.notice(f"asking the evaluation of step {step} again")
        if prepared.is_sharded or is_main_process():
            trainer.use_weights(folder)
        if is_main_process():
            deciding.make_room(step)
        if monitor.previews is not None:
            monitor.previews.make(step, is_last=step % deciding.interval != 0)
        if is_main_process():
            deciding.wait_for(step)  # the next weights take the place of these
        wait_for_main()
    if is_main_process():
        is_ready = deciding.catch_up(resume.step)
    wait_for_main()
    [is_ready] = any_process(is_ready)
    if not is_ready and monitor.commands is not None:
        monitor.commands.poll(resume.step, prepared.num_steps)  # all hear of the signal
        words = f"by {job.stop.by} at step {resume.step}, before it was trained on"
        raise StoppedError(words, exit_code=job.stop.exit_code)


def _known_answers(prepared: Prepared, deciding: DecidingScores) -> dict[int, list[PreviewResult]]:
    """Step -> its answers, where all of them are in the run's file with their scores."""
    reader = TrainingStatusReader(Path(prepared.config.output.output_dir))
    wanted = {one.prompt_id for one in prepared.data.score_prompts}
    found: dict[int, dict[str, PreviewResult]] = {step: {} for step in deciding.pending}
    for one in reader.evaluations():
        if one.step in found:
            found[one.step][one.prompt_id] = one
    return {
        step: [answers[one.prompt_id] for one in prepared.data.score_prompts]
        for step, answers in found.items()
        if answers.keys() == wanted and _is_scored(list(answers.values()), deciding)
    }


def _is_scored(results: Sequence[PreviewResult], deciding: DecidingScores) -> bool:
    names = [rule.metric.removeprefix(SCORE) for rule in deciding.rules]
    return all(
        values_by_prompt(results, SCORE + name)[1] is None
        and (name == GOLDEN_PROBABILITY or all(name in one.scores for one in results))
        for name in names
    )


# ---- the end


@dataclass(frozen=True)
class Best:
    """The best step of a run."""

    by: str
    """`val_loss`, a score, or `mark`."""
    step: int
    value: float | None
    """Its loss, or the mean of its score."""

    @property
    def words(self) -> str:
        """Such as `best by score.exact, 0.82`."""
        if self.value is None:
            return "marked as best"
        return f"best by {self.by}, {self.value:.4g}"


def take_the_rest(job: Job) -> None:
    """Take the evaluations that are still on their way; of the main process.

    Not after a signal: the checkpoint that a resume goes on from does not know of them.
    """
    monitor = job.monitor
    deciding = monitor.deciding if monitor is not None else None
    if deciding is not None:
        if not job.stop.is_signalled:
            deciding.catch_up(job.step, num_ahead=0)
        job.durations_s["score_wait"] = deciding.waited_s


def best_of(job: Job, prepared: Prepared) -> Best | None:
    """The step that a person marked, else the best one by `output.best_by`; None: there is none."""
    monitor = job.monitor
    if monitor is None:
        return None
    marked = read_mark(Path(prepared.config.output.output_dir))
    if marked:
        return Best(MARK, marked, None)
    deciding = monitor.deciding
    rule = deciding.best_rule if deciding is not None else None
    if rule is not None:
        return Best(rule.metric, rule.best_step, rule.best_mean) if rule.best_step else None
    stopping = job.stopping
    if stopping is None or not stopping.lowest_step:
        return None
    return Best(VAL_LOSS, stopping.lowest_step, stopping.lowest_loss)


def use_final_weights(job: Job, prepared: Prepared, trainer: SupervisedTrainer) -> int:
    """Have the model hold the weights that `output.final_model` names; all processes at once.

    Returns:
        Their step.
    """
    best, last = best_of(job, prepared), job.step
    choice = prepared.config.final_choice
    step = last
    if choice == "best" and is_main_process():
        step = _usable_step(job, prepared, best)
    if prepared.is_sharded:  # of whole copies the main process's is the one that is saved
        wait_for_main()
        [step] = highest(step if is_main_process() else 0)
    if step != last:
        trainer.use_weights(step_dir(_root(prepared), step))
    if choice == "best" or best is not None:
        known = f"{best.step} ({best.words})" if best is not None else "none"
        job.observers.notice(
            f"final_model: the weights of step {step}; last step {last}, best step {known}"
        )
    job.final_step = step
    job.best = None if best is None else {"by": best.by, "step": best.step, "value": best.value}
    return step


def _usable_step(job: Job, prepared: Prepared, best: Best | None) -> int:
    """The best step, or the last one where there is none whose checkpoint is whole."""
    if best is None:
        why = "no evaluation was clearly above step 0, or none counted"
        if prepared.config.best_metric == VAL_LOSS:
            why = "no validation loss was measured"
        job.observers.notice(
            f"output.final_model=best: there is no best step ({why}); final_model gets the weights "
            f"of the last step, {job.step}",
            "warning",
        )
        return job.step
    if best.step == job.step:
        return best.step
    try:
        verify_checkpoint(step_dir(_root(prepared), best.step))
    except CheckpointError as error:
        job.observers.notice(
            f"output.final_model=best: {error} final_model gets the weights of the last step, "
            f"{job.step}",
            "error",
        )
        return job.step
    return best.step
