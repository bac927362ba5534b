"""A run folder of an older version: readable everywhere, and never continued by new rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.core.checkpoint import find_checkpoint
from trainer.core.resume import CHANGES, SEMANTICS
from trainer.errors import OutputError
from trainer.monitoring import TrainingStatusReader

FIXTURE = Path(__file__).parents[1] / "data" / "run_before_semantics"
RUN = "run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the old run was started: model/, rows.jsonl, run/."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def change_numbers(folder: Path, number: int | None) -> None:
    """Make the old run one of another number, hashes kept right."""
    for path in folder.glob("checkpoints/*/manifest.json"):
        record = json.loads(path.read_text())
        record["metadata"]["semantics"] = number
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "resume",
    [
        ["--resume"],
        pytest.param(["--resume", "run/checkpoints/step-00000004"], marks=pytest.mark.long),
    ],
)
def test_an_old_run_is_not_resumed_and_one_line_says_what_changed(
    cli: Callable[..., Any], old: Path, resume: list[str]
) -> None:
    before = files_of(old)
    done = cli("train", "--output", RUN, "--max-steps", "12", *resume, cwd=old)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "semantics 1" in line
    assert all(words in line for words in CHANGES[2])
    assert "--model run/checkpoints/step-0000000" in line
    assert files_of(old) == before


@pytest.mark.long
def test_what_the_refusal_advises_works(cli: Callable[..., Any], old: Path) -> None:
    base = ["--dataset", "rows.jsonl", "--max-steps", "2", "--fp32", "--quiet", "--batch-size", "4"]
    for weights in ("run/checkpoints/step-00000008", "run/final_model"):
        output = weights.replace("/", "-")
        done = cli("train", *base, "--model", weights, "--output", output, cwd=old)
        assert done.returncode == 0, done.stderr
        assert json.loads((old / output / "run.json").read_text())["semantics"] == SEMANTICS


@pytest.mark.slow
def test_a_newer_number_is_refused_too(cli: Callable[..., Any], old: Path) -> None:
    change_numbers(old / RUN, SEMANTICS + 1)
    done = cli("train", "--output", RUN, "--max-steps", "12", "--resume", cwd=old)
    assert done.returncode == 2
    assert f"newer version (semantics {SEMANTICS + 1}" in done.stderr


@pytest.mark.slow
def test_an_old_run_is_read_exported_watched_and_reported(
    cli: Callable[..., Any], old: Path
) -> None:
    for words in (["export", RUN, "--output", "copy"], ["report", RUN], ["watch", RUN, "--once"]):
        done = cli(*words, cwd=old)
        assert done.returncode == 0, done.stderr
    done = cli("chat", RUN, cwd=old, input="what is 1 plus 1?\n")
    assert done.returncode == 0, done.stderr
    assert TrainingStatusReader(old / RUN).read().state == "completed"


def test_an_old_runs_checkpoints_are_found_by_step_and_as_best(old: Path) -> None:
    assert find_checkpoint(old / RUN, 4).path == old / RUN / "checkpoints/step-00000004"
    best = find_checkpoint(old / RUN, "best")
    assert (best.step, best.why) == (8, "lowest validation loss, 4.5512")
    (old / RUN / "best.json").write_text('{"step": 4}')
    assert find_checkpoint(old / RUN, "best").step == 4
    with pytest.raises(OutputError, match="step 5 has no checkpoint; checkpoints: step 4, 8"):
        find_checkpoint(old / RUN, 5)
    (old / RUN / "checkpoints/step-00000004/model.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="damaged"):
        find_checkpoint(old / RUN, "best")
