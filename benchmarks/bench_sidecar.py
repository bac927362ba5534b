"""Wall time of the demo's training with previews from a sidecar, against one with an idle sidecar.

    python benchmarks/bench_sidecar.py [--pairs 8] [--steps 60] [--every 20] [--out FILE.json]

Both arms start the same sidecar and show the first and the last step; one of them also asks for
previews in between. Training has the first core and one thread, everything else the second core.
The arms take turns, in alternating order, each in a process of its own. Reported: the ratio of the
training times of each pair, their median, and a bootstrap interval of the median; the same for the
steps alone (without start and end of the run); and the stall of the training thread, which is the
time that asking for previews keeps it from the next step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.commands.demo import demo_config
from trainer.core import TrainerEngine
from trainer.models.tiny import write_demo_data
from trainer.monitoring.events import Event, StepDone

IDLE = 1_000_000


class Pinning:
    """Moves helper processes to the second core as they come, and notes the length of steps."""

    def __init__(self) -> None:
        """No step yet."""
        self.step_s: list[float] = []

    def on_event(self, event: Event) -> None:
        """After each step."""
        if isinstance(event, StepDone):
            self.step_s.append(event.step_time_s)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    child.cpu_affinity([1])

    def close(self) -> None:
        """Nothing to give back."""


def one_run(folder: Path, steps: int, every: int) -> dict[str, Any]:
    """Train in this process; seconds of the training loop, and what became of the previews."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {0})
    data = write_demo_data(
        folder / "data", num_train_rows=steps * 64, num_validation_rows=200, seed=0
    )
    config = demo_config(folder, data, steps=steps, seed=0, backend="sidecar")
    monitoring = config.monitoring.model_copy(
        update={"inference_interval": every, "micro_eval_interval": 0, "final_eval_prompts": 0}
    )
    environment = config.environment.model_copy(update={"num_threads": 1})
    config = config.model_copy(update={"monitoring": monitoring, "environment": environment})
    pinning = Pinning()
    result = TrainerEngine(observers=[pinning]).run_job(config)
    assert result.success, result.error_message
    return {
        "training_s": result.summary["durations_s"]["training"],
        "steps_s": sum(pinning.step_s),
        "previews": result.summary["previews"],
    }


def measured(steps: int, every: int) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--one", folder, "--steps", str(steps), "--every", str(every)]
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure pairs, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between previews")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    if words.one is not None:
        print(json.dumps(one_run(words.one / "run", words.steps, words.every)))
        return 0
    pairs = []
    for number in range(words.pairs):
        order = (words.every, IDLE) if number % 2 == 0 else (IDLE, words.every)
        runs = {every: measured(words.steps, every) for every in order}
        pair = {"asked": runs[words.every], "idle": runs[IDLE]}
        pairs.append(pair)
        print(f"pair {number + 1}:", end="")
        for key in ("training_s", "steps_s"):
            asked, idle = pair["asked"][key], pair["idle"][key]
            print(f" {key} {asked:.2f} asked, {idle:.2f} idle ({asked / idle:.4f})", end="")
        print(flush=True)
    for key in ("training_s", "steps_s"):
        ratios = [pair["asked"][key] / pair["idle"][key] for pair in pairs]
        low, high = interval(ratios)
        median = statistics.median(ratios)
        print(f"ratio of {key}: median {median:.4f}, 95 % {low:.4f} to {high:.4f}")
    counts = [pair["asked"]["previews"] for pair in pairs]
    print_stall(pairs)
    print(
        f"previews: {sum(c['verified'] for c in counts)} verified, "
        f"{sum(c['superseded'] for c in counts)} superseded, "
        f"{sum(c['failed'] for c in counts)} failed of {sum(c['asked'] for c in counts)}"
    )
    if words.out is not None:
        words.out.write_text(json.dumps(pairs, indent=2) + "\n")
    return 0


def print_stall(pairs: list[dict[str, Any]]) -> None:
    """What asking cost the training thread, in the arm that asked."""
    runs = [pair["asked"] for pair in pairs]
    per_preview = [run["previews"]["stall_ms_median"] for run in runs]
    worst = max(run["previews"]["stall_ms_p99"] for run in runs)
    shares = [100 * run["previews"]["stall_s_total"] / run["steps_s"] for run in runs]
    print(f"stall per preview step: median {statistics.median(per_preview):.1f} ms, ", end="")
    print(f"largest p99 of a run {worst:.1f} ms; of all step time ", end="")
    print(f"{statistics.median(shares):.2f} % ({min(shares):.2f} to {max(shares):.2f})")


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the median, 95 %."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


if __name__ == "__main__":
    raise SystemExit(main())
