"""--resume: what it leaves alone, what it refuses, and that a finished run stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.config import ConfigLoader
from trainer.core import TrainerEngine
from trainer.core.checkpoint import find_latest_checkpoint
from trainer.monitoring import TrainingStatusReader

RESUME = {"resume": "latest"}
SHORT: dict[str, Any] = {"hyperparams": {"max_steps": 3}, "monitoring": {"inference_interval": 0}}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_refused_resume_leaves_every_file_of_the_run_as_it_was(train: Callable[..., Any]) -> None:
    run = train(**SHORT)
    before = content(run.output_dir)
    again = train(output=RESUME, **{**SHORT, "hyperparams": {"max_steps": 3, "batch_size": 2}})
    assert again.exit_code == 2, again.error_message
    assert content(run.output_dir) == before


def test_a_resume_without_a_checkpoint_deletes_nothing(train: Callable[..., Any]) -> None:
    import shutil

    run = train(**SHORT)
    shutil.rmtree(run.output_dir / "checkpoints")  # as if killed before the first one
    before = content(run.output_dir)
    again = train(output=RESUME, **SHORT)
    assert again.exit_code == 2
    assert "nothing to resume" in again.error_message
    assert content(run.output_dir) == before


def test_resuming_a_finished_run_makes_no_step_and_the_same_model(
    train: Callable[..., Any], assert_same_weights: Callable[..., None], tmp_path: Path
) -> None:
    import shutil

    # 3 of 8 steps of the epoch: HF's loop would go on within it.
    run = train("once", **SHORT)
    shutil.copytree(run.output_dir, tmp_path / "again")
    again = train("again", output=RESUME, **SHORT)
    assert (again.success, again.global_step) == (True, 3), again.error_message
    assert_same_weights(run.model_path, again.model_path)
    _, manifest, _ = find_latest_checkpoint(again.output_dir / "checkpoints")
    assert manifest.step == 3
    assert TrainingStatusReader(again.output_dir).read().state == "completed"


def test_resuming_a_run_that_stopped_early_makes_no_step(train: Callable[..., Any]) -> None:
    hyper = {"early_stopping_patience": 2, "learning_rate": 1e-12, "max_steps": 50}
    options = {"hyperparams": hyper, "monitoring": {"micro_eval_interval": 2}}
    assert train(**options).global_step == 6
    again = train(output=RESUME, **options)
    assert (again.success, again.global_step) == (True, 6), again.error_message


def test_a_longer_run_goes_on_and_the_change_is_recorded(train: Callable[..., Any]) -> None:
    train(**SHORT)
    again = train(output=RESUME, **{**SHORT, "hyperparams": {"max_steps": 5}})
    assert (again.success, again.global_step) == (True, 5), again.error_message
    record = json.loads((again.output_dir / "run.json").read_text())
    assert record["changed_since_checkpoint"] == ["hyperparams.max_steps: 3 -> 5"]
    assert record["resumed_from_step"] == 3


def test_another_package_version_is_recorded(train: Callable[..., Any]) -> None:
    run = train(**SHORT)
    manifest = run.checkpoint_path / "manifest.json"
    record = json.loads(manifest.read_text())
    record["metadata"]["versions"]["packages"]["torch"] = "2.0.0"
    manifest.write_text(json.dumps(record))
    again = train(output=RESUME, **SHORT)
    [change] = json.loads((again.output_dir / "run.json").read_text())["changed_since_checkpoint"]
    assert change.startswith("version of torch: 2.0.0 -> ")


@pytest.mark.parametrize("data", [{}, {"shuffle": False}], ids=["resumed", "in order"])
def test_the_resolved_config_starts_the_same_run_anew(
    train: Callable[..., Any], tmp_path: Path, data: dict[str, Any]
) -> None:
    train(data=data, **SHORT)
    assert train(output=RESUME, data=data, **SHORT).success
    file = tmp_path / "out" / "config.resolved.json"
    loaded = ConfigLoader.load(file, flags=["--output", str(tmp_path / "other")])
    result = TrainerEngine().run_job(loaded.config)
    assert result.success, result.error_message
    assert result.global_step == 3


def test_a_dry_run_of_a_resume_writes_nothing(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(**SHORT)
    before = content(run.output_dir)
    words = ["--resume", "--output", str(run.output_dir), "--max-steps", "9", "--dry-run"]
    assert main(["train", *words]) == 0
    assert "9 of 4 rows" in capsys.readouterr().out
    assert content(run.output_dir) == before


def test_curves_of_a_resumed_run_drop_what_the_first_process_wrote_later(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {
        "monitoring": {"inference_interval": 0, "report_to": ("tensorboard",)},
        "hyperparams": {"max_steps": 8},
    }
    train(output={"checkpoint_interval": 2, "keep_checkpoints": 9}, **options)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{step:08d}")
    train(output={"checkpoint_interval": 2, "keep_checkpoints": 9, **RESUME}, **options)
    events = EventAccumulator(str(tmp_path / "out" / "logs"))
    events.Reload()
    steps = [scalar.step for scalar in events.Scalars("val_loss")]
    assert steps == sorted(set(steps))
