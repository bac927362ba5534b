"""The loss of each source is that of its tokens, and measuring it changes no bit of training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.trust.reference import IGNORED, llama, token_losses, weighted_rows
from tests.trust.trainers import dataset
from trainer.core.loss import supervised_loss
from trainer.core.source_losses import SourceSums
from trainer.core.tiles import PostHead, Tiling, summed_loss
from trainer.data.batches import (
    BLANK,
    LOSS_WEIGHTS,
    SOURCES,
    JoinCollator,
    PackedDataset,
    PadCollator,
)

NAMES = ("one", "two", "none")
ROWS = weighted_rows(6, seed=2)
OF = [0, 1, 1, 0, 1, 0]

Batch = dict[str, torch.Tensor]


def padded(*, weighted: bool = True) -> Batch:
    data = dataset(ROWS if weighted else [row[:2] for row in ROWS])  # type: ignore[arg-type]
    data = data.of_sources(torch.tensor(OF).numpy(), is_mixed=False)
    return PadCollator(0)([data[index] for index in (*range(len(ROWS)), BLANK)])


def joined() -> Batch:
    data = dataset(ROWS).of_sources(torch.tensor(OF).numpy(), is_mixed=False)
    packs = PackedDataset(data, 64)
    return JoinCollator(with_borders=False)([packs[index] for index in range(len(packs))])


def by_hand(model: Any, *, weighted: bool = True) -> dict[str, float]:
    """Row by row, each token by itself."""
    sums: dict[str, list[float]] = {}
    for (ids, labels, counts), number in zip(ROWS, OF, strict=True):
        losses = token_losses(model, [(ids, labels)])
        used = [w for w, label in zip(counts[1:], labels[1:], strict=True) if label != IGNORED]
        for loss, weight in zip(losses, used, strict=True):
            by = weight if weighted else 1.0
            total = sums.setdefault(NAMES[number], [0.0, 0.0])
            total[0] += float(loss.detach()) * by
            total[1] += by
    return {name: loss / weight for name, (loss, weight) in sums.items()}


def measured(model: Any, batch: Batch, **options: Any) -> dict[str, float]:
    sums = SourceSums(NAMES)
    supervised_loss(model, model, batch, by_source=sums, **options)
    return sums.means(sums.take(torch.device("cpu")).flatten().tolist())


@pytest.mark.parametrize("tile", [None, 5, 10**6])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_of_a_source_is_the_mean_over_its_tokens(tile: int | None, weighted: bool) -> None:
    model = llama()
    tiling = None if tile is None else Tiling(PostHead(), tile)
    found = measured(model, padded(weighted=weighted), tiling=tiling)
    assert found == pytest.approx(by_hand(model, weighted=weighted), rel=1e-5)
    assert set(found) == {"one", "two"}, "a source without a token has no loss"


def test_documents_of_a_pack_count_for_their_own_source() -> None:
    model = llama(attn_implementation="eager")
    assert measured(model, joined()) == pytest.approx(by_hand(model), rel=1e-5)


def test_what_several_batches_add_is_taken_once() -> None:
    model, sums = llama(), SourceSums(NAMES)
    for _ in range(2):
        supervised_loss(model, model, padded(), by_source=sums)
    once, twice = measured(model, padded()), sums.take(torch.device("cpu"))
    assert sums.means(twice.flatten().tolist()) == pytest.approx(once, rel=1e-6)
    assert not sums.take(torch.device("cpu")).any()


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_sources_changes_no_bit_of_loss_and_gradients(
    tile: int | None, weighted: bool, dtype: torch.dtype
) -> None:
    model = llama(dtype=dtype)
    tiling = None if tile is None else Tiling(PostHead(), tile)
    batch = padded(weighted=weighted)
    without = {key: value for key, value in batch.items() if key != SOURCES}
    found = [
        supervised_loss(model, model, one, 7, tiling=tiling, by_source=sums)
        for one, sums in ((without, None), (batch, None), (batch, SourceSums(NAMES)))
    ]
    assert len({float(one.detach()) for one in found}) == 1
    first, *others = (gradients(model, one) for one in found)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_sum_is_torchs_own_cross_entropy_bit_for_bit(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(count, 97, generator=generator)).to(dtype)
    target = torch.randint(97, (count,), generator=generator)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    summed, each = summed_loss(mine, target, None)
    wide = theirs.float() if dtype == torch.bfloat16 else theirs
    own = F.cross_entropy(wide, target, reduction="sum")
    assert torch.equal(summed, own)
    assert torch.equal(each, F.cross_entropy(wide, target, reduction="none").detach())
    summed.backward()
    own.backward()
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stays_with_its_source() -> None:
    sums = SourceSums(NAMES)
    losses = torch.tensor([1.0, math.nan, 3.0])
    sums.add(losses, None, torch.tensor([0, 1, 0]))
    found = sums.means(sums.take(torch.device("cpu")).flatten().tolist())
    assert found["one"] == 2.0
    assert math.isnan(found["two"])


def test_batches_without_weights_have_no_weights_for_blanks() -> None:
    assert LOSS_WEIGHTS not in padded(weighted=False)
    assert padded()[SOURCES].shape == padded()["labels"].shape
