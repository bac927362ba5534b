"""`auto_batch_size`: out of memory before step 1 makes smaller batches of the same steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.core import TrainerEngine, batch_size, checks
from trainer.core.hf_trainer import smaller_batch_size
from trainer.monitoring import TrainingStatusReader

ERRORS: dict[str, Callable[[], RuntimeError]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't"),
}
EIGHT = {"batch_size": 8, "max_steps": 6, "warmup_steps": 0}
SHORT = 16
"""Tokens of the rows by which packing is checked."""
QUIET = {"inference_interval": 0, "micro_eval_interval": 3}


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """A function after which no embedding takes more than so many long rows; returns all counts."""

    def limit(rows: int, kind: str = "cuda") -> list[int]:
        seen: list[int] = []
        forward = torch.nn.Embedding.forward

        def limited(self: Any, ids: torch.Tensor) -> torch.Tensor:
            if ids.shape[-1] > SHORT:
                seen.append(len(ids))
            if len(ids) > rows and ids.shape[-1] > SHORT:
                raise ERRORS[kind]()
            return forward(self, ids)

        monkeypatch.setattr(torch.nn.Embedding, "forward", limited)
        return seen

    return limit


def losses(result: Any) -> list[tuple[float, float]]:
    lines = (Path(result.output_dir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(one["train_loss"], one["grad_norm"]) for one in found if one["type"] == "StepDone"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        pytest.param("cuda", {}, id="rows"),
        pytest.param("cpu", {"enable_packing": True}, id="packs", marks=pytest.mark.long),
    ],
)
def test_a_run_that_ran_out_of_memory_equals_one_that_began_with_smaller_batches(
    train: Callable[..., Any],
    out_of_memory: Callable[..., list[int]],
    assert_same_weights: Callable[..., None],
    kind: str,
    data: dict[str, Any],
) -> None:
    hyper = {**EIGHT, "max_length": 64}
    options: dict[str, Any] = {"monitoring": QUIET, "data": data}
    small = {**hyper, "batch_size": 2, "gradient_accumulation": 4}
    wanted = train("small", hyperparams=small, **options)
    out_of_memory(3, kind)
    found = train("auto", hyperparams={**hyper, "auto_batch_size": True}, **options)
    assert found.success, found.error_message
    assert losses(found) == losses(wanted)
    assert len(losses(found)) == 6
    assert found.val_loss == wanted.val_loss
    assert_same_weights(Path(found.model_path), Path(wanted.model_path))


def test_what_was_found_is_told_and_on_disk(
    train: Callable[..., Any], out_of_memory: Callable[..., list[int]]
) -> None:
    seen = out_of_memory(5)
    result = train(hyperparams={**EIGHT, "auto_batch_size": True}, monitoring=QUIET)
    assert result.success, result.error_message
    folder = Path(result.output_dir)
    manifest = json.loads((result.checkpoint_path / "manifest.json").read_text())
    for config in (
        json.loads((folder / "config.resolved.json").read_text()),
        json.loads((folder / "run.json").read_text())["config"],
        manifest["metadata"]["config"],
    ):
        hyper = config["hyperparams"]
        assert (hyper["batch_size"], hyper["gradient_accumulation"]) == (4, 2)
        assert hyper["auto_batch_size"] is True
    status = TrainingStatusReader(folder).read()
    assert status.effective_batch_size == 8
    assert "batch_size=4 and gradient_accumulation=2" in (folder / "status.json").read_text()
    assert max(seen[seen.index(8) + 1 :]) == 4  # nothing larger was tried again


@pytest.mark.slow
def test_a_resume_goes_on_bit_for_bit_with_the_size_that_was_found(
    job: Callable[..., Any],
    out_of_memory: Callable[..., list[int]],
    assert_same_weights: Callable[..., None],
) -> None:
    seen = out_of_memory(2)
    hyper = {**EIGHT, "auto_batch_size": True, "lr_scheduler": "constant"}
    whole = TrainerEngine().run_job(job("whole", hyperparams=hyper, monitoring=QUIET))
    TrainerEngine().run_job(job("half", hyperparams={**hyper, "max_steps": 3}, monitoring=QUIET))
    seen.clear()
    again = job("half", hyperparams=hyper, monitoring=QUIET, output={"resume": "latest"})
    resumed = TrainerEngine().run_job(again)
    assert resumed.success, resumed.error_message
    assert max(seen) == 2
    assert losses(resumed) == losses(whole)
    assert_same_weights(Path(resumed.model_path), Path(whole.model_path))


def test_a_row_that_does_not_fit_alone_is_the_one_clear_error(
    train: Callable[..., Any], out_of_memory: Callable[..., list[int]], tmp_path: Path
) -> None:
    tried = []
    longest = batch_size.try_longest

    def noting(trainer: Any, model: Any, count: int) -> str | None:
        tried.append(count)
        return longest(trainer, model, count) or "the longest batch does not fit"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "try_longest", noting)
        result = train(hyperparams={**EIGHT, "batch_size": 6, "auto_batch_size": True})
    assert tried == [6, 3, 1]
    assert (result.exit_code, result.state) == (2, "failed")
    assert "does not fit" in result.error_message
    assert not (tmp_path / "out").exists()


def test_without_the_option_nothing_is_made_smaller(
    train: Callable[..., Any], out_of_memory: Callable[..., list[int]]
) -> None:
    out_of_memory(3)
    result = train(hyperparams={**EIGHT, "max_steps": 2}, monitoring=QUIET)
    assert result.exit_code == 2
    assert "auto_batch_size=true" in result.error_message


def test_what_a_failed_attempt_made_is_freed_before_the_next(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback holds the frames of the attempt, and they hold its tensors."""
    import weakref

    loss, made, alive = checks.supervised_loss, [], []

    def attempt(model: Any, unwrapped: Any, batch: Any, **options: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        assert all(parameter.grad is None for parameter in unwrapped.parameters())
        held = torch.zeros(10)
        made.append(weakref.ref(held))
        if len(batch["input_ids"]) > 2:
            loss(model, unwrapped, batch, **options).backward()
            raise ERRORS["cuda"]()
        return loss(model, unwrapped, batch, **options)

    monkeypatch.setattr(checks, "supervised_loss", attempt)
    hyper = {**EIGHT, "max_steps": 2, "auto_batch_size": True}
    result = train(hyperparams=hyper, monitoring=QUIET)
    assert result.success, result.error_message
    assert alive == [0, 0, 0, 0]  # 8, 4, 2, and the probe of the loop


def test_an_attempt_computes_as_training_does_and_puts_the_model_back(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In autocast around the forward, with fp32 logits out of it, and with checkpointing."""
    calls: list[tuple[torch.dtype, bool]] = []
    longest = batch_size.try_longest

    def noting(trainer: Any, model: Any, count: int) -> str | None:
        def note(head: Any, args: Any, output: torch.Tensor) -> None:
            calls.append((output.dtype, model.is_activation_checkpointing))

        hook = model.lm_head.register_forward_hook(note)
        logits = model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits
        hook.remove()
        assert logits.dtype == torch.float32
        return longest(trainer, model, count)

    monkeypatch.setattr(batch_size, "try_longest", noting)
    hyper = {"auto_batch_size": True, "fp_precision": "bf16", "gradient_checkpointing": True}
    engine = TrainerEngine()
    trainer = engine.create_trainer(job(hyperparams=hyper, monitoring=QUIET))
    assert calls == [(torch.bfloat16, True)]
    assert "forward" not in vars(trainer.model)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    engine.close()


@pytest.mark.slow
def test_out_of_memory_in_the_middle_names_the_way_on_which_trains_the_same_steps(
    job: Callable[..., Any],
    out_of_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hyper, output = {**EIGHT, "batch_size": 4, "gradient_accumulation": 2}, {}
    output = {"checkpoint_interval": 2}
    with pytest.MonkeyPatch.context() as patch:
        from trainer.core.hf_trainer import SupervisedTrainer

        compute, calls = SupervisedTrainer.compute_loss, []

        def unlucky(self: Any, *args: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:
                raise ERRORS["cuda"]()
            return compute(self, *args, **named)

        patch.setattr(SupervisedTrainer, "compute_loss", unlucky)
        result = TrainerEngine().run_job(
            job("broken", hyperparams=hyper, monitoring=QUIET, output=output)
        )
    assert (result.exit_code, result.global_step) == (1, 2)
    assert "step 3 ran out of the memory of cpu" in result.error_message
    assert "--resume --batch-size 2 --gradient-accumulation 4" in result.error_message
    smaller = {**hyper, "batch_size": 2, "gradient_accumulation": 4}
    again = job("broken", hyperparams=smaller, monitoring=QUIET, output={"resume": "latest"})
    resumed = TrainerEngine().run_job(again)
    assert resumed.success, resumed.error_message
    assert len(losses(resumed)) == 6
    run = json.loads((Path(resumed.output_dir) / "run.json").read_text())
    assert "hyperparams.batch_size: 4 -> 2" in run["changed_since_checkpoint"]


@pytest.mark.parametrize(
    ("size", "effective", "wanted"),
    [(8, 8, 4), (6, 6, 3), (3, 6, 1), (5, 5, 1), (12, 24, 6), (9, 9, 3), (1, 8, None), (7, 21, 3)],
)
def test_sizes_divide_the_effective_batch(size: int, effective: int, wanted: int | None) -> None:
    assert smaller_batch_size(size, effective) == wanted


LAUNCHED = f"""
import os, sys
import torch
from trainer.cli import main

forward = torch.nn.Embedding.forward

def limited(self, ids):
    if len(ids) > 2 and ids.shape[-1] > {SHORT} and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, ids)

torch.nn.Embedding.forward = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_two_processes_take_the_batch_size_that_fits_both(
    cli: Callable[..., Any],
    job: Callable[..., Any],
    no_dropout: Path,
    qa_file: Path,
    tmp_path: Path,
) -> None:
    """Memory ends on the second one only; the losses are those of one process."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    hyper = {**EIGHT, "batch_size": 4, "max_steps": 3, "auto_batch_size": True}
    words = ["train", "--dataset", qa_file, "--model", no_dropout, "--output", tmp_path / "two"]
    words += ["--data.validation_split", "0.2", "--fp32", "--learning-rate", "1e-2", "--quiet"]
    words += ["--environment.num_threads", "1", "--monitoring.inference_interval", "0"]
    for name, value in hyper.items():
        words += [f"--hyperparams.{name}", str(value).lower()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = cli(*words, command=[*launch, "--nproc_per_node", "2", str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    found = record["config"]["hyperparams"]
    assert (found["batch_size"], found["gradient_accumulation"]) == (2, 2)
    one = job("one", hyperparams={**EIGHT, "max_steps": 3}, monitoring=QUIET)
    alone = TrainerEngine().run_job(one)
    assert alone.success, alone.error_message
    for two, single in zip(losses(record_of(tmp_path / "two")), losses(alone), strict=True):
        assert two == pytest.approx(single, rel=1e-5)


def record_of(folder: Path) -> Any:
    """What `losses` takes."""
    return SimpleNamespace(output_dir=folder)


@pytest.fixture
def no_dropout(model_folder: Path) -> Path:
    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    return model_folder
