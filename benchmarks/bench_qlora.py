"""QLoRA beside LoRA in fp32: final losses over seeds, and the bytes of the base.

    python benchmarks/bench_qlora.py --data gsm8k.jsonl [--base FOLDER] [--steps 60] [--seeds 3]

Without --base a small base is made first: the built-in model, trained in full on the first half of
the rows. Adapters are then trained on the second half, the arms take turns, and each run's losses
are its mean training loss over the last 10 steps and its validation loss after the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trainer.config import create_default_config
from trainer.config.training_sections import ModelSection
from trainer.core import TrainerEngine
from trainer.models.load import load_model
from trainer.models.quantized import quantized_layers
from trainer.monitoring.events import Event, StepDone
from trainer.publish.identity import canonical_tensors

ARMS = {"lora fp32": "lora", "qlora fp32": "qlora"}
LAST = 10


class Losses:
    """The training loss of each step."""

    def __init__(self) -> None:
        """Begin with none."""
        self.values: list[float] = []

    def on_event(self, event: Event) -> None:
        """Note a step."""
        if isinstance(event, StepDone):
            self.values.append(event.train_loss)

    def close(self) -> None:
        """Nothing to give back."""


def main() -> int:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first, second = halves(words.data, root)
        base = words.base or train_base(first, root / "base", words.base_steps)
        found: dict[str, Any] = {"bytes": sizes(base), "runs": []}
        for seed in range(words.seeds):
            for name, mode in ARMS.items():
                run = train(second, root / f"{mode}-{seed}", base, mode, words.steps, seed)
                found["runs"].append({"arm": name, "seed": seed, **run})
                print(found["runs"][-1], flush=True)
    for key in ("train_loss", "val_loss"):
        pairs = [
            (two[key] / one[key] - 1)
            for one, two in zip(found["runs"][::2], found["runs"][1::2], strict=True)
        ]
        found[f"{key}, qlora over lora"] = {
            "mean": round(statistics.mean(pairs), 5),
            "of each seed": [round(value, 5) for value in pairs],
        }
    print(json.dumps({key: value for key, value in found.items() if key != "runs"}, indent=2))
    if words.out is not None:
        words.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def halves(data: Path, folder: Path) -> tuple[Path, Path]:
    """The rows in two files."""
    rows = data.read_text(encoding="utf-8").splitlines()
    parts = (folder / "first.jsonl", folder / "second.jsonl")
    for path, part in zip(parts, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return parts


def settings(data: Path, output: Path, **hyperparams: Any) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "dataset_path": str(data),
        "output_dir": str(output),
        "hyperparams": {"fp_precision": "fp32", "max_length": 512, **hyperparams},
        "data": {"on_bad_row": "skip", "max_rows": 2000},
        "monitoring": {
            "inference_interval": 0,
            "micro_eval_interval": hyperparams["max_steps"],
            "status_update_interval": 1,
            "report_to": ("none",),
        },
        "output": {"report": False},
    }


def train_base(data: Path, output: Path, steps: int) -> Path:
    """The built-in model, trained in full."""
    config = create_default_config(
        model_path="tiny", **settings(data, output, max_steps=steps, batch_size=16)
    )
    result = TrainerEngine().run_job(config)
    assert result.model_path is not None, result.error_message
    return result.model_path


def train(
    data: Path, output: Path, base: Path, mode: str, steps: int, seed: int
) -> dict[str, float]:
    """One run of adapters; its losses."""
    options = settings(data, output, max_steps=steps, training_mode=mode, learning_rate=2e-3)
    losses = Losses()
    config = create_default_config(model_path=str(base), environment={"seed": seed}, **options)
    result = TrainerEngine(observers=[losses]).run_job(config)
    assert result.success, result.error_message
    assert result.val_loss is not None, "the last step has an evaluation"
    return {
        "train_loss": round(statistics.mean(losses.values[-LAST:]), 5),
        "val_loss": round(result.val_loss, 5),
    }


def sizes(base: Path) -> dict[str, float]:
    """Bytes of the base in fp32 and in nf4, and of one quantized weight of a linear layer."""
    import torch

    section = ModelSection(model_path=str(base))
    plain = load_model(section, dtype=torch.float32)
    model = load_model(section, dtype=torch.float32, quantize=True)
    state = canonical_tensors(model)
    layers = list(quantized_layers(model))
    count = sum(layer.in_features * layer.out_features for _, layer in layers)
    held = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if any(name.startswith(f"{layer}.weight") for layer, _ in layers)
    )
    return {
        "plain": sum(p.numel() * p.element_size() for p in plain.parameters()),
        "quantized": sum(one.numel() * one.element_size() for one in state.values()),
        "a linear weight": round(held / count, 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
