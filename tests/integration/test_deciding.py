"""Scores that decide: which step is the best, when a run stops, and what the final model has."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.integration.forked_runs import Case, run_cases
from trainer.core.checkpoint import find_checkpoint
from trainer.core.finished import open_run
from trainer.files import checkpoint_steps, read_json_object
from trainer.monitoring import TrainingStatusReader
from trainer.publish import children
from trainer.views.report import render_report
from trainer.views.run_reader import RunReader

ROOT = Path(__file__).parents[2]
STEPS = 16
WEIGHTS = "model.safetensors"

Run = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def found() -> Iterator[None]:
    """The score functions of the unit tests can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "unit" / "scores"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that runs `tiny` with 16 score prompts every 2 steps, patience 2; its result.

    `planned` rises clearly at steps 4 and 6 and no more: two evaluations later, and one of
    `score_lag`, it is step 12.
    """
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine

    root = tmp_path_factory.mktemp("deciding")
    rows = root / "rows.jsonl"
    lines = [{"question": f"what is {n} and 1?", "answer": f"it is {n + 1}"} for n in range(48)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = itertools.count()

    def make(
        folder: str | Path = "",
        /,
        score: str = "planned",
        observers: Sequence[Any] = (),
        **sections: Any,
    ) -> Any:
        entry = f"rewards:{score}" if score.startswith("planned") else score
        name = f"score.{score}"
        hyper = {
            **{"batch_size": 4, "max_steps": STEPS, "fp_precision": "fp32", "max_length": 64},
            **{"early_stopping_patience": 2, "early_stopping_metric": name},
            **sections.get("hyperparams", {}),
        }
        monitoring = {
            **{"report_to": (), "inference_interval": 2, "num_eval_samples": 1},
            **{"preview_max_tokens": 2, "micro_eval_interval": 2, "micro_eval_rows": 2},
            **{"scores": [entry], "num_score_prompts": 16, "display": "quiet"},
            **sections.get("monitoring", {}),
        }
        output = {"keep_checkpoints": 1, **sections.get("output", {})}
        config = create_default_config(
            model_path="tiny",
            dataset_path=str(rows),
            output_dir=str(root / (folder or f"run-{next(numbers)}")),
            hyperparams=hyper,
            monitoring=monitoring,
            output=output,
            data={"validation_split": 0.5, "cache": False, **sections.get("data", {})},
            environment={"num_threads": 1, "device": "cpu"},
        )
        return TrainerEngine(observers=observers).run_job(config)

    return make


KEEP_ALL = {"keep_checkpoints": 40}


@pytest.fixture(scope="module")
def plain(run: Run) -> Any:
    """A run without scores, and with checkpoints at steps 6 and 12."""
    return checked(
        run(
            hyperparams={"early_stopping_patience": 0, "early_stopping_metric": "val_loss"},
            monitoring={"scores": (), "num_score_prompts": 0, "inference_interval": 0},
            output={"checkpoint_interval": 6, **KEEP_ALL},
        )
    )


@pytest.fixture(scope="module")
def stopped(run: Run) -> Any:
    """A run that was stopped by its score."""
    return checked(run("stopped", output=KEEP_ALL))


def checked(result: Any) -> Any:
    assert result.success, result.error_message
    return result


def weights(result: Any, step: int | None = None) -> bytes:
    """The bytes of the final model, or of a checkpoint."""
    folder: Path = result.output_dir
    if step is None:
        return (folder / "final_model" / WEIGHTS).read_bytes()
    return (folder / "checkpoints" / f"step-{step:08d}" / WEIGHTS).read_bytes()


def verdicts(result: Any) -> list[tuple[int, int, bool, int]]:
    """Of each evaluation: its step, the step at which it was taken, best or not, best step.

    What was taken behind the last checkpoint is taken again by a resume, and stands there twice.
    """
    found = [
        (line["evaluation_step"], line["step"], line["is_best"], line["best_step"])
        for line in TrainingStatusReader(result.output_dir).metrics()
        if line["type"] == "ScoreDecided"
    ]
    return list(dict.fromkeys(found))


def notices(result: Any) -> list[str]:
    status = json.loads((result.output_dir / "status.json").read_text())
    return [one["text"] for one in status["notices"]]


VERDICTS = [
    *[(0, 2, True, 0), (2, 4, False, 0), (4, 6, True, 4), (6, 8, True, 6)],
    *[(8, 10, False, 6), (10, 12, False, 6)],
]


def test_a_score_stops_the_run_one_evaluation_after_the_one_that_decides(stopped: Any) -> None:
    assert (stopped.global_step, stopped.summary["ended_by"]) == (12, "early_stopping")
    assert verdicts(stopped) == [*VERDICTS, (12, 12, False, 6)]
    reason = "stopped at step 12: score.planned has not clearly risen since step 6"
    assert reason in stopped.summary["stop_reason"]


def test_the_final_model_is_the_best_checkpoint_byte_for_byte(stopped: Any) -> None:
    assert weights(stopped) == weights(stopped, 6) != weights(stopped, 12)
    best = find_checkpoint(stopped.output_dir, "best")
    assert (best.step, best.why) == (6, "best by score.planned, 1")
    assert stopped.summary["best"] == {"by": "score.planned", "step": 6, "value": 1.0}
    assert stopped.summary["final_model_step"] == 6


def test_both_steps_are_said_at_start_and_end(stopped: Any) -> None:
    told = notices(stopped)
    assert any("without a clear rise of score.planned" in text for text in told)
    line = (
        "final_model: the weights of step 6; last step 12, best step 6 (best by score.planned, 1)"
    )
    assert line in told
    record = json.loads((stopped.output_dir / "status.json").read_text())
    assert (record["deciding"]["metric"], record["deciding"]["best_step"]) == ("score.planned", 6)
    reader = RunReader(stopped.output_dir)
    reader.poll()
    report = render_report(reader)
    assert "has not clearly risen since step 6" in report
    assert "weights of step 6" in report


def test_weights_are_those_of_a_run_without_scores_up_to_the_stop(plain: Any, stopped: Any) -> None:
    assert plain.global_step == STEPS
    assert [weights(plain, step) == weights(stopped, step) for step in (6, 12)] == [True, True]
    assert weights(plain) == weights(plain, STEPS)


def test_slow_scores_decide_the_same_at_the_same_steps(run: Run, stopped: Any) -> None:
    slow = checked(run(score="slowly", monitoring={"scores": ["slowly=rewards:planned_slowly"]}))
    assert verdicts(slow) == verdicts(stopped)
    assert weights(slow) == weights(stopped)
    assert slow.summary["deciding"]["waited_s"] > 0
    # The best one outlives a retention of one checkpoint, and those that may be it.
    assert checkpoint_steps(slow.output_dir / "checkpoints") == [6, 12]


def answers(folder: Path) -> list[tuple[Any, ...]]:
    """What was answered for scores, and how likely the golden answer was."""
    found = TrainingStatusReader(folder).evaluations()
    return [(one.step, one.prompt_id, one.text, one.golden_probability) for one in found]


@pytest.mark.parametrize("is_lost", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_resume_decides_the_same(run: Run, stopped: Any, tmp_path: Path, is_lost: bool) -> None:
    folder = tmp_path / "again"
    shutil.copytree(stopped.output_dir, folder)
    if is_lost:  # as if it was killed before the answers of step 8 came
        path = folder / "evaluations.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < 8))
    resume = str(folder / "checkpoints" / "step-00000008")
    again = checked(run(folder, output={**KEEP_ALL, "resume": resume}))
    assert again.global_step == stopped.global_step
    assert verdicts(again) == verdicts(stopped)
    assert weights(again) == weights(stopped)
    assert weights(again, 12) == weights(stopped, 12)
    assert answers(folder) == answers(stopped.output_dir)
    states = [
        one / "checkpoints/step-00000012/run_state.json" for one in (folder, stopped.output_dir)
    ]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_missing_score_decides_nothing_and_is_told(run: Run) -> None:
    gap = checked(run(score="planned_with_a_gap"))
    assert verdicts(gap)[4:] == [
        *[(8, 10, False, 6), (10, 12, False, 6), (12, 14, False, 6), (14, 14, False, 6)],
    ]
    assert gap.global_step == 14  # one evaluation later than without the gap
    [rule] = gap.summary["deciding"]["rules"]
    assert rule["missing_steps"] == [8]
    assert any("score.planned_with_a_gap of step 8 is missing and" in one for one in notices(gap))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_run_that_is_ended_while_it_waits_for_a_score_goes_on_as_if_it_was_not(
    run: Run, tmp_path: Path, number: signal.Signals, lag: int
) -> None:
    slowly = {"scores": ["slowly=rewards:planned_slowly"], "score_lag": lag}
    whole = checked(run(score="slowly", monitoring=slowly, output=KEEP_ALL))
    folder = tmp_path / "out"
    config = json.loads((whole.output_dir / "config.resolved.json").read_text())
    config["output"]["output_dir"] = str(folder)
    (tmp_path / "config.json").write_text(json.dumps(config))
    scores = str(ROOT / "tests" / "unit" / "scores")
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "--config", "config.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), scores])},
        cwd=tmp_path,
    )
    while process.poll() is None:
        status = read_json_object(folder / "status.json") or {}
        if status.get("step", 0) >= 8 and "waiting for the scores" in status.get("phase", ""):
            process.send_signal(number)
            break
        time.sleep(0.005)
    assert process.wait(120) in (143, -signal.SIGKILL)
    again = checked(
        run(
            folder,
            score="slowly",
            monitoring=slowly,
            output={**KEEP_ALL, "resume": "latest"},
        )
    )
    assert verdicts(again) == verdicts(whole)
    assert weights(again) == weights(whole)
    assert again.global_step == whole.global_step


# ---- answers by another process


SIDECAR = {"preview_backend": "sidecar", "sidecar_num_threads": 1}


def sidecar() -> psutil.Process:
    [found] = [
        one
        for one in psutil.Process().children(recursive=True)
        if "--wait-for-weights" in one.cmdline()
    ]
    return found


class AtDecision:
    """An observer that does something once the evaluation of a step is taken."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_event(self, event: Any) -> None:
        if getattr(event, "evaluation_step", None) == self.step:
            self.action()

    def close(self) -> None: ...


