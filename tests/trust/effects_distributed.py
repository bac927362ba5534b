"""Effects of section distributed: what two processes really exchange."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.trust.effects import shows
from tests.trust.lab import Lab

ROOT = Path(__file__).parents[2]
ARMS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "layers kept": {"strategy": "fsdp2", "reshard_after_forward": False},
    "accumulated": {"strategy": "fsdp2"},
}


def main(folder: Path, model: str, rows: str) -> None:
    """Run by `exchanged`: each arm in two processes, forked from this one."""
    import torch

    from benchmarks.collectives import Collectives
    from benchmarks.ranks import run_ranks
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine
    from trainer.core.checks import MemoryProbe

    def work(name: str) -> int:
        torch.set_num_threads(1)
        accumulation = 2 if name == "accumulated" else 1
        config = create_default_config(
            model_path=model,
            dataset_path=rows,
            output_dir=str(folder / name),
            hyperparams={
                "max_steps": 1,
                "batch_size": 2,
                "gradient_accumulation": accumulation,
                "fp_precision": "fp32",
                "max_length": 64,
            },
            data={"cache": False},
            monitoring={"inference_interval": 0, "micro_eval_interval": 0, "report_to": ()},
            environment={"device": "cpu", "num_threads": 1},
            distributed=ARMS[name],
        )
        trainer = TrainerEngine().create_trainer(config)
        trainer.remove_callback(MemoryProbe)  # a pass of its own
        # What is counted is the exchanges of a step.
        trainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]
        with Collectives() as counted:
            trainer.train()
        found = {
            "world": trainer.accelerator.num_processes,
            "is_fsdp2": bool(getattr(trainer.accelerator, "is_fsdp2", False)),
            "bytes": dict(counted.num_bytes),
            "weights": 4 * sum(p.numel() for p in trainer.model.parameters()),
        }
        if os.environ["RANK"] == "0":
            (folder / f"{name}.json").write_text(json.dumps(found))
        return 0

    for name in ARMS:
        codes = run_ranks(
            2, lambda _, name=name: work(name), lambda rank: folder / f"{rank}.txt", timeout_s=120
        )
        if any(codes):
            sys.exit("".join((folder / f"{rank}.txt").read_text() for rank in (0, 1)))


def exchanged(lab: Lab) -> dict[str, dict[str, Any]]:
    """What each arm found."""
    folder = lab.path("distributed")
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), str(lab.model), str(lab.file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ARMS}


@shows("distributed.strategy", "distributed.reshard_after_forward")
def strategy(lab: Lab) -> None:
    found = exchanged(lab)
    assert [arm["world"] for arm in found.values()] == [2] * len(ARMS)
    assert [arm["is_fsdp2"] for arm in found.values()] == [False, True, True, True]
    size = found["ddp"]["weights"]
    whole, shards, kept, more = (found[name]["bytes"] for name in ARMS)
    # Whole gradients are summed, or each process gets the sum of its part.
    assert 0.99 * size <= whole["all_reduce"] <= 1.01 * size
    assert "reduce_scatter" not in whole
    assert 0.99 * size <= shards["reduce_scatter"] <= 1.01 * size
    # Layers are gathered for each pass, or for the first only.
    assert kept["all_gather"] < 0.75 * shards["all_gather"]
    # Gradients are summed after each micro-batch: none is kept whole for the next one.
    assert more["reduce_scatter"] == 2 * shards["reduce_scatter"]


@shows("distributed.cpu_offload")
def cpu_offload(lab: Lab) -> None:
    """On a GPU it is accelerate's, whose options are tested; here it could do nothing."""
    assert "keeps shards out of a GPU" in lab.refusal(distributed={"cpu_offload": True})
    from trainer.core.sharding import OFFLOAD_VARIABLES, offload_told, sharding_options

    for is_on in (False, True):
        config = lab.config(distributed={"strategy": "fsdp2", "cpu_offload": is_on})
        assert sharding_options(config)["fsdp_config"]["cpu_offload"] is is_on
        with offload_told(config):
            assert all((os.environ.get(name) == "true") is is_on for name in OFFLOAD_VARIABLES)
        assert not set(OFFLOAD_VARIABLES) & set(os.environ)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
