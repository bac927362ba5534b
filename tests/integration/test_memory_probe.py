"""The longest batch is tried before the first step and leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core import checks
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.monitoring import TrainingStatusReader

QUIET = {"inference_interval": 0, "micro_eval_interval": 0}
WITH = {"max_steps": 4, "warmup_steps": 0}


def without_probe(trainer: Any) -> None:
    """In place of the probe."""


def final_weights(train: Callable[..., Any], name: str, **options: Any) -> Path:
    result = train(name, hyperparams=WITH, monitoring=QUIET, **options)
    assert result.success, result.error_message
    return Path(result.model_path)


@pytest.mark.parametrize("data", [{}, {"enable_packing": True}], ids=["rows", "packs"])
def test_weights_are_bit_equal_with_the_probe_and_without(
    train: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
) -> None:
    probed = final_weights(train, "probed", data=data)
    monkeypatch.setattr(checks, "probe", without_probe)
    assert_same_weights(probed, final_weights(train, "plain", data=data))


@contextlib.contextmanager
def nothing_preserved() -> Iterator[None]:
    yield


@pytest.mark.parametrize("lost", ["random state", "gradients"])
def test_mutant_probe_that_leaves_something_behind_is_killed(
    train: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    with monkeypatch.context() as mutant:
        if lost == "random state":
            mutant.setattr(checks, "rng_preserved", nothing_preserved)
        else:
            plain = checks._pass_over

            def kept(trainer: Any, model: Any, batch: Any) -> None:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(type(model), "zero_grad", lambda self: None)
                    plain(trainer, model, batch)

            mutant.setattr(checks, "_pass_over", kept)
        probed = final_weights(train, "probed")
    monkeypatch.setattr(checks, "probe", without_probe)
    with pytest.raises(AssertionError):
        assert_same_weights(probed, final_weights(train, "plain"))


def test_what_does_not_fit_is_refused_before_a_step_and_leaves_no_files(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes, steps = [], []
    loss = checks.supervised_loss

    def out_of_memory(model: Any, unwrapped: Any, batch: Any, **options: Any) -> Any:
        shapes.append(tuple(batch["input_ids"].shape))
        loss(model, unwrapped, batch, **options).backward()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(checks, "supervised_loss", out_of_memory)
    monkeypatch.setattr(SupervisedTrainer, "training_step", lambda *args: steps.append(args))
    result = train(hyperparams=WITH)
    assert (result.exit_code, result.state, steps) == (2, "failed", [])
    [(count, length)] = shapes
    assert f"the longest batch ({count} x {length} tokens) does not fit" in result.error_message
    assert "batch_size" in result.error_message
    assert not (tmp_path / "out").exists()


def test_the_probe_is_the_largest_batch_of_any_epoch(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, trained = [], []
    loss, compute = checks.supervised_loss, SupervisedTrainer.compute_loss

    def note(model: Any, unwrapped: Any, batch: Any, **options: Any) -> Any:
        probed.append(batch["input_ids"].numel())
        return loss(model, unwrapped, batch, **options)

    def noted(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        trained.append(inputs["input_ids"].numel())
        return compute(self, model, inputs, *rest, **named)

    monkeypatch.setattr(checks, "supervised_loss", note)
    monkeypatch.setattr(SupervisedTrainer, "compute_loss", noted)
    result = train(hyperparams={"max_steps": 24}, monitoring=QUIET)  # three epochs
    assert TrainingStatusReader(result.output_dir).read().state == "completed"
    assert probed == [max(trained)]
