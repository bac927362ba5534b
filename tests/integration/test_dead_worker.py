"""Trust item F24: a DataLoader worker that is killed ends the run truthfully, and it resumes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from trainer.core.checkpoint import find_latest_checkpoint
from trainer.monitoring import TrainingStatusReader

WAIT_S = 60


@pytest.mark.slow
def test_a_killed_dataloader_worker_fails_the_run_and_says_so(
    train: Callable[..., Any], tmp_path: Any
) -> None:
    metrics = tmp_path / "out" / "metrics.jsonl"
    before = {child.pid for child in psutil.Process().children()}  # of other tests

    def kill_one() -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            children = [one for one in psutil.Process().children() if one.pid not in before]
            if children and metrics.exists() and metrics.read_text().count("StepDone") > 3:
                children[0].kill()
                return
            time.sleep(0.01)

    threading.Thread(target=kill_one, daemon=True).start()
    options: dict[str, Any] = {
        "monitoring": {"inference_interval": 0, "micro_eval_interval": 0},
        "environment": {"num_workers": 2},
        "output": {"checkpoint_interval": 1},
    }
    result = train(hyperparams={"max_steps": 3000}, **options)
    assert (result.state, result.exit_code) == ("failed", 1), result
    assert "DataLoader worker" in result.error_message
    assert TrainingStatusReader(tmp_path / "out").read().state == "failed"
    _, manifest, _ = find_latest_checkpoint(tmp_path / "out" / "checkpoints")
    steps = manifest.step + 2
    options["output"] = {"checkpoint_interval": 1, "resume": "latest"}
    assert train(hyperparams={"max_steps": steps}, **options).global_step == steps
