"""Seconds until `trainer --help` and `trainer config explain` end, against their own libraries.

    python benchmarks/bench_startup.py [--blocks 7] [--out FILE.json]

Every arm is a process of its own; arms take turns. The yardstick imports only what the command
itself needs (pydantic, pydantic-settings' parent libraries and rich; never torch).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
YARDSTICK_CODE = (
    "import argparse, difflib, json, rich.console, rich.table, rich.text; "
    "from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator"
)
"""The names that the commands use: pydantic loads its parts only when they are asked for."""
ARMS = {
    "python alone": ["-c", "pass"],
    "import pydantic, rich": [
        "-c",
        YARDSTICK_CODE,
    ],
    "trainer --help": ["-m", "trainer", "--help"],
    "trainer config explain": ["-m", "trainer", "config", "explain"],
    "trainer train --help": ["-m", "trainer", "train", "--help"],
}
YARDSTICK = "import pydantic, rich"


def main() -> int:
    """Measure and print; writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    words = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for block in range(words.blocks + 1):
        for name, arguments in ARMS.items():
            took = run_once(arguments)
            if block:  # the first block only warms the file cache
                seconds[name].append(took)
    print(f"{'arm':<24} {'median s':>9} {'range':>13}   of {YARDSTICK!r}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        ratio = medians[name] / medians[YARDSTICK]
        print(f"{name:<24} {medians[name]:>9.2f} {spread:>13}   {ratio:.2f}x")
    if words.out:
        words.out.write_text(json.dumps(seconds, indent=1) + "\n")
    return 0


def run_once(arguments: list[str]) -> float:
    """Seconds of one process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
