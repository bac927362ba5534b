"""How the cost of a run grows with its processes: tokens/s, stall, and the bytes that travel.

    python benchmarks/bench_distributed.py [--steps 12] [--repeats 3] [--bytes-only] [--out FILE]

The 7M-parameter Qwen3 of bench_train.py on made-up rows, in 1, 2 and 4 processes (gloo, CPU, one
thread each), with whole copies (DDP) and with shards (FSDP2), as many rows in each process. Runs
take turns; figures are medians. The bytes are counted at every collective and compared with
arithmetic, which is then done for an 8B model on eight GPUs of 80 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARMS = [("one", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)]
BATCH_SIZE, MAX_LENGTH, NUM_COUNTED = 4, 256, 2
TIMEOUT_S = 240
MASTER_BYTES, STATE_BYTES = 4, 8
"""Of one weight: fp32, and AdamW's two moments."""


@dataclass(frozen=True)
class Weights:
    """What the bytes of a model follow from."""

    blocks: int
    """Weights in all decoder layers."""
    embedding: int
    tail: int
    """Last norm and head; with the embedding in it where the two are tied."""
    is_tied: bool

    @property
    def all(self) -> int:
        """Weights of the model."""
        return self.blocks + self.tail + (0 if self.is_tied else self.embedding)


def weights_of(model: Any) -> Weights:
    """Count a decoder's weights as accelerate groups them for FSDP2."""
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tail = total - blocks - (0 if is_tied else embedding)
    return Weights(blocks, embedding, tail, is_tied)


def reckoned(weights: Weights, strategy: str, width: int) -> dict[str, int]:
    """Payload of the collectives of one micro-batch, of one preview and of one checkpoint.

    Args:
        width: bytes of a weight where layers are gathered: 2 in bf16, 4 in fp32.
    """
    saved = (MASTER_BYTES + STATE_BYTES) * weights.all
    if strategy == "ddp":
        summed = MASTER_BYTES * weights.all
        return {"all_gather": 0, "reduce_scatter": 0, "all_reduce": summed, "saved": saved}
    # Layers and embedding are gathered for the forward and for the backward pass; the tail once.
    twice = weights.blocks + (0 if weights.is_tied else weights.embedding)
    return {
        "all_gather": width * (2 * twice + weights.tail),
        "reduce_scatter": MASTER_BYTES * weights.all,
        "all_reduce": 0,
        "published": width * weights.all,
        "saved": saved,
    }


# ---- one arm, in its processes


