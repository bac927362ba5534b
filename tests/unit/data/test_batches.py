"""The order of rows depends on seed and epoch only; padding is masked by length."""

from __future__ import annotations

import torch

from trainer.data.batches import EpochOrder, PadCollator
from trainer.data.rows import IGNORE_INDEX

LENGTHS = [(7 * n) % 101 + 5 for n in range(1000)]


def order(**changes: object) -> EpochOrder:
    return EpochOrder(LENGTHS, **{"group_size": 8, "seed": 3, **changes})  # type: ignore[arg-type]


def test_every_row_comes_once_per_epoch() -> None:
    for options in ({}, {"group_by_length": False}, {"shuffle": False}):
        assert sorted(order(**options)) == list(range(1000))


def test_the_same_seed_and_epoch_give_the_same_order_and_others_another() -> None:
    one, two = order(), order()
    assert list(one) == list(two)
    two.set_epoch(1)
    assert list(one) != list(two)
    assert list(one) != list(order(seed=4))


def test_grouping_shortens_padding_and_still_mixes_groups() -> None:
    def padding(rows: list[int]) -> int:
        groups = [[LENGTHS[i] for i in rows[at : at + 8]] for at in range(0, 1000, 8)]
        return sum(max(group) * len(group) - sum(group) for group in groups)

    grouped, plain = list(order()), list(order(group_by_length=False))
    assert padding(grouped) < padding(plain) / 5
    firsts = [LENGTHS[grouped[at]] for at in range(0, 1000, 8)]
    assert firsts != sorted(firsts, reverse=True)


def test_no_step_of_an_epoch_is_kept_for_the_longest_row() -> None:
    found = {
        at // 8
        for epoch in range(20)
        for at, row in enumerate(order().epoch_rows(epoch))
        if LENGTHS[row] == max(LENGTHS)
    }
    assert len(found) > 20  # of 125 steps


def test_no_forward_pass_is_padded_to_more_than_the_longest_rows() -> None:
    for options in ({}, {"group_by_length": False}, {"shuffle": False}):
        rows = list(order(**options))
        passes = [[LENGTHS[row] for row in rows[at : at + 4]] for at in range(0, 1000, 4)]
        longest = [LENGTHS[row] for row in order(**options).longest_rows(4)]
        assert len(longest) * max(longest) == max(len(one) * max(one) for one in passes)


def test_first_row_of_step_is_the_first_row_of_that_steps_batch() -> None:
    rows = order()
    assert rows.first_row_of_step(1) == rows.epoch_rows(0)[0]
    assert rows.first_row_of_step(3) == rows.epoch_rows(0)[16]
    assert rows.first_row_of_step(126) == rows.epoch_rows(1)[0]


def test_a_real_token_equal_to_the_pad_id_stays_visible_and_trained() -> None:
    rows = [
        {"input_ids": torch.tensor([5, 0, 0]), "labels": torch.tensor([IGNORE_INDEX, 0, 0])},
        {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])},
    ]
    batch = PadCollator(pad_id=0)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 0, 0], [5, IGNORE_INDEX, IGNORE_INDEX]]
