"""How fast and how small the monitor reads a long run: 100,000 metric rows, 5,005 previews.

    python benchmarks/bench_monitor.py [--rows 100000] [--blocks 5] [--out FILE.json]

Arms take turns, each in a process of its own: `RunReader` (what the live page and the report read
with), `TrainingStatusReader` (whole files, plain dicts), and a loop of json.loads over the same
lines that keeps nothing. Then `trainer monitor` is started on the run, its page is asked for, and
its resident memory is read. Seconds are of the wall clock; CPU seconds stand beside them, as they
depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
MEASURE = """
import sys, time, psutil
{setup}
wall, cpu = time.perf_counter(), time.process_time()
{work}
print(time.perf_counter() - wall, time.process_time() - cpu,
      psutil.Process().memory_info().rss / 2**20, count)
"""
ARMS = {
    "RunReader": (
        "from pathlib import Path; from trainer.views.run_reader import RunReader",
        "r = RunReader(Path(sys.argv[1])); r.poll(); count = len(r.metrics)",
    ),
    "TrainingStatusReader": (
        "from trainer.monitoring import TrainingStatusReader",
        "r = TrainingStatusReader(sys.argv[1]); count = len(list(r.metrics()));"
        " kept = list(r.previews())",
    ),
    "json.loads, keeps nothing": (
        "import json",
        "count = sum(1 for name in ('metrics', 'previews')"
        " for line in open(f'{sys.argv[1]}/{name}.jsonl') if json.loads(line)"
        " and name == 'metrics')",
    ),
}


def main() -> int:
    """Measure and print; writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    words = parser.parse_args()
    figures: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), words.rows)
        size = (Path(folder) / "metrics.jsonl").stat().st_size / 2**20
        print(
            f"{words.rows:,} rows ({size:.0f} MiB), {len(os.sched_getaffinity(0))} cores, ", end=""
        )
        print(f"load {os.getloadavg()[0]:.1f}")
        for block in range(words.blocks + 1):
            for name, (setup, work) in ARMS.items():
                found = measure(folder, setup, work)
                if block:  # the first block only warms the file cache
                    figures[name].append(found)
        print(f"{'arm':<28} {'rows':>8} {'s (range)':>20} {'CPU s':>7} {'MiB':>6}")
        for name, rows in figures.items():
            wall, cpu, memory, count = (list(column) for column in zip(*rows, strict=True))
            spread = f"{statistics.median(wall):.2f} ({min(wall):.2f}-{max(wall):.2f})"
            print(
                f"{name:<28} {count[0]:>8,.0f} {spread:>20} {statistics.median(cpu):>7.2f} "
                f"{max(memory):>6.0f}"
            )
        page = measure_page(folder)
        print(f"trainer monitor: page of {page[0] / 1024:.0f} KiB in {page[1]:.2f} s, ", end="")
        print(f"resident {page[2]:.0f} MiB")
    if words.out:
        words.out.write_text(json.dumps({**figures, "page": page}, indent=1) + "\n")
    return 0


def write_run(folder: Path, rows: int) -> None:
    """A finished run as a run writes it."""
    noise = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            row = {
                "type": "StepDone",
                "created_at": 1.7e9 + 0.2 * step,
                "step": step,
                "total_steps": rows,
                "epoch": 3 * step / rows,
                "train_loss": 0.3 + 5 * math.exp(-step / 9000) + noise.gauss(0, 0.08),
                "learning_rate": 5e-3 * (1 - step / rows),
                "grad_norm": 12 * noise.random(),
                "tokens_per_s": 15_000 + 1_500 * noise.random(),
                "num_tokens": 2944,
                "num_trained_tokens": 1088,
                "step_time_s": 0.19 + 0.01 * noise.random(),
                "eta_s": 0.2 * (rows - step),
                "memory_gib": 0.686126708984375,
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "previews.jsonl").open("w") as file:
        for step in range(0, rows + 1, max(1, rows // 1000)):
            for number in range(5):
                answer = f"the answer of step {step} to prompt {number}, in a few more words"
                preview = {"step": step, "prompt": f"prompt {number}?", "text": answer}
                preview |= {"golden_answer": answer, "matches": step > 0}
                file.write(json.dumps({**preview, "prompt_id": f"validation-{number}"}) + "\n")
    status = {
        "schema_version": 1,
        "state": "completed",
        "phase": "completed",
        "step": rows,
        "total_steps": rows,
        "started_at": 1.7e9,
        "updated_at": 1.7e9 + 0.2 * rows,
        "pid": 1,
    }
    (folder / "status.json").write_text(json.dumps(status))


def measure(folder: str, setup: str, work: str) -> list[float]:
    """Wall seconds, CPU seconds, resident MiB and rows of one process."""
    code = MEASURE.format(setup=setup, work=work)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(word) for word in done.stdout.split()]


def measure_page(folder: str) -> list[float]:
    """Bytes and seconds of the page (median of five), and the monitor's resident MiB after it."""
    words = [sys.executable, "-m", "trainer", "monitor", folder, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "it is a pipe"
        url = process.stdout.readline().split()[1]
        seconds, size = [], 0
        for _ in range(6):
            started = time.perf_counter()
            with urllib.request.urlopen(url, timeout=60) as answer:
                size = len(answer.read())
            seconds.append(time.perf_counter() - started)
        memory = psutil.Process(process.pid).memory_info().rss / 2**20
        return [size, statistics.median(seconds[1:]), memory]
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
