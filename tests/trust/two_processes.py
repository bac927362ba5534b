"""Run by torchrun: the real Trainer and the real split in each of two processes, right and broken.

`two_processes.py FOLDER` writes FOLDER/rank-N.pt; what it must hold is in test_two_processes.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.trust import flash
from tests.trust.reference import AnyRows, llama, ragged_rows, weighted_rows, weights
from tests.trust.trainers import make_trainer
from trainer.config.data_section import DataSection
from trainer.config.training_sections import Hyperparams
from trainer.core import bf16_masters, hf_trainer
from trainer.core.optim import build_optimizer
from trainer.data import batches, preparer
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.models.tiny import load_tiny_tokenizer
from trainer.profiles import get_profile

NUM_ROWS, BATCH_SIZE, ACCUMULATION, RATE = 22, 2, 2, 0.1
"""Steps of 8, 8 and 6 rows: the last micro-batches cannot be full on both ranks."""
CAPACITY = 44
"""Ten packs: steps of eight and two, the last filled up with two blank ones."""
MIX = (0.7, 0.3)
"""Of 11 rows each: 26 and 11 in an epoch, five steps, the last one of five rows."""
VARLEN = {"attn_implementation": "flash_attention_2"}


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE)


@contextmanager
def patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def bf16_adamw(model: Any) -> torch.optim.Optimizer:
    """What steps weights whose only copy is bf16."""
    values = {"masters": "bf16_stochastic", "learning_rate": 1e-3}
    return build_optimizer(model, Hyperparams.model_validate(values), seed=5)


def trained(
    rows: AnyRows | None = None,
    capacity: int | None = None,
    optimizer: Any = sgd,
    mix: tuple[float, ...] = (),
    **model_options: Any,
) -> dict[str, Any]:
    """Change of the weights, and the rows with something to train that this rank was given."""
    model = llama(**model_options)
    if optimizer is bf16_adamw:
        model = model.bfloat16()
    before = weights(model)
    trainer = make_trainer(
        model,
        rows or ragged_rows(NUM_ROWS, seed=4),
        batch_size=BATCH_SIZE,
        accumulation=ACCUMULATION,
        world=2,
        capacity=capacity,
        mix=mix,
        optimizer=optimizer,
    )
    torch.manual_seed(dist.get_rank())  # as dropout on batches of different shapes leaves it
    seen: list[list[int]] = []
    compute = trainer.compute_loss

    def noting(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        masks = inputs.get("attention_mask", torch.zeros(len(inputs["input_ids"]), 0))
        for ids, mask in zip(inputs["input_ids"], masks, strict=True):
            if mask.sum() > 1:
                seen.append(ids[mask.bool()].tolist())
        return compute(model, inputs, *rest, **named)

    trainer.compute_loss = noting  # type: ignore[method-assign]
    trainer.train()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "steps": trainer.state.global_step,
        "change": weights(trainer.accelerator.unwrap_model(trainer.model)) - before,
        "seen": seen,
        "last_step": vars(trainer.last_step),
    }


def per_rank_mean() -> Any:
    """Each process divides by its own trained tokens, and gradients are averaged over ranks."""
    plain = hf_trainer.SupervisedTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        own = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        named["num_items_in_batch"] = own * self.accelerator.num_processes * ACCUMULATION
        return plain(self, model, inputs, *rest, **named)

    return patched(hf_trainer.SupervisedTrainer, "compute_loss", compute_loss)


def per_rank_weights() -> Any:
    """Each process divides by the weights of its own rows, and gradients are averaged."""

    def own(self: Any, batch_samples: list[Any], device: Any) -> Any:
        shares = [hf_trainer.loss_share(batch) for batch in batch_samples]
        return torch.stack(shares).sum() * self.accelerator.num_processes

    return patched(hf_trainer.SupervisedTrainer, "_get_num_items_in_batch", own)


def rounded_by_rank() -> Any:
    """Stochastic rounding draws from the random state of each process."""
    return patched(bf16_masters, "random_numbers_of", lambda *_: nullcontext())


def rows_dealt_twice() -> Any:
    """The epoch is not filled up, so that the dealing sampler repeats its first rows."""
    return patched(batches.EpochOrder, "__len__", lambda self: len(self.lengths))


def split(folder: Path) -> dict[str, str]:
    """Fingerprints of both sides of the split of 60 rows."""
    path = folder / f"rows-{os.environ['RANK']}.jsonl"
    rows = [{"question": f"{n}?", "answer": f"it is {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_data(
        DataSection(dataset_path=str(path), validation_split=0.3, cache=False),
        profile=get_profile("plain"),
        encoder=RowEncoder(load_tiny_tokenizer(), 128),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=2,
    )
    assert data.validation is not None
    return {"train": data.train.fingerprint(), "validation": data.validation.fingerprint()}


def rank_offset_seed() -> Any:
    """Each process splits by a seed of its own."""
    plain = preparer.content_key
    rank = int(os.environ["RANK"])
    return patched(preparer, "content_key", lambda messages, seed: plain(messages, seed + rank))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"right": trained(), "split": split(folder)}
    found["world_size"], found["backend"] = dist.get_world_size(), dist.get_backend()
    weighted = weighted_rows(NUM_ROWS, seed=4)
    found["weighted"] = trained(weighted)
    with flash.installed():
        found["joined"] = trained(weighted, CAPACITY, **VARLEN)
        found["joined_rows"] = trained(weighted, **VARLEN)
    found["mixed"] = trained(weighted, mix=MIX)
    found["rounded"] = trained(optimizer=bf16_adamw)
    with rounded_by_rank():
        found["rounded_by_rank"] = trained(optimizer=bf16_adamw)
    with per_rank_weights():
        found["per_rank_weights"] = trained(weighted)
    with per_rank_mean():
        found["per_rank_mean"] = trained()
    with rows_dealt_twice():
        found["rows_dealt_twice"] = trained()
    with rank_offset_seed():
        found["rank_offset_seed"] = split(folder)
    torch.save(found, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
