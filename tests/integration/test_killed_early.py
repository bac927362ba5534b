"""A run that was killed before its first checkpoint is in nobody's way."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PROFILE = "tests.integration.killed_profile:KilledProfile"


@pytest.fixture
def words(qa_file: Path, tmp_path: Path) -> list[str]:
    """A run of three steps in `out`."""
    return [
        *("train", "--dataset", str(qa_file), "--model", "tiny", "--output", str(tmp_path / "out")),
        *("--max-steps", "3", "--batch-size", "2", "--fp32", "--profile", PROFILE),
        *("--monitoring.inference_interval", "0", "--output.checkpoint_interval", "2"),
    ]


def _steps(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["type"] == "StepDone"]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("weights", signal.SIGKILL),
        pytest.param("rows", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("weights", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("rows", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_start_takes_the_folder_of_a_run_that_ended_before_its_first_step(
    moment: str,
    number: signal.Signals,
    words: list[str],
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KILL_AT", moment)
    monkeypatch.setenv("KILL_BY", str(int(number)))
    killed = cli(*words)
    assert killed.returncode in (-9, 130), killed.stderr
    monkeypatch.delenv("KILL_AT")
    again = cli(*words)
    assert again.returncode == 0, again.stderr
    assert _steps(tmp_path / "out") == [1, 2, 3]


@pytest.mark.parametrize("moment", ["checkpoint", pytest.param("weights", marks=pytest.mark.long)])
def test_a_run_without_a_checkpoint_starts_again_by_resume_and_a_start_says_so(
    moment: str,
    words: list[str],
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("KILL_AT", moment)
    assert cli(*words).returncode == -signal.SIGKILL
    monkeypatch.delenv("KILL_AT")
    command = ["train", "--resume", "--allow-code", "--output", str(out)]
    if moment == "checkpoint":
        refused = cli(*words)
        assert refused.returncode == 2
        assert "ended after step 2, before its first checkpoint" in refused.stderr
        assert "Traceback" not in refused.stderr
        command = shlex.split(refused.stderr.split("`trainer ")[1].split("`")[0])
        assert _steps(out) == [1, 2]  # nothing was touched
    resumed = cli(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "starts again from step 0" in resumed.stdout + resumed.stderr
    assert _steps(out) == [1, 2, 3]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    assert json.loads((out / "run.json").read_text())["state"] == "completed"
