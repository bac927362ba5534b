"""At start: is the loss on supervised positions the model's own?"""

from __future__ import annotations

from typing import Any

import torch

from trainer.core.context import RunContext
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import compare_with_own_loss
from trainer.data.batches import LOSS_WEIGHTS, PadCollator, on_device
from trainer.data.encode import IGNORE_INDEX
from trainer.data.encoded import EncodedDataset
from trainer.errors import ConfigError
from trainer.preview.neutral import undisturbed

NUM_SUPERVISED = 256
"""Tokens whose loss is compared, at most: the model's own loss makes logits of every position."""
NUM_ROWS_SEEN = 100


def is_loss_equal(run: RunContext, trainer: SupervisedTrainer, rows: EncodedDataset) -> bool:
    """Compare both losses on a part of one row, without a trace; say so where they differ.

    Args:
        rows: the training rows, not packed.
    Raises:
        ConfigError: they differ, and the rows weigh their answers, which an own loss cannot.
    """
    row = telling_part(rows)
    batch = on_device(PadCollator(0)([row]), trainer.args.device)
    with undisturbed(trainer.model), trainer.accelerator.autocast():
        check = compare_with_own_loss(trainer.model, batch, run.precision.compute_dtype)
    if check.is_equal:
        return True
    words = (
        f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
        f"{check.own:.6f}: this model adds something of its own"
    )
    if LOSS_WEIGHTS in row:
        raise ConfigError(
            f"{words}, and the rows weigh their answers, which its own loss cannot take; leave "
            "the weights out of the rows (or give only 0 and 1), or turn off in the model's "
            "config.json what adds to its loss."
        )
    run.notice(f"{words}, so its own forward is used (right, but slower)", "warning")
    return False


def telling_part(rows: EncodedDataset) -> dict[str, Any]:
    """The stretch of at most 257 tokens with the most supervised ones, of the first 100 rows."""
    best: tuple[int, int, int] = (0, 0, 0)  # supervised tokens, row, first token
    for index in range(min(len(rows), NUM_ROWS_SEEN)):
        # A stretch's first token is predicted by none, so that its label does not count.
        trained = (rows[index]["labels"][1:] != IGNORE_INDEX).long()
        before = torch.cat([torch.zeros(1, dtype=torch.int64), trained.cumsum(0)])
        ends = torch.arange(len(before)).add(NUM_SUPERVISED).clamp(max=len(before) - 1)
        counts = before[ends] - before
        start = int(counts.argmax())
        if int(counts[start]) > best[0]:
            best = (int(counts[start]), index, start)
        if best[0] == NUM_SUPERVISED:
            break
    _, index, start = best
    return {key: value[start : start + NUM_SUPERVISED + 1] for key, value in rows[index].items()}


def forget_peak_memory(device: torch.device) -> None:
    """Memory that only the checks at start took is not what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
