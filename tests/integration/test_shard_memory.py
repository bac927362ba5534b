"""The memory card of shards beside the allocations of real FSDP2 steps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
}


@dataclass(frozen=True)
class Case:
    """One way to train on shards."""

    mode: str = "full"
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    accumulation: int = 1
    is_resharded: bool = True
    is_tied: bool = False
    world: int = 2


CASES = {
    "plain": Case(),
    "fp32, tied": Case(dtype=torch.float32, is_tied=True),
    "checkpointed": Case(checkpointing=True),
    "accumulated": Case(accumulation=2),
    "checkpointed, accumulated": Case(checkpointing=True, accumulation=2),
    "layers kept": Case(is_resharded=False),
    "four": Case(world=4),
    "four, accumulated": Case(world=4, accumulation=2),
    "lora, tied": Case(mode="lora", is_tied=True),
    "lora, fp32": Case(mode="lora", dtype=torch.float32, checkpointing=True, accumulation=2),
}


def config_of(case: Case) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPE, tie_word_embeddings=case.is_tied)


def card_of(case: Case) -> Any:
    from tests.unit.core.test_memory import SETUP
    from trainer.core.memory import estimate_memory

    setup = dataclasses.replace(
        SETUP,
        training_mode=case.mode,
        compute_dtype=case.dtype,
        gradient_checkpointing=case.checkpointing,
        gradient_accumulation=case.accumulation,
        num_processes=case.world,
        is_sharded=True,
        is_resharded=case.is_resharded,
    )
    return estimate_memory(config_of(case), setup)


def accelerator_of(case: Case) -> Any:
    """As the trainer has it sharded, see trainer/core/sharding.py."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
    mixed = case.dtype != torch.float32
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=case.is_resharded,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision="bf16" if mixed else "no")
    assert found.is_fsdp2
    found.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=case.dtype if mixed else None, reduce_dtype=torch.float32
    )
    return found


def measure(case: Case) -> dict[str, int]:
    """Bytes of this rank's weights, and the most that a step allocates beside them."""
    from torch.profiler import ProfilerActivity, profile

    from tests.unit.core.test_memory import BATCH_SIZE, LENGTH, SETUP, real_model
    from trainer.core.loss import supervised_loss
    from trainer.core.tiles import PostHead, Tiling

    torch.set_num_threads(1)
    accelerator = accelerator_of(case)
    setup = dataclasses.replace(
        SETUP, training_mode=case.mode, gradient_checkpointing=case.checkpointing
    )
    plain = real_model(config_of(case), setup)
    if case.mode == "lora":  # the base in the compute dtype, adapters in fp32
        for parameter in plain.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(case.dtype)
    trained = [p for p in plain.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(trained, fused=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH_SIZE, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    tiling = Tiling.of(PostHead(), SHAPE["vocab_size"], "cpu")

    def step() -> None:
        for _ in range(case.accumulation):
            with accelerator.autocast():
                loss = supervised_loss(model, model, batch, 1, tiling=tiling)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    peaks = []
    for _ in range(4):  # gloo holds the buffers of an exchange for as long as it happens to take
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(itertools.accumulate(sizes)))
    return {
        "step": min(peaks),
        "weights": sum(p.to_local().nbytes for p in model.parameters()),
    }


def main(folder: Path) -> None:
    """Run by the test: every case in processes forked from this one."""
    from benchmarks.ranks import run_ranks
    from trainer.core import dry_run

    assert dry_run  # imported before processes are forked
    for name, case in CASES.items():

        def work(rank: int, name: str = name, case: Case = case) -> int:
            found = measure(case)
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(found))
            return 0

        codes = run_ranks(case.world, work, lambda rank: folder / f"{rank}.txt", timeout_s=120)
        if any(codes):
            sys.exit("".join((folder / f"{n}.txt").read_text() for n in range(case.world)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("steps")
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_the_card_of_shards_has_room_for_what_a_real_step_allocates(
    measured: dict[str, dict[str, int]], name: str
) -> None:
    card, real = card_of(CASES[name]), measured[name]
    assert card.weights == pytest.approx(real["weights"], rel=1e-3)
    assert 0.95 <= card.step / real["step"] <= 1.6


if __name__ == "__main__":
    main(Path(sys.argv[1]))
