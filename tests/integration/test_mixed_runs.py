"""Runs over several files: what each has of an epoch, its loss, and that a resume goes on in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_resume_exact import KEEP, QUIET, check_same_state, resumed
from trainer.core import TrainerEngine, preparation, training
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.tiles import Tiling, summed_loss
from trainer.monitoring import TrainingStatusReader

MIX = {"mix_probabilities": (0.6, 0.4), "validation_split": 0.2}


@pytest.fixture
def files(tmp_path: Path) -> str:
    """30 rows of sums and 60 of talk, with commas between, as data.dataset_path takes them."""
    for name, count in (("sums", 30), ("talk", 60)):
        rows = [
            {"question": f"{name} {n}?", "answer": f"{name} {n} is {n * n}. " * (n % 4 + 1)}
            for n in range(count)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{tmp_path / 'sums.jsonl'},{tmp_path / 'talk.jsonl'}"


@pytest.fixture
def mixed(files: str, train: Callable[..., Any]) -> Callable[..., Any]:
    """A function that trains on both files."""

    def run(*args: Any, **sections: Any) -> Any:
        result = train(*args, dataset_path=files, **sections)
        assert result.success, result.error_message
        return result

    return run


def lines_of(result: Any, kind: str) -> list[dict[str, Any]]:
    lines = TrainingStatusReader(result.output_dir).metrics()
    return [line for line in lines if line["type"] == kind]


def test_metrics_status_and_card_say_what_each_source_has_and_how_it_learns(mixed: Any) -> None:
    accumulated = {"batch_size": 2, "gradient_accumulation": 4, "max_steps": 6}
    result = mixed(hyperparams=accumulated, data=MIX, monitoring={"inference_interval": 0})
    steps, [*_, evaluation] = lines_of(result, "StepDone"), lines_of(result, "EvaluationDone")
    for line in steps:
        losses = [line[name] for name in ("loss/sums", "loss/talk") if name in line]
        assert min(losses) <= line["train_loss"] * 1.00001
        assert max(losses) >= line["train_loss"] * 0.99999
    named = [evaluation["val_loss/sums"], evaluation["val_loss/talk"]]
    assert min(named) < evaluation["val_loss"] < max(named)
    status = json.loads((result.output_dir / "status.json").read_text())
    assert set(status["source_losses"]) == set(status["val_source_losses"]) == {"sums", "talk"}
    assert status["val_source_losses"]["sums"] == evaluation["val_loss/sums"]
    card = json.loads((result.output_dir / "run.json").read_text())["data_card"]
    sums, talk = card["sources"]
    assert (sums["name"], talk["name"], card["mix_epoch"]) == ("sums", "talk", "first")
    assert sums["num_epoch_rows"] == sums["num_rows"] < 30
    share = sums["num_epoch_rows"] / (sums["num_epoch_rows"] + talk["num_epoch_rows"])
    assert share == pytest.approx(0.6, abs=0.02)
    assert sums["num_tokens"] + talk["num_tokens"] == card["num_tokens"]


def test_a_run_over_one_file_says_nothing_of_sources(train: Any) -> None:
    result = train(hyperparams={"max_steps": 4}, monitoring={"inference_interval": 0})
    for kind in ("StepDone", "EvaluationDone"):
        assert not [key for line in lines_of(result, kind) for key in line if "loss/" in key]
    assert json.loads((result.output_dir / "run.json").read_text())["data_card"]["sources"] == []


@pytest.mark.slow
@pytest.mark.parametrize("data", [{"weights": (2.0, 1.0)}, {"enable_packing": True}], ids=str)
def test_measuring_sources_changes_no_bit_of_a_run(
    mixed: Any, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    hyper = {"max_steps": 8, "gradient_accumulation": 2, "batch_size": 2, "max_length": 128}
    sections: dict[str, Any] = {"hyperparams": hyper, "monitoring": QUIET, "data": data}
    on = mixed("on", **sections)
    monkeypatch.setattr(preparation, "with_sources", lambda section, data: data)
    off = mixed("off", **sections)
    assert any("loss/sums" in line for line in lines_of(on, "StepDone"))
    figures = [
        [(line["train_loss"], line["grad_norm"]) for line in lines_of(run, "StepDone")]
        for run in (on, off)
    ]
    assert figures[0] == figures[1]
    check_same_state(on.checkpoint_path, off.checkpoint_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "data"),
    [
        (2, {}),
        (7, {"mix_epoch": "longest"}),
        (5, {"enable_packing": True, "group_by_length": False}),
        pytest.param(6, {}, marks=pytest.mark.long),
        pytest.param(9, {"shuffle": False, "group_by_length": False}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_mixed_run_goes_on_bit_for_bit_also_in_the_middle_of_an_epoch(
    files: str, train: Any, at: int, data: dict[str, Any]
) -> None:
    hyper = {"max_steps": 11, "gradient_accumulation": 2, "max_length": 128}
    more: dict[str, Any] = {"hyperparams": hyper, "monitoring": QUIET, "data": {**MIX, **data}}
    straight, again = resumed(train, at, dataset_path=files, **more)
    check_same_state(straight.checkpoint_path, again.checkpoint_path)
    losses = [
        {
            line["step"]: {key: line[key] for key in line if key.startswith("loss/")}
            for line in lines_of(run, "StepDone")
        }
        for run in (straight, again)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_steps_of_a_run_hold_the_rows_of_its_epochs_whoever_loads_them(
    job: Callable[..., Any], files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = SupervisedTrainer.compute_loss

    def rows_of(name: str, **options: Any) -> tuple[list[int], SupervisedTrainer]:
        seen: list[int] = []
        trainers = []

        def noted(self: Any, model: Any, inputs: dict[str, torch.Tensor], *a: Any, **k: Any) -> Any:
            seen.extend(inputs["sources"][:, 0].tolist())
            trainers.append(self)
            return compute(self, model, inputs, *a, **k)

        monkeypatch.setattr(SupervisedTrainer, "compute_loss", noted)
        data = {**MIX, "mix_epoch": "longest"}
        hyper = {"num_epochs": 2, "max_steps": None}
        config = job(
            name, dataset_path=files, hyperparams=hyper, data=data, monitoring=QUIET, **options
        )
        result = TrainerEngine().run_job(config)
        assert result.success, result.error_message
        return seen, trainers[0]

    seen, trainer = rows_of("alone")
    order = trainer.order
    sources = trainer.train_dataset.sources
    wanted = [int(sources[row]) for epoch in (0, 1) for row in order.epoch_rows(epoch)]
    assert seen == wanted
    assert trainer.state.max_steps == trainer.state.global_step == 2 * order.steps_per_epoch
    assert rows_of("workers", environment={"num_workers": 2})[0] == wanted


def test_probabilities_that_do_not_fit_the_files_are_one_error(
    train: Any, files: str, qa_file: Path
) -> None:
    three = train(dataset_path=f"{files},{qa_file}", data=MIX)
    assert three.exit_code == 2
    assert "data.mix_probabilities has 2 numbers, data.dataset_path has 3 names" in (
        three.error_message
    )
    assert not three.output_dir.exists()
    tiny = {"mix_probabilities": (0.999, 0.001)}
    none = train(dataset_path=files, data=tiny, monitoring=QUIET)
    assert none.exit_code == 2
    assert "its share of 0.001 is less than one row (or pack) of an epoch" in none.error_message


@pytest.mark.slow
def test_a_resume_with_other_probabilities_is_refused(mixed: Any, files: str, train: Any) -> None:
    more: dict[str, Any] = {"hyperparams": {"max_steps": 4}, "monitoring": QUIET}
    first = mixed(data=MIX, output=KEEP, **more)
    shutil.rmtree(first.output_dir / "checkpoints" / "step-00000004")
    other = {**MIX, "mix_probabilities": (0.5, 0.5)}
    again = train(dataset_path=files, data=other, output={**KEEP, "resume": "latest"}, **more)
    assert again.exit_code == 2
    assert "mix_probabilities" in again.error_message


@pytest.mark.slow
def test_trackers_get_the_loss_of_each_source(mixed: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitoring = {"report_to": ("tensorboard",), "inference_interval": 0, "micro_eval_interval": 4}
    result = mixed(hyperparams={"max_steps": 8}, data=MIX, monitoring=monitoring)
    events = EventAccumulator(str(result.output_dir / "logs"))
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert [one.step for one in found["val_loss/sums"]] == [4, 8]
    lines = {line["step"]: line for line in lines_of(result, "EvaluationDone")}
    assert found["val_loss/talk"][0].value == pytest.approx(lines[4]["val_loss/talk"])
    trained = [one for one in lines_of(result, "StepDone") if "loss/sums" in one]
    values = [one.value for one in found["train/loss/sums"]]
    assert min(line["loss/sums"] for line in trained) <= min(values) * 1.00001
    assert max(values) <= max(line["loss/sums"] for line in trained) * 1.00001


def own_forward(monkeypatch: pytest.MonkeyPatch) -> str:
    def chosen(trainer: SupervisedTrainer, *_: Any, **__: Any) -> None:
        trainer.use_own_forward = True

    monkeypatch.setattr(training, "choose_loss", chosen)
    return "this model's own loss"


def fused_kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    def fused(states: Any, head: Any, target: Any, weights: Any, post: Any) -> Any:
        return summed_loss(post(head(states[None])[0]), target, weights)[0]

    def kernel(asked: str, tiling: Tiling, *_: Any, **__: Any) -> Tiling:
        return replace(tiling, fused=fused)

    monkeypatch.setattr(training, "with_kernel", kernel)
    return "hyperparams.loss_kernel=tiles does"


@pytest.mark.slow
@pytest.mark.parametrize("way", [own_forward, fused_kernel])
def test_where_the_loss_does_not_tell_of_tokens_held_out_rows_still_have_it(
    mixed: Any, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], str]
) -> None:
    words = way(monkeypatch)
    monitoring = {"inference_interval": 0, "micro_eval_interval": 2}
    result = mixed(hyperparams={"max_steps": 2}, data=MIX, monitoring=monitoring)
    assert not any("loss/sums" in line for line in lines_of(result, "StepDone"))
    assert "val_loss/sums" in lines_of(result, "EvaluationDone")[0]
    notices = TrainingStatusReader(result.output_dir).read().notices
    assert any("loss of each source is not measured" in n.text and words in n.text for n in notices)
