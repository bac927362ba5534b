"""What may change between a checkpoint and its resume, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainerConfig
from trainer.core.batch_size import keep_found_batch_size, with_batch_size
from trainer.core.resume import ResumePoint, check_resumable, package_versions
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
