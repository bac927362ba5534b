"""Final losses of the 7M-parameter Qwen3: weights in fp32 or bf16 alone, moments in 32 or 8 bits.

    python benchmarks/bench_masters.py [--data FILE.jsonl] [--steps 30] [--seeds 3] [--out FILE]

The model of bench_train.py, trained in full from random weights by the program itself. A figure is
the loss on held-out rows after the last step; split, order of rows and rounding come from the seed.
Every arm is compared with fp32 of the same seed. Without --data: the rows of `trainer demo`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"fp_precision": "fp32"},
    "fp32, adamw_8bit": {"fp_precision": "fp32", "optimizer": "adamw_8bit"},
    "bf16_stochastic": {"masters": "bf16_stochastic"},
    "bf16_stochastic, adamw_8bit": {"masters": "bf16_stochastic", "optimizer": "adamw_8bit"},
}
ROWS, MAX_LENGTH, BATCH_SIZE, LEARNING_RATE = 1000, 256, 4, 1e-3


def final_loss(model_dir: Path, data: Path, steps: int, seed: int, **hyper: Any) -> float:
    """Held-out loss (nats a token) at the end of a run."""
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine

    with tempfile.TemporaryDirectory() as folder:
        config = create_default_config(
            model_path=str(model_dir),
            dataset_path=str(data),
            output_dir=f"{folder}/run",
            hyperparams={
                "batch_size": BATCH_SIZE,
                "max_steps": steps,
                "learning_rate": LEARNING_RATE,
                "max_length": MAX_LENGTH,
                **hyper,
            },
            data={"validation_split": 0.1, "cache": False, "max_rows": ROWS, "on_bad_row": "skip"},
            monitoring={
                "inference_interval": 0,
                "micro_eval_interval": steps,
                "micro_eval_rows": 32,
                "report_to": (),
            },
            environment={"seed": seed, "num_threads": 1},
        )
        result = TrainerEngine().run_job(config)
        assert result.success, result.error_message
        lines = (Path(result.output_dir) / "metrics.jsonl").read_text().splitlines()
    losses = [line for line in map(json.loads, lines) if line["type"] == "EvaluationDone"]
    return float(losses[-1]["val_loss"])


def main() -> None:
    """Parse arguments, run every arm with every seed, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows with question and answer, such as GSM8K's")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    words = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.bench_train import save_model

    figures: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        data, model_dir = Path(folder) / "rows.jsonl", Path(folder) / "model"
        data.write_text("".join(f"{line}\n" for line in _lines(words.data, Path(folder))))
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        save_model(model_dir, rows)
        for seed in range(words.seeds):
            for name, hyper in ARMS.items():
                figures[name].append(final_loss(model_dir, data, words.steps, seed, **hyper))
                print(f"seed {seed}: {name:<27} {figures[name][-1]:.4f}", flush=True)
    print(f"\n{words.steps} steps of {BATCH_SIZE} rows, torch {torch.__version__}")
    for name, values in figures.items():
        off = [100 * (a / b - 1) for a, b in zip(values, figures["fp32"], strict=True)]
        print(
            f"{name:<27} {statistics.mean(values):.4f}  against fp32: "
            f"{statistics.mean(off):+.2f} % ({min(off):+.2f} to {max(off):+.2f})"
        )
    if words.out:
        record = {"steps": words.steps, "torch": torch.__version__, "losses": figures}
        words.out.write_text(json.dumps(record, indent=2) + "\n")


def _lines(data: Path | None, folder: Path) -> list[str]:
    if data is None:
        from trainer.models import write_demo_data

        data = write_demo_data(folder / "demo", num_train_rows=ROWS, seed=0).train_path
    return data.read_text().splitlines()[:ROWS]


if __name__ == "__main__":
    main()
