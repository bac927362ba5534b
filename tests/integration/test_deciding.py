"""Scores that decide: which step is the best, when a run stops, and what the final model has."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.core.checkpoint import find_checkpoint
from trainer.files import checkpoint_steps
from trainer.monitoring import TrainingStatusReader
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

    def make(folder: str | Path = "", /, score: str = "planned", **sections: Any) -> Any:
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
            data={"validation_split": 0.5, "cache": False},
            environment={"num_threads": 1, "device": "cpu"},
        )
        return TrainerEngine().run_job(config)

    return make


KEEP_ALL = {"keep_checkpoints": 40}


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
    """Of each evaluation: its step, the step at which it was taken, best or not, best step."""
    return [
        (line["evaluation_step"], line["step"], line["is_best"], line["best_step"])
        for line in TrainingStatusReader(result.output_dir).metrics()
        if line["type"] == "ScoreDecided"
    ]


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


def test_weights_are_those_of_a_run_without_scores_up_to_the_stop(run: Run, stopped: Any) -> None:
    plain = checked(
        run(
            hyperparams={"early_stopping_patience": 0, "early_stopping_metric": "val_loss"},
            monitoring={"scores": (), "num_score_prompts": 0, "inference_interval": 0},
            output={"checkpoint_interval": 6, **KEEP_ALL},
        )
    )
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


@pytest.mark.parametrize("is_lost", [False, True], ids=["known", "asked_again"])
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
