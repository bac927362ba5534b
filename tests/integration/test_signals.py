"""Ctrl-C, SIGTERM, SIGHUP: saved at the end of the step, exit 130, 143, 129, and resumable."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.core.checkpoint import find_latest_checkpoint

ROOT = Path(__file__).parents[2]
WAIT_S = 120
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'unit' / 'scores'}"
"""With the score function, which is code: a resume has to be allowed it."""


@pytest.fixture
def started(qa_file: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A function that starts a long run and waits until it has made a few steps."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = ["--dataset", str(qa_file), "--model", "tiny", "--output", str(tmp_path / "out")]
        words += ["--max-steps", "100000", "--batch-size", "2", "--fp32"]
        words += ["--monitoring.inference_interval", "50000"]
        words += ["--monitoring.scores", "rewards:is_short"]
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": PATHS},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        deadline = time.monotonic() + WAIT_S
        while _steps(tmp_path / "out") < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step in time"
            time.sleep(0.1)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step_and_names_resume(
    number: signal.Signals,
    code: int,
    started: Callable[[], subprocess.Popen[str]],
    tmp_path: Path,
    cli: Callable[..., Any],
) -> None:
    process = started()
    process.send_signal(number)
    error = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == code, error
    assert "Traceback" not in error
    command = shlex.split(re.search(r"continue with: trainer (train .*)", error)[1])
    out = tmp_path / "out"
    _, manifest, _ = find_latest_checkpoint(out / "checkpoints")
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "stopped"
    assert status["summary"]["ended_by"] == number.name
    assert not (out / "final_model").exists()
    assert status["step"] == manifest.step
    # The command said is one that works.
    more = ["--max-steps", str(manifest.step + 2)]
    done = cli(*command, *more, env={"PYTHONPATH": PATHS})
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "status.json").read_text())["step"] == manifest.step + 2


@pytest.mark.slow
def test_a_second_signal_aborts_and_leaves_a_verified_checkpoint_or_none(
    started: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = started()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode in (130, 143), error
    assert "Traceback" not in error
    root = tmp_path / "out" / "checkpoints"
    if root.is_dir() and any(root.glob("step-*")):
        find_latest_checkpoint(root)


@pytest.mark.slow
def test_a_hangup_that_is_ignored_changes_nothing(
    qa_file: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    words = ["--dataset", qa_file, "--model", "tiny", "--output", tmp_path / "out", "--fp32"]
    words += ["--max-steps", "3", "--monitoring.preview_max_tokens", "4"]
    script = (  # what nohup does, then a hangup in the first step
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trainer.monitoring import callbacks\n"
        "begin = callbacks.LiveMonitorCallback.on_train_begin\n"
        "def hung_up(self, *args, **options):\n"
        "    os.kill(os.getpid(), signal.SIGHUP); begin(self, *args, **options)\n"
        "callbacks.LiveMonitorCallback.on_train_begin = hung_up\n"
        "from trainer.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
    )
    done = cli(*words, command=[sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "status.json").read_text())["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [[], pytest.param(["--dry-run"], marks=pytest.mark.long)],
    ids=["train", "dry run"],
)
def test_a_signal_before_the_first_step_ends_at_once_with_one_line(
    words: list[str], qa_file: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    script = (
        "import os, signal, sys\n"
        "from trainer.cli import main; main(['version'])  # quiets libraries before their import\n"
        "import trainer.core.preparation as preparation\n"
        "def interrupted(*args, **options): os.kill(os.getpid(), signal.SIGTERM)\n"
        "preparation.prepare_data = interrupted\n"
        "sys.exit(main(['train', *sys.argv[1:]]))"
    )
    usual = ["--dataset", qa_file, "--model", "tiny", "--output", tmp_path / "out"]
    done = cli(*usual, *words, command=[sys.executable, "-c", script])
    assert done.returncode == 143
    assert done.stderr.strip() == "stopped: by SIGTERM"
    assert not (tmp_path / "out").exists()
