"""Trust items N16-N19: what a step is made of is the same on every start, and after a resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core import TrainerEngine, optim
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.data.batches import EpochOrder
from trainer.monitoring import TrainingStatusReader

KEEP = {"checkpoint_interval": 1, "keep_checkpoints": 40}
QUIET = {"inference_interval": 0, "micro_eval_interval": 0}


def resumed(train: Callable[..., Any], at: int, **options: Any) -> tuple[Any, Any]:
    """An uninterrupted run, and one that goes on from its checkpoint `at`."""
    straight = train("straight", output=KEEP, **options)
    assert straight.success, straight.error_message
    folder = straight.output_dir.parent / "again"
    shutil.rmtree(folder, ignore_errors=True)
    leave_out = shutil.ignore_patterns("final_model", ".lock")
    shutil.copytree(straight.output_dir, folder, ignore=leave_out)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > at:
            shutil.rmtree(path)
    again = train("again", output={**KEEP, "resume": "latest"}, **options)
    assert again.success, again.error_message
    return straight, again


def check_same_state(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule and random state of two checkpoints, bit for bit."""
    names = sorted(path.name for path in one.iterdir() if path.suffix in (".pt", ".pth"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(names)
    for name in names:
        pair = [torch.load(folder / name, weights_only=False) for folder in (one, other)]
        assert equal(*pair), name
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()


def equal(one: Any, other: Any) -> bool:
    if hasattr(one, "codes"):  # 8-bit moments of torchao, which torch does not compare
        return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((one == other) if not hasattr(one, "shape") else (one == other).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", [1, pytest.param(4, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long), 11]
)
def test_n16_everything_a_checkpoint_holds_is_the_same_after_a_resume(
    train: Callable[..., Any], at: int
) -> None:
    check_n16(train, at)


def check_n16(train: Callable[..., Any], at: int, **data: Any) -> None:
    hyper = {"gradient_accumulation": 2, "max_steps": 12, "warmup_steps": 3, "optimizer": "muon"}
    straight, again = resumed(train, at, hyperparams=hyper, monitoring=QUIET, data=data)
    check_same_state(straight.checkpoint_path, again.checkpoint_path)


@pytest.mark.slow
def test_n16_holds_for_packed_rows(train: Callable[..., Any]) -> None:
    hyper = {"max_length": 96, "max_steps": 9, "batch_size": 2}
    data = {"enable_packing": True}
    straight, again = resumed(train, 5, hyperparams=hyper, monitoring=QUIET, data=data)
    check_same_state(straight.checkpoint_path, again.checkpoint_path)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["_load_rng_state", "_load_optimizer_and_scheduler"])
def test_mutant_n16_lost_state_is_killed(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(SupervisedTrainer, lost, lambda self, checkpoint: None)
    with pytest.raises(AssertionError):
        check_n16(train, 3)


@pytest.fixture
def rows_of_run(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[int, list[list[int]]]]:
    """A function that runs a job and returns the token ids of each step's rows, padding off."""
    compute = SupervisedTrainer.compute_loss

    def run(name: str, **options: Any) -> dict[int, list[list[int]]]:
        seen: dict[int, list[list[int]]] = {}

        def noted(self: Any, model: Any, inputs: dict[str, torch.Tensor], *a: Any, **k: Any) -> Any:
            # A row ends with a trained token, and padding has none.
            trained = (inputs["labels"] != -100).long()
            lengths = (trained * torch.arange(1, trained.shape[1] + 1)).amax(1).tolist()
            rows = [row[:n] for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
            seen.setdefault(self.state.global_step + 1, []).extend(rows)
            return compute(self, model, inputs, *a, **k)

        monkeypatch.setattr(SupervisedTrainer, "compute_loss", noted)
        result = TrainerEngine().run_job(job(name, monitoring=QUIET, **options))
        assert result.success, result.error_message
        return seen

    return run


@pytest.mark.slow
def test_n17_the_rows_of_a_step_depend_on_seed_and_step_alone(
    rows_of_run: Callable[..., Any], tmp_path: Path
) -> None:
    check_n17(rows_of_run, tmp_path)


def check_n17(rows_of_run: Callable[..., Any], tmp_path: Path) -> None:
    hyper = {"max_steps": 16, "gradient_accumulation": 1}  # 32 rows: two epochs of 8 steps
    first = rows_of_run("first", hyperparams=hyper, output=KEEP)
    assert rows_of_run("workers", hyperparams=hyper, environment={"num_workers": 2}) == first
    for path in (tmp_path / "first" / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > 11:
            shutil.rmtree(path)
    rest = rows_of_run("first", hyperparams=hyper, output={**KEEP, "resume": "latest"})
    assert rest == {step: rows for step, rows in first.items() if step > 11}
    epochs = [[row for step in part for row in first[step]] for part in (range(1, 9), range(9, 17))]
    assert sorted(epochs[0]) == sorted(epochs[1])  # every row once an epoch
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_mutant_n17_epoch_0_again_is_killed(
    rows_of_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpochOrder, "set_epoch", lambda self, epoch: None)
    with pytest.raises(AssertionError):
        check_n17(rows_of_run, tmp_path)


def closed_form(name: str, step: int, peak: float, warmup: int, total: int) -> float:
    """The learning rate of optimizer step `step`, from 1."""
    done = step - 1
    if done < warmup:
        return peak * (done + 1) / (warmup + 1)
    share = (done - warmup) / (total - warmup)
    shapes = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
    }
    return peak * shapes[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("linear", marks=pytest.mark.long), "cosine", "constant"]
)
def test_n18_the_learning_rate_is_the_closed_form_also_after_a_resume(
    train: Callable[..., Any], name: str
) -> None:
    check_n18(train, name)


def check_n18(train: Callable[..., Any], name: str) -> None:
    hyper = {"max_steps": 12, "warmup_steps": 3, "lr_scheduler": name, "learning_rate": 1e-3}
    for run in resumed(train, 5, hyperparams=hyper, monitoring=QUIET):
        lines = TrainingStatusReader(run.output_dir).metrics()
        rates = [line["learning_rate"] for line in lines if line["type"] == "StepDone"]
        wanted = [closed_form(name, step, 1e-3, 3, 12) for step in range(1, 13)]
        assert rates == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.slow
def test_mutant_n18_two_schedule_steps_is_killed(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.lr_scheduler.LambdaLR.step

    def twice(self: Any, *args: Any) -> None:
        step(self)
        step(self)

    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", twice)
    with pytest.raises(AssertionError):
        check_n18(train, "linear")


LENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # name: before the resume, from it on, step resumed from, steps in the end
    "a finished run": ({"max_steps": 6}, {"max_steps": 12}, 6, 12),
    "from its middle": ({"max_steps": 9}, {"max_steps": 12}, 6, 12),
    "within the warm-up": ({"max_steps": 6}, {"max_steps": 12}, 2, 12),
    "shorter": ({"max_steps": 9}, {"max_steps": 7}, 5, 7),
    "its last step": ({"max_steps": 9}, {"max_steps": 9}, 8, 9),
    "epochs": ({"num_epochs": 1, "max_steps": None}, {"num_epochs": 1.5, "max_steps": None}, 8, 12),
    "epochs to steps": ({"num_epochs": 1, "max_steps": None}, {"max_steps": 11}, 8, 11),
}


MUON = {"lr_scheduler": "linear", "optimizer": "muon"}
SHARE = {"lr_scheduler": "cosine", "warmup_steps": 0.25}
LORA = {"lr_scheduler": "constant", "training_mode": "lora"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("a finished run", SHARE),
        ("within the warm-up", LORA),
        *(pytest.param(case, MUON, marks=pytest.mark.long) for case in LENGTHS),
        pytest.param("shorter", SHARE, marks=pytest.mark.long),
        pytest.param("epochs to steps", LORA, marks=pytest.mark.long),
    ],
)
def test_n18_a_resume_to_another_length_has_the_rates_of_that_length(
    train: Callable[..., Any], case: str, more: dict[str, Any]
) -> None:
    check_n18_length(train, *LENGTHS[case], **more)


def check_n18_length(
    train: Callable[..., Any],
    before: dict[str, Any],
    after: dict[str, Any],
    at: int,
    total: int,
    **more: Any,
) -> None:
    hyper = {"warmup_steps": 4, "learning_rate": 1e-3, **more}  # 32 rows: an epoch has 8 steps
    first = train(hyperparams={**hyper, **before}, monitoring=QUIET, output=KEEP)
    output = {**KEEP, "resume": str(first.output_dir / "checkpoints" / f"step-{at:08d}")}
    again = train(hyperparams={**hyper, **after}, monitoring=QUIET, output=output)
    assert (again.success, again.global_step) == (True, total), again.error_message
    warmup = math.ceil(0.25 * total) if hyper["warmup_steps"] == 0.25 else 4
    lines = TrainingStatusReader(again.output_dir).metrics()
    rates = {line["step"]: line["learning_rate"] for line in lines if line["type"] == "StepDone"}
    assert sorted(rates) == list(range(1, total + 1))
    name = hyper["lr_scheduler"]
    for step in range(at + 1, total + 1):
        wanted = closed_form(name, step, 1e-3, warmup, total)
        assert rates[step] == pytest.approx(wanted, rel=1e-12, abs=1e-15), step
        path = again.output_dir / "checkpoints" / f"step-{step - 1:08d}" / "optimizer.pt"
        if step > at + 1:  # of every group: after a step the optimizer holds the next one's rate
            groups = torch.load(path, weights_only=True)["param_groups"]
            assert [group["lr"] for group in groups] == pytest.approx([wanted] * len(groups))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "a finished run",
        pytest.param("from its middle", marks=pytest.mark.long),
        pytest.param("epochs", marks=pytest.mark.long),
    ],
)
def test_mutant_n18_the_checkpoints_rate_is_kept_is_killed(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kept = torch.optim.lr_scheduler.LambdaLR.load_state_dict
    monkeypatch.setattr(optim.RateSchedule, "load_state_dict", kept)
    with pytest.raises(AssertionError):
        check_n18_length(train, *LENGTHS[case], lr_scheduler="linear")


def test_mutant_n18_a_warm_up_from_zero_is_killed(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = optim.rate_factor

    def from_zero(name: str, step: int, *, warmup: int, total: int) -> float:
        return step / warmup if step < warmup else ours(name, step, warmup=warmup, total=total)

    monkeypatch.setattr(optim, "rate_factor", from_zero)
    with pytest.raises(AssertionError):
        check_n18(train, "linear")


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_n19_a_non_finite_gradient_stops_before_the_step_with_and_without_clipping(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, clip: float, value: float
) -> None:
    check_n19(job, monkeypatch, clip, value)


def check_n19(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, clip: float, value: float
) -> None:
    step = SupervisedTrainer.training_step
    seen: dict[str, Any] = {}

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)  # finite; only one gradient is not
        if self.state.global_step == 2:
            seen["model"], seen["before"] = model, [p.detach().clone() for p in model.parameters()]
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(SupervisedTrainer, "training_step", poisoned)
    hyper = {"max_steps": 5, "max_grad_norm": clip}
    config = job(hyperparams=hyper, monitoring=QUIET, output={"checkpoint_interval": 1})
    result = TrainerEngine().run_job(config)
    assert (result.exit_code, result.state) == (1, "failed")
    assert "step 3" in result.error_message
    assert all(map(torch.equal, seen["model"].parameters(), seen["before"]))
    assert result.checkpoint_path.name == "step-00000002"
    assert TrainingStatusReader(result.output_dir).read().state == "failed"


def test_mutant_n19_no_guard_is_killed(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SupervisedTrainer, "_guard", lambda self, loss, norm: None)
    with pytest.raises(AssertionError):
        check_n19(job, monkeypatch, 1.0, math.nan)


CHANGED = {"learning_rate": 3e-4, "lr_scheduler": "cosine", "warmup_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_n18_a_rate_that_is_changed_on_purpose_is_that_of_the_new_schedule(
    train: Callable[..., Any], optimizer: str
) -> None:
    hyper = {"max_steps": 6, "warmup_steps": 1, "learning_rate": 1e-3, "optimizer": optimizer}
    assert train(hyperparams=hyper, monitoring=QUIET, output=KEEP).success
    output = {**KEEP, "resume": "latest"}
    new = {**hyper, **CHANGED, "max_steps": 10}
    refused = train(hyperparams=new, monitoring=QUIET, output=output)
    assert refused.exit_code == 2
    for word in ("learning_rate: 0.001 -> 0.0003", "lr_scheduler", "warmup", "--allow-changes"):
        assert word in refused.error_message, refused.error_message
    output["allow_changes"] = True
    other = train(hyperparams={**new, "max_grad_norm": 0.5}, monitoring=QUIET, output=output)
    assert other.exit_code == 2
    assert "max_grad_norm" in other.error_message
    again = train(hyperparams=new, monitoring=QUIET, output=output)
    assert (again.success, again.global_step) == (True, 10), again.error_message
    lines = TrainingStatusReader(again.output_dir).metrics()
    rates = {line["step"]: line["learning_rate"] for line in lines if line["type"] == "StepDone"}
    for step in range(7, 11):
        wanted = closed_form("cosine", step, 3e-4, 2, 10)
        assert rates[step] == pytest.approx(wanted, rel=1e-12), step
    path = again.output_dir / "checkpoints" / "step-00000008" / "optimizer.pt"
    groups = torch.load(path, weights_only=True)["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([rates[9]] * len(groups))
    # A third part, from a checkpoint of the second, knows of both.
    output["resume"] = str(again.output_dir / "checkpoints" / "step-00000008")
    third = train(hyperparams={**new, "learning_rate": 1e-4}, monitoring=QUIET, output=output)
    assert third.success, third.error_message
    record = json.loads((third.output_dir / "run.json").read_text())
    assert [entry["step"] for entry in record["changes"]] == [6, 8]
    assert len(record["changes"][0]["changes"]) == 4
    assert record["changes"][1]["changes"] == ["hyperparams.learning_rate: 0.0003 -> 0.0001"]
    assert record["config"]["output"]["allow_changes"] is False