@pytest.mark.slow
@pytest.mark.long
def test_a_sidecar_decides_as_the_training_process_does(run: Run, stopped: Any, plain: Any) -> None:
    """It is slower than training, so that each evaluation is waited for; none is left out."""
    elsewhere = checked(run(monitoring=SIDECAR, output=KEEP_ALL))
    assert verdicts(elsewhere) == verdicts(stopped)
    assert weights(elsewhere) == weights(stopped)
    assert weights(elsewhere, 12) == weights(plain, 12)
    counts = elsewhere.summary["previews"]["evaluation"]
    assert (counts["asked"], counts["verified"], counts["superseded"]) == (7 * 16, 7 * 16, 0)


@pytest.mark.slow
def test_nothing_is_decided_on_what_a_killed_sidecar_did_not_answer(
    run: Run, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "MAX_RESTARTS", 0)
    killer = AtDecision(4, lambda: sidecar().kill())
    result = checked(
        run(
            monitoring={**SIDECAR, "preview_drain_timeout": 1},
            observers=[killer],
            output=KEEP_ALL,
        )
    )
    assert result.global_step == STEPS  # with numbers it stops at step 12
    assert weights(result, STEPS) == weights(plain, STEPS)
    [rule] = result.summary["deciding"]["rules"]
    assert rule["missing_steps"][-5:] == [8, 10, 12, 14, 16]
    assert rule["best_step"] in (4, 6)  # that of step 6 was on its way
    assert weights(result) == weights(result, rule["best_step"])
    told = [text for text in notices(result) if "is missing and decides nothing" in text]
    assert told
    status = json.loads((result.output_dir / "status.json").read_text())
    assert status["deciding"]["missing"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("lag", [0, 2])
def test_a_worker_that_is_stopped_for_seconds_changes_no_decision(run: Run, lag: int) -> None:
    def pause() -> None:
        process = sidecar()
        engine = process.children()[0]
        engine.suspend()
        threading.Timer(5, engine.resume).start()

    options = {"monitoring": {**SIDECAR, "score_lag": lag}, "output": KEEP_ALL}
    quick = checked(run(**options))
    slow = checked(run(**options, observers=[AtDecision(4, pause)]))
    assert verdicts(slow) == verdicts(quick)
    assert weights(slow) == weights(quick)
    assert quick.global_step == slow.global_step == 10 + 2 * lag
    waited = [one.summary["deciding"]["waited_s"] for one in (slow, quick)]
    assert waited[0] > waited[1]


# ---- several processes


TWO: dict[str, list[str]] = {
    "ddp": ["--distributed.strategy", "ddp"],
    "fsdp2": ["--distributed.strategy", "fsdp2", "--monitoring.preview_backend", "sidecar"],
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_stop_and_choose_together(
    tmp_path: Path, stopped: Any, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    config = json.loads((stopped.output_dir / "config.resolved.json").read_text())
    config["output"]["output_dir"], config["hyperparams"]["batch_size"] = "out", 2
    del config["distributed"], config["monitoring"]["preview_backend"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "unit" / "scores"))
    words = ["train", "--config", "config.json", *TWO[strategy]]
    again = [*words, "--resume", "out/checkpoints/step-00000008"]
    cases = {"first": Case(words, world=2), "again": Case(again, world=2)}
    folder, seen = tmp_path / "run" / "out", []
    for name, case in cases.items():
        [ended] = run_cases(tmp_path / "run", {name: case}).values()
        assert ended.codes == [0, 0], ended.texts
        summary = json.loads((folder / "run.json").read_text())["summary"]
        assert summary["ended_by"] == "early_stopping"
        found = open_run(folder, step="best").load()[0].state_dict()
        final = open_run(folder).load()[0].state_dict()
        assert all(torch.equal(final[key], found[key]) for key in found)
        seen.append((checkpoint_steps(folder / "checkpoints")[-1], summary["best"], final))
    assert [one[:2] for one in seen] == [(12, stopped.summary["best"])] * 2
    assert all(torch.equal(seen[0][2][key], seen[1][2][key]) for key in seen[0][2])


# ---- what cannot decide


ROW_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"hyperparams": {"early_stopping_metric": "score.exactly"}},
        "early_stopping_metric=score.exactly names no score of this run; there are score.planned, "
        "score.golden_probability",
    ),
    "unmeasured": (
        {"hyperparams": {"early_stopping_metric": "score.golden_probability"}},
        "needs the golden answers' probabilities",
    ),
    "too few rows": ({"data": {"validation_split": 0.2}}, "and there are"),
    "no golden": ({"score": "tool_calls"}, "0 of the 16 prompts have one; at least 12 must"),
    "nothing held out": (
        {"data": {"validation_split": 0}, "output": {"final_model": "best"}},
        "no rows are held out",
    ),
}


@pytest.mark.parametrize("case", ROW_ERRORS)
def test_what_cannot_decide_is_refused(run: Run, case: str) -> None:
    sections, words = ROW_ERRORS[case]
    if case == "unmeasured":
        sections = {**sections, "monitoring": {"preview_golden_logprobs": "off"}}
    refused = run(**sections)
    assert (refused.success, refused.exit_code) == (False, 2)
    assert words in str(refused.error_message)
    assert not refused.output_dir.exists()


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_stops_by_its_score_and_keeps_the_best(cli: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    words = ["demo", "--preview-backend", "sidecar", "--early-stopping", "--output", folder]
    done = cli(*words, "--display", "plain")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["ended_by"] == "early_stopping"
    assert "score.exact has not clearly risen since step" in done.stdout
    best = folder / "checkpoints" / f"step-{summary['best']['step']:08d}" / WEIGHTS
    assert (folder / "final_model" / WEIGHTS).read_bytes() == best.read_bytes()
    assert summary["deciding"]["rules"][0]["missing_steps"] == []
