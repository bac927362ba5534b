"""What may change between a checkpoint and its resume, and what may not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import TrainerConfig
from trainer.core.batch_size import keep_found_batch_size, with_batch_size
from trainer.core.checkpoint import Manifest
from trainer.core.hf_trainer import SupervisedTrainer, _rng_state
from trainer.core.resume import ResumePoint, _processes_of, check_resumable, package_versions
from trainer.errors import ResumeError

CONFIG = TrainerConfig()


def changed(section: str, **values: Any) -> TrainerConfig:
    part = getattr(CONFIG, section).model_copy(update=values)
    return CONFIG.model_copy(update={section: part})


def check(config: TrainerConfig, fingerprint: str = "rows") -> list[str]:
    return check_resumable(point(), config, fingerprint, num_steps=20)


def point(**more: Any) -> ResumePoint:
    record = {"config": CONFIG.model_dump(mode="json"), "data_fingerprint": "rows", **more}
    return ResumePoint(Path("step-00000010"), 10, record, {})


def test_an_unchanged_run_goes_on_without_a_word() -> None:
    assert check(CONFIG) == []


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("hyperparams", {"batch_size": 3}),
        ("hyperparams", {"learning_rate": 0.5}),
        ("hyperparams", {"optimizer": "muon"}),
        ("environment", {"seed": 7}),
        ("lora", {"r": 3}),
        ("profile", {"name": "regime3"}),
        ("data", {"validation_split": 0.3}),
    ],
)
def test_what_decides_the_training_may_not_change(section: str, values: dict[str, Any]) -> None:
    with pytest.raises(ResumeError, match=f"{section}.{next(iter(values))}"):
        check(changed(section, **values))


def test_the_same_steps_may_be_cut_in_another_way_and_that_is_told() -> None:
    """batch_size x gradient_accumulation stays 8."""
    found = check(changed("hyperparams", batch_size=2, gradient_accumulation=4))
    assert found == [
        "hyperparams.batch_size: 8 -> 2",
        "hyperparams.gradient_accumulation: 1 -> 4",
    ]
    assert check(changed("hyperparams", auto_batch_size=True)) != []


def test_auto_batch_size_keeps_what_the_run_had_found_where_the_steps_are_the_same() -> None:
    def kept(found: tuple[int, int], **values: Any) -> tuple[int, int]:
        record = with_batch_size(CONFIG, *found).model_dump(mode="json")
        now = changed("hyperparams", **values)
        hyper = keep_found_batch_size(now, point(config=record)).hyperparams
        return hyper.batch_size, hyper.gradient_accumulation

    assert kept((2, 4), auto_batch_size=True) == (2, 4)
    assert kept((2, 4)) == (8, 1)
    assert kept((2, 4), auto_batch_size=True, batch_size=1, gradient_accumulation=8) == (1, 8)
    assert kept((2, 5), auto_batch_size=True) == (8, 1)


def test_the_length_of_the_run_may_change_and_is_told() -> None:
    assert check(changed("hyperparams", max_steps=99)) == ["hyperparams.max_steps: None -> 99"]


def test_monitoring_and_output_may_change() -> None:
    assert check(changed("monitoring", inference_interval=7)) == []
    assert check(changed("output", output_dir="moved")) == []


def test_changed_rows_are_refused() -> None:
    with pytest.raises(ResumeError, match="rows are not those of the checkpoint"):
        check(CONFIG, "other rows")


def test_a_run_shorter_than_what_is_done_is_refused() -> None:
    with pytest.raises(ResumeError, match="10 steps are done already"):
        check_resumable(point(), CONFIG, "rows", num_steps=9)
    assert check_resumable(point(), CONFIG, "rows", num_steps=10) == []


def test_another_version_of_a_package_is_told_and_goes_on() -> None:
    now = package_versions()
    assert check_resumable(point(versions=now), CONFIG, "rows", num_steps=20) == []
    older = {**now, "packages": {**now["packages"], "torch": "2.0.0"}}
    [change] = check_resumable(point(versions=older), CONFIG, "rows", num_steps=20)
    assert change.startswith("version of torch: 2.0.0 -> ")


def check_world(before: int, after: int, **values: int) -> list[str]:
    made = dataclasses.replace(point(), num_processes=before)
    config = changed("hyperparams", **values)
    return check_resumable(made, config, "rows", num_steps=20, num_processes=after)


def test_another_number_of_processes_goes_on_with_the_same_steps() -> None:
    """Of 16 rows: 2 x 8 x 1."""
    [told] = check_world(2, 2 * 2, batch_size=4)[:1]
    assert told == "hyperparams.batch_size: 8 -> 4"
    assert any("processes: 2 -> 4" in one for one in check_world(2, 4, batch_size=4))
    assert check_world(2, 1, gradient_accumulation=2)[1].startswith("processes: 2 -> 1")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            1,
            2,
            "checkpoint has 8 (1 processes x batch_size 8 x gradient_accumulation 1), this run "
            "16 (2 processes x batch_size 8 x gradient_accumulation 1). With 2 processes give "
            "--batch-size 4 --gradient-accumulation 1",
        ),
        (4, 1, "With 1 processes give --batch-size 8 --gradient-accumulation 4"),
        (2, 3, "Start a number of processes that divides 16: 1, 2, 4, 8, 16"),
    ],
)
def test_other_steps_of_another_number_of_processes_are_refused_with_the_way_out(
    before: int, after: int, words: str
) -> None:
    with pytest.raises(ResumeError, match=re.escape(words)):
        check_world(before, after)


def test_the_strategy_may_change() -> None:
    assert check(changed("distributed", strategy="fsdp2", cpu_offload=True)) == []


def test_how_many_processes_made_an_older_checkpoint_is_told_by_its_random_states() -> None:
    files = {name: {} for name in ("rng_state_0.pth", "rng_state_1.pth", "optimizer.pt")}
    assert _processes_of(Manifest(1, files, {})) == 2
    assert _processes_of(Manifest(1, {"rng_state.pth": {}}, {})) == 1
    assert _processes_of(Manifest(1, files, {"world_size": 4})) == 4


def test_a_process_that_the_run_had_not_before_gets_a_random_state_of_its_own(
    tmp_path: Path,
) -> None:
    def drawn(rank: int, step: int = 5) -> float:
        position = SimpleNamespace(global_step=step)
        arguments = SimpleNamespace(process_index=rank, seed=1, device=torch.device("cpu"))
        SupervisedTrainer._load_rng_state(
            SimpleNamespace(args=arguments, state=position), str(tmp_path)
        )
        return float(torch.rand(()))

    assert drawn(2) == drawn(2)
    assert len({drawn(2), drawn(3), drawn(2, step=6)}) == 3
    torch.manual_seed(9)
    torch.save(_rng_state(), tmp_path / "rng_state_2.pth")
    kept = float(torch.rand(()))
    assert drawn(2) == kept
    torch.manual_seed(10)
    torch.save(_rng_state(), tmp_path / "rng_state.pth")  # of a run of one process
    kept = float(torch.rand(()))
    assert drawn(0) == kept != drawn(1)
