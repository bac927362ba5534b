"""The step of the lowest validation loss has a checkpoint, whatever comes after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.core import training
from trainer.core.checkpoint import find_checkpoint
from trainer.errors import OutputError
from trainer.files import checkpoint_steps
from trainer.monitoring.callbacks import EarlyStopping

KEEP_ONE = {"keep_checkpoints": 1, "checkpoint_interval": 5}
Losses = Callable[[dict[int, float]], None]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    """A function that says which validation loss each step will have."""

    def plan(of_step: dict[int, float]) -> None:
        def build(prepared: Any, pad_id: int) -> Any:
            steps = itertools.count(
                prepared.start_step // 2 * 2 + 2, 2
            )  # one evaluation every two steps
            return lambda model: SimpleNamespace(
                loss=of_step[next(steps)], num_rows=8, num_trained_tokens=80, source_losses={}
            )

        monkeypatch.setattr(training, "build_evaluator", build)

    return plan


def run(train: Callable[..., Any], **more: Any) -> Any:
    monitoring = {"inference_interval": 0, "micro_eval_interval": 2}
    options = {"monitoring": monitoring, "output": KEEP_ONE, **more}
    result = train(**options)
    assert result.success, result.error_message
    return result


RISING = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6, 10: 2.7, 12: 2.8}


@pytest.mark.parametrize("early", [{}, {"early_stopping_min_delta": 5.0}], ids=["plain", "delta"])
def test_the_lowest_loss_has_a_checkpoint_without_patience(
    train: Callable[..., Any], losses: Losses, early: dict[str, Any]
) -> None:
    check_lowest(train, losses, early)


def check_lowest(train: Callable[..., Any], losses: Losses, early: dict[str, Any]) -> None:
    losses(RISING)
    result = run(train, hyperparams=early)
    assert checkpoint_steps(result.output_dir / "checkpoints") == [4, 12]
    best = find_checkpoint(result.output_dir, "best")
    assert (best.step, best.why) == (4, "lowest validation loss, 2.0000")


def test_mutant_best_only_with_patience_is_killed(
    train: Callable[..., Any], losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: EarlyStopping, loss: float, step: int) -> bool:
        return False  # as if nothing were known where nobody waits for it

    monkeypatch.setattr(EarlyStopping, "update", update)
    with pytest.raises((AssertionError, OutputError)):
        check_lowest(train, losses, {})


def test_early_stopping_keeps_the_best_and_says_that_it_ended_the_run(
    train: Callable[..., Any], losses: Losses
) -> None:
    losses(RISING)
    result = run(train, hyperparams={"early_stopping_patience": 2})
    assert (result.state, result.global_step) == ("completed", 8)
    assert result.summary["ended_by"] == "early_stopping"
    assert checkpoint_steps(result.output_dir / "checkpoints") == [4, 8]


def test_the_best_of_before_a_resume_is_kept_after_it(
    train: Callable[..., Any], losses: Losses
) -> None:
    losses({**RISING, 14: 2.1, 16: 2.2})
    run(train)
    result = run(train, hyperparams={"max_steps": 16}, output={**KEEP_ONE, "resume": "latest"})
    assert checkpoint_steps(result.output_dir / "checkpoints") == [4, 16]
    assert find_checkpoint(result.output_dir, "best").step == 4


def test_where_the_bests_weights_are_gone_a_later_step_is_the_best(
    train: Callable[..., Any], losses: Losses
) -> None:
    import shutil

    losses({**RISING, 14: 2.9, 16: 2.95})
    first = run(train)
    shutil.rmtree(first.output_dir / "checkpoints" / "step-00000004")
    with pytest.raises(OutputError, match=r"step 4 \(lowest validation loss, 2.0000\) has no che"):
        find_checkpoint(first.output_dir, "best")
    result = run(train, hyperparams={"max_steps": 16}, output={**KEEP_ONE, "resume": "latest"})
    assert find_checkpoint(result.output_dir, "best").step == 14


def test_without_a_measured_loss_or_a_mark_there_is_no_best(train: Callable[..., Any]) -> None:
    result = train(monitoring={"inference_interval": 0, "micro_eval_interval": 0})
    with pytest.raises(OutputError, match=r"no step is marked .* \(checkpoints: step 12\)"):
        find_checkpoint(result.output_dir, "best")


ALL = {"keep_checkpoints": 40, "checkpoint_interval": 2}


def test_a_resume_from_an_older_step_leaves_the_newer_ones_behind(
    train: Callable[..., Any], losses: Losses
) -> None:
    losses({**RISING, 7: 9.0, 9: 9.0})
    first = run(train, output=ALL)
    folder: Path = first.output_dir / "checkpoints"
    (first.output_dir / "best.json").write_text('{"step": 8}')
    output = {**ALL, "resume": str(folder / "step-00000006")}
    again = run(train, hyperparams={"max_steps": 7}, output=output)
    assert again.global_step == 7
    assert checkpoint_steps(folder) == [2, 4, 6, 7]
    assert checkpoint_steps(folder / "left-at-step-00000006-1") == [8, 10, 12]
    assert find_checkpoint(first.output_dir, "best").step == 4  # the mark was of what was left
    last = run(train, hyperparams={"max_steps": 9}, output={**ALL, "resume": "latest"})
    assert last.global_step == 9
    assert checkpoint_steps(folder) == [2, 4, 6, 7, 8, 9]