class Steps:
    """An observer that keeps the speed of each step, and how long checkpoints took."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.save_s: list[float] = []

    def on_event(self, event: Any) -> None:
        """Take what is needed."""
        if type(event).__name__ == "StepDone":
            self.rates.append(event.tokens_per_s)
        if type(event).__name__ == "CheckpointSaved":
            self.save_s.append(event.duration_s)

    def close(self) -> None:
        """Nothing to close."""


def config_of(folder: Path, output: Path, strategy: str, steps: int, **monitoring: Any) -> Any:
    """A run of the benchmark."""
    from trainer.config import create_default_config

    hyper = {"batch_size": BATCH_SIZE, "max_steps": steps, "max_length": MAX_LENGTH}
    return create_default_config(
        model_path=str(folder / "model"),
        dataset_path=str(folder / "rows.jsonl"),
        output_dir=str(output),
        hyperparams={**hyper, "fp_precision": "fp32"},
        data={"validation_split": 0.1, "cache": False},
        monitoring={"micro_eval_interval": 0, "report_to": (), "display": "quiet", **monitoring},
        output={"checkpoint_interval": 0},
        environment={"num_threads": 1, "device": "cpu"},
        distributed={"strategy": "auto" if strategy == "one" else strategy},
    )


def count(folder: Path, strategy: str, world: int) -> dict[str, Any]:
    """Payload of the collectives of one step and of the gathering of all weights, by kind."""
    from benchmarks.collectives import Collectives
    from trainer.core import TrainerEngine
    from trainer.core.checks import MemoryProbe
    from trainer.core.sharding import gathered

    config = config_of(
        folder, folder / f"count-{strategy}-{world}", strategy, NUM_COUNTED, inference_interval=0
    )
    engine = TrainerEngine()
    trainer = engine.create_trainer(config)
    is_sharded = strategy == "fsdp2"
    assert trainer.accelerator.num_processes == world
    assert bool(getattr(trainer.accelerator, "is_fsdp2", False)) == is_sharded
    trainer.remove_callback(MemoryProbe)  # a pass of its own
    trainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]
    with Collectives() as steps:
        trainer.train()
    found: dict[str, Any] = {
        "step": {kind: size // NUM_COUNTED for kind, size in steps.num_bytes.items()},
        "calls": dict(steps.calls),
    }
    if is_sharded:
        with Collectives() as walk:
            for _ in gathered(trainer.model):
                pass
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            for _ in gathered(trainer.model):
                pass
            seconds.append(time.perf_counter() - started)
        found["published"] = dict(walk.num_bytes)
        found["gather_s"] = statistics.median(seconds)
    engine.close()
    return found


def timed(folder: Path, strategy: str, world: int, steps: int) -> dict[str, Any]:
    """Tokens/s, stall of a preview by a sidecar, and seconds and bytes of a checkpoint."""
    from trainer.core import TrainerEngine

    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    seen = Steps()
    config = config_of(
        folder,
        output,
        strategy,
        steps,
        inference_interval=max(1, steps // 3),
        preview_backend="sidecar",
        preview_max_tokens=8,
    )
    result = TrainerEngine(observers=[seen]).run_job(config)
    assert result.success, result.error_message
    previews = result.summary["previews"] or {}
    saved = [p for p in (output / "checkpoints").rglob("*") if p.is_file()] if seen.rates else []
    return {
        "tokens_per_s": statistics.median(seen.rates[1:]) if seen.rates else None,
        "stall_ms": previews.get("stall_ms_median"),
        "save_s": statistics.median(seen.save_s) if seen.save_s else None,
        "saved_bytes": sum(path.stat().st_size for path in saved),
    }


def in_processes(folder: Path, world: int, name: str, work: Any, *words: Any) -> dict[str, Any]:
    """What the main process of `world` finds; all of them do the same."""
    from benchmarks.ranks import run_ranks

    path = folder / f"{name}.json"

    def rank_work(rank: int) -> int:
        torch.set_num_threads(1)
        found = work(folder, *words)
        if rank == 0:
            path.write_text(json.dumps(found))
        return 0

    codes = run_ranks(
        world, rank_work, lambda rank: folder / f"{name}-{rank}.log", timeout_s=TIMEOUT_S
    )
    if any(codes):
        logs = [(folder / f"{name}-{rank}.log").read_text()[-1500:] for rank in range(world)]
        sys.exit(f"{name}: exit codes {codes}\n" + "\n".join(logs))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---- all arms


LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def large() -> dict[str, Any]:
    """The same arithmetic for an 8B Llama on 8 GPUs: bytes of one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        weights = weights_of(LlamaForCausalLM(LlamaConfig(**LLAMA_8B)))
    found: dict[str, Any] = {"parameters": weights.all, "world": 8}
    for strategy in ("ddp", "fsdp2"):
        payload = reckoned(weights, strategy, width=2)
        found[strategy] = {**payload, "sent": sent(payload, 8), "saved_each": payload["saved"] // 8}
    return found


def sent(payload: dict[str, int], world: int) -> int:
    """Bytes that a process sends in one micro-batch, by ring algorithms."""
    once = payload["all_gather"] + payload["reduce_scatter"] + 2 * payload["all_reduce"]
    return once * (world - 1) // world


def make_rows(path: Path) -> list[dict[str, str]]:
    """Rows of some 100 tokens."""
    rows = [
        {
            "question": f"What is {n} plus {n + 7}, and what is half of it?",
            "answer": f"{n} plus {n + 7} is {2 * n + 7}, and half of {2 * n + 7} is {n + 3.5}. "
            * 3,
        }
        for n in range(600)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def check(weights: Weights, strategy: str, world: int, found: dict[str, Any]) -> dict[str, Any]:
    """Count beside arithmetic; refuses to go on where they differ by more than 1 %."""
    expected = reckoned(weights, strategy, width=4)
    counted = {**found["step"], "published": sum(found.get("published", {}).values())}
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "published"):
        there, wanted = counted.get(kind, 0), expected.get(kind, 0)
        # What is exchanged of counts, losses and norms is small.
        if abs(there - wanted) > 0.01 * (wanted or weights.all):
            sys.exit(
                f"{strategy} in {world} processes: {kind} {there:,} bytes, {wanted:,} reckoned"
            )
    return {"counted": counted, "reckoned": expected, "sent": sent(expected, world)}


def main() -> None:
    """Parse arguments, run every arm, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bytes-only", action="store_true", help="measure no times")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    words = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from transformers import AutoModelForCausalLM

    from benchmarks.bench_train import save_model
    from trainer.core import TrainerEngine  # noqa: F401  (imported before processes are forked)

    torch.set_num_threads(1)
    found: dict[str, Any] = {"arms": {}, "8B": large()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", make_rows(folder / "rows.jsonl"))
        weights = weights_of(AutoModelForCausalLM.from_pretrained(folder / "model"))
        for strategy, world in ARMS[1:]:
            name = f"{strategy}-{world}"
            counted = in_processes(folder, world, name, count, strategy, world)
            found["arms"][name] = {
                **check(weights, strategy, world, counted),
                "gather_s": counted.get("gather_s"),
            }
        runs: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(0 if words.bytes_only else words.repeats):
            for strategy, world in ARMS:
                name = f"{strategy}-{world}"
                label = f"{name}-timed-{repeat}"
                one = in_processes(folder, world, label, timed, strategy, world, words.steps)
                runs.setdefault(name, []).append(one)
    for name, several in runs.items():
        found["arms"].setdefault(name, {})["runs"] = several
    report(found)
    if words.out is not None:
        words.out.write_text(json.dumps(found, indent=2) + "\n")


def report(found: dict[str, Any]) -> None:
    """Print a table in Markdown."""
    print(
        "| arm | tokens/s | stall ms | save s | saved MB | gathered MB | summed MB | published MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, arm in found["arms"].items():
        runs = arm.get("runs", [])
        counted = arm.get("counted", {})
        summed = counted.get("reduce_scatter", 0) + counted.get("all_reduce", 0)
        cells = [
            *(middle(runs, key) for key in ("tokens_per_s", "stall_ms", "save_s")),
            middle(runs, "saved_bytes", 1e6),
            *(f"{n / 1e6:.1f}" for n in (counted.get("all_gather", 0), summed)),
            f"{counted.get('published', 0) / 1e6:.1f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for strategy in ("ddp", "fsdp2"):
        each = found["8B"][strategy]
        words = ", ".join(f"{key} {value / 1e9:.1f} GB" for key, value in each.items())
        print(f"8B in bf16, 8 processes, {strategy}: {words}")


def middle(runs: list[dict[str, Any]], key: str, unit: float = 1.0) -> str:
    """Median over runs, with its range."""
    values = [run[key] / unit for run in runs if run[key] is not None]
    if not values:
        return "-"
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


if __name__ == "__main__":
    main()
