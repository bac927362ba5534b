"""Run by torchrun: the real Trainer on shards (FSDP2), in families, modes and kinds of batches.

`shards.py FOLDER` writes FOLDER/rank-N.pt; what it must hold is in test_shards.py, which runs the
same cases in one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as t

from tests.trust.reference import AnyRows, decoder, llama, ragged_rows, weighted_rows
from tests.trust.trainers import CPU, make_trainer
from tests.trust.two_processes import per_rank_mean
from trainer.child import quiet_libraries
from trainer.config.training_sections import LoraSection
from trainer.core.evaluation import Evaluator
from trainer.core.sharding import gathered, shard
from trainer.core.tiles import PostHead, Tiling
from trainer.data.batches import PadCollator
from trainer.models.adapters import add_lora
from trainer.models.precision import resolve_precision
from trainer.preview import neutral

BATCH_SIZE, ACCUMULATION, RATE = 2, 2, 0.1
CAPACITY = 44


def sgd(model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=RATE)


def adamw(model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3)


def with_lora(model: Any, **options: Any) -> Any:
    adapted = add_lora(model, LoraSection.model_validate({"r": 4, "alpha": 8, **options}), seed=3)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the half of a step
            parameter.data.normal_(0, 0.05, generator=generator)
    return adapted


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    """One training on shards, and the same by one process."""

    model: Callable[[], Any] = llama
    rows: Callable[[int], AnyRows] = lambda count: ragged_rows(count, seed=4)
    capacity: int | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    tile: int | None = None
    """Positions in one tile of the loss; None: all at once."""
    post: PostHead = field(default_factory=PostHead)
    accumulation: int = ACCUMULATION
    hyper: dict[str, Any] = field(default_factory=dict)
    distributed: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "adamw": Case(optimizer=adamw),
    "weighted": Case(rows=lambda count: weighted_rows(count, seed=4)),
    "packed": Case(rows=lambda count: weighted_rows(2 * count, seed=4), capacity=CAPACITY),
    "tied": Case(model=lambda: llama(tied=True)),
    "tiled": Case(tile=3),
    "tied and tiled": Case(model=lambda: llama(tied=True), tile=3),
    "layers kept": Case(distributed={"reshard_after_forward": False}),
    "checkpointed": Case(hyper={"gradient_checkpointing": True}),
    "checkpointed and tiled": Case(hyper={"gradient_checkpointing": True}, tile=3),
    "lora": Case(model=lambda: with_lora(llama())),
    "lora on the head, tiled": Case(
        model=lambda: with_lora(llama(), target_modules=["q_proj", "lm_head"]), tile=3
    ),
    "gemma2": Case(
        model=lambda: decoder(t.Gemma2ForCausalLM, t.Gemma2Config, tied=True, head_dim=16),
        tile=3,
        post=PostHead(cap=30.0),
    ),
    "qwen3 moe": Case(model=lambda: decoder(t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, **MOE)),
    "gpt2": Case(
        model=lambda: decoder(
            t.GPT2LMHeadModel,
            t.GPT2Config,
            tied=True,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}


def num_rows(world: int) -> int:
    """Two whole steps and one that is not full on any number of processes."""
    return 2 * BATCH_SIZE * ACCUMULATION * world + BATCH_SIZE * ACCUMULATION * world - 2


def trained(case: Case, *, world: int, is_sharded: bool) -> dict[str, Any]:
    """Losses of the steps, weights before and after, and the loss on held-out rows.

    Args:
        world: processes of the sharded run; one process makes the same steps with larger batches.
    """
    torch.manual_seed(0)
    model = case.model()
    batch_size, accumulation = BATCH_SIZE, case.accumulation
    if not is_sharded:
        batch_size, accumulation = BATCH_SIZE * accumulation * world, 1
    trainer = make_trainer(
        model,
        case.rows(num_rows(world)),
        batch_size=batch_size,
        accumulation=accumulation,
        world=world if is_sharded else 1,
        capacity=case.capacity,
        optimizer=case.optimizer,
        distributed={"strategy": "fsdp2", **case.distributed} if is_sharded else {},
        **case.hyper,
    )
    if case.tile is not None:
        trainer.tiling = Tiling(case.post, case.tile)
    evaluator = Evaluator(
        trainer.train_dataset if case.capacity is None else trainer.train_dataset.rows,
        collate=PadCollator(0),
        max_rows=7,
        batch_size=2,
        autocast_dtype=None,
        is_shared=is_sharded,
    )
    if is_sharded:
        shard(trainer, resolve_precision("fp32", "full", CPU))
        assert trainer.accelerator.is_fsdp2
    before = whole(trainer.model)
    losses: list[tuple[float, float]] = []
    trainer._note_step = lambda one: losses.append((one.train_loss, one.grad_norm))
    # Between two steps too: what a look at the weights gathers must not be trained with.
    first = evaluator(trainer.model)
    trainer.train()
    return {
        "losses": losses,
        "before": before,
        "after": whole(trainer.model),
        "validation": (first.loss, evaluator(trainer.model).loss),
        "counts": (first.num_rows, first.num_trained_tokens),
        "steps": trainer.state.global_step,
    }


def whole(model: Any) -> dict[str, torch.Tensor]:
    """Every weight by its first name, on all processes."""
    return {names[0]: tensor.clone() for names, tensor in gathered(model)}


def loaded_behind_a_look(*, gives_back: bool) -> float:
    """The loss after a head of zeros was loaded behind an evaluation."""
    plain = neutral.resharded
    trainer = make_trainer(
        llama(),
        ragged_rows(8, seed=4),
        batch_size=2,
        world=dist.get_world_size(),
        distributed={"strategy": "fsdp2"},
    )
    shard(trainer, resolve_precision("fp32", "full", CPU))
    evaluator = Evaluator(
        trainer.train_dataset,
        collate=PadCollator(0),
        max_rows=2,
        batch_size=2,
        autocast_dtype=None,
        is_shared=True,
    )
    try:
        if not gives_back:
            neutral.resharded = lambda model: contextlib.nullcontext()
        head = trainer.model.lm_head.weight.detach().to_local()
        evaluator(trainer.model)
        head.zero_()
        return evaluator(trainer.model).loss
    finally:
        neutral.resharded = plain


def main(folder: Path, names: list[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {
        name: trained(CASES[name], world=world, is_sharded=True) for name in names
    }
    with per_rank_mean():
        found["per_rank_mean"] = trained(CASES["plain"], world=world, is_sharded=True)
    found["zeroed"] = [loaded_behind_a_look(gives_back=flag) for flag in (True, False)]
    torch.save(found, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
