"""Lengths that batches are padded to, and what the padding is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.data.batches import (
    PackCollator,
    PadCollator,
    count_tokens,
    join_documents,
    length_buckets,
)


@pytest.mark.parametrize("longest", [5, 64, 65, 512, 513, 700, 2048, 4000, 32768])
def test_lengths_are_few_and_little_is_padding(longest: int) -> None:
    buckets = length_buckets(longest)
    assert buckets[-1] == longest
    assert list(buckets) == sorted(set(buckets))
    assert len(buckets) <= 8 + 4 * max(0, (longest - 1).bit_length() - 9)
    for length in range(65, longest + 1, 7):
        padded = next(bucket for bucket in buckets if bucket >= length)
        assert padded - length < max(64, padded / 5)


def row(length: int) -> dict[str, Any]:
    ids = torch.arange(1, length + 1)
    return {"input_ids": ids, "labels": ids.clone(), "loss_weights": torch.ones(length)}


PADDED = {"input_ids": 9, "labels": -100, "loss_weights": 0, "attention_mask": 0, "position_ids": 0}


@pytest.mark.parametrize(("lengths", "width"), [((3, 5), 8), ((8, 2), 8), ((9,), 12), ((13,), 13)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_batches_are_padded_to_the_next_length_with_what_is_not_trained(
    lengths: tuple[int, ...], width: int, is_packed: bool
) -> None:
    rows = [row(length) for length in lengths]
    if is_packed:
        rows = [join_documents([one]) for one in rows]
    kind = PackCollator if is_packed else PadCollator
    plain, padded = kind(9)(rows), kind(9, buckets=(8, 12))(rows)
    longest = max(lengths)
    assert padded.keys() == plain.keys()
    for key, value in padded.items():
        assert value.shape == (len(lengths), width)
        assert value.dtype == plain[key].dtype
        assert torch.equal(value[:, :longest], plain[key])
        assert (value[:, longest:] == PADDED[key]).all()
    assert count_tokens(padded) == count_tokens(plain) == sum(lengths)
