"""N4, and the parts of N11 and N15 that need two processes: gloo, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trust import flash, two_processes
from tests.trust.reference import distance, llama, ragged_rows, weighted_rows, weights
from tests.trust.trainers import make_trainer, trained_change

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = Path(two_processes.__file__)
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two processes found; all cases in one start, because starting takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]
    assert [part["world_size"] for part in found] == [2, 2]
    assert [part["backend"] for part in found] == ["gloo", "gloo"]
    return found


@pytest.fixture(scope="module")
def one_process() -> torch.Tensor:
    """The same rows in the same steps by one process."""
    return trained_change(
        llama(),
        ragged_rows(two_processes.NUM_ROWS, seed=4),
        batch_size=2 * two_processes.BATCH_SIZE * two_processes.ACCUMULATION,
        optimizer=two_processes.sgd,
    )


def by_one_process(capacity: int | None = None, **model_options: Any) -> torch.Tensor:
    """The weighted rows in the same steps by one process."""
    return trained_change(
        llama(**model_options),
        weighted_rows(two_processes.NUM_ROWS, seed=4),
        batch_size=2 * two_processes.BATCH_SIZE * two_processes.ACCUMULATION,
        capacity=capacity,
        optimizer=two_processes.sgd,
    )


def check_equal_to_one_process(
    ranks: Ranks, case: str, expected: torch.Tensor, steps: int = 3
) -> None:
    """N4: two processes move the weights as one does, and both alike."""
    ours = [part[case] for part in ranks]
    assert [part["num_processes"] for part in ours] == [2, 2]
    assert [part["steps"] for part in ours] == [steps, steps]
    assert torch.equal(ours[0]["change"], ours[1]["change"])
    assert distance(ours[0]["change"], expected) <= 2e-6


def check_rounded_alike(ranks: Ranks, case: str) -> None:
    """Weights in bf16 are rounded at random, and both processes have one model after it."""
    changes = [part[case]["change"] for part in ranks]
    assert changes[0].abs().max() > 0
    assert torch.equal(*changes)


def test_two_processes_round_bf16_weights_alike(ranks: Ranks) -> None:
    check_rounded_alike(ranks, "rounded")


def test_mutant_rounding_by_each_processs_own_numbers_is_killed(ranks: Ranks) -> None:
    with pytest.raises(AssertionError):
        check_rounded_alike(ranks, "rounded_by_rank")


def test_n4_two_processes_train_as_one(ranks: Ranks, one_process: torch.Tensor) -> None:
    check_equal_to_one_process(ranks, "right", one_process)


def test_mutant_n4_per_rank_mean_is_killed(ranks: Ranks, one_process: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        check_equal_to_one_process(ranks, "per_rank_mean", one_process)


def test_n4_two_processes_train_weighted_rows_as_one(ranks: Ranks) -> None:
    check_equal_to_one_process(ranks, "weighted", by_one_process())


def test_mutant_n4_weights_of_each_rank_alone_is_killed(ranks: Ranks) -> None:
    with pytest.raises(AssertionError):
        check_equal_to_one_process(ranks, "per_rank_weights", by_one_process())


def test_n4_two_processes_train_joined_packs_as_one(ranks: Ranks) -> None:
    # Blanks fill the last batches here too: documents of one token at the end of a joined row.
    with flash.installed():
        expected = by_one_process(two_processes.CAPACITY, **two_processes.VARLEN)
    check_equal_to_one_process(ranks, "joined", expected, steps=2)
    assert distance(expected, by_one_process(two_processes.CAPACITY)) <= 2e-6


def test_n4_two_processes_train_joined_rows_as_one(ranks: Ranks) -> None:
    check_equal_to_one_process(ranks, "joined_rows", by_one_process())
    num_tokens = ranks[0]["weighted"]["last_step"]["num_tokens"]
    assert ranks[0]["joined_rows"]["last_step"]["num_tokens"] == num_tokens


def test_n4_two_processes_train_mixed_sources_as_one(ranks: Ranks) -> None:
    model, rows = llama(), weighted_rows(two_processes.NUM_ROWS, seed=4)
    before = weights(model)
    trainer = make_trainer(
        model,
        rows,
        batch_size=2 * two_processes.BATCH_SIZE * two_processes.ACCUMULATION,
        mix=two_processes.MIX,
        optimizer=two_processes.sgd,
    )
    trainer.train()
    check_equal_to_one_process(ranks, "mixed", weights(model) - before, steps=5)
    seen = [tuple(ids) for part in ranks for ids in part["mixed"]["seen"]]
    wanted = [tuple(rows[row][0]) for epoch in [0] for row in trainer.order.epoch_rows(epoch)]
    assert Counter(seen) == Counter(wanted)
    assert len(seen) == 37
    alone = trainer.last_step
    assert alone is not None
    for part in ranks:
        losses = part["mixed"]["last_step"]["source_losses"]
        assert losses == pytest.approx(alone.source_losses, rel=1e-5)
        assert set(losses) == {"s0", "s1"}


def check_rows_once(ranks: Ranks, case: str) -> None:
    """N11: both ranks together train every row once, and count no other token."""
    rows = sorted(ids for ids, _ in ragged_rows(two_processes.NUM_ROWS, seed=4))
    assert sorted(ids for part in ranks for ids in part[case]["seen"]) == rows
    last = ranks[0][case]["last_step"]
    # Two micro-batches of two rows on each rank; two of the eight places are blank.
    seen = [ids for part in ranks for ids in part[case]["seen"][8:]]
    assert len(seen) == 6
    assert last["num_tokens"] == sum(len(ids) for ids in seen)


def test_n11_two_processes_train_every_row_once(ranks: Ranks) -> None:
    check_rows_once(ranks, "right")


def test_mutant_n11_rows_dealt_twice_is_killed(ranks: Ranks, one_process: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        check_rows_once(ranks, "rows_dealt_twice")
    with pytest.raises(AssertionError):
        check_equal_to_one_process(ranks, "rows_dealt_twice", one_process)


def check_same_split(ranks: Ranks, case: str) -> None:
    """N15: every rank parts the rows alike."""
    assert ranks[0][case] == ranks[1][case]


def test_n15_every_rank_parts_the_rows_alike(ranks: Ranks) -> None:
    check_same_split(ranks, "split")


def test_mutant_n15_rank_offset_seed_is_killed(ranks: Ranks) -> None:
    with pytest.raises(AssertionError):
        check_same_split(ranks, "rank_offset_seed")
