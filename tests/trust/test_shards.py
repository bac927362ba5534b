"""FSDP2 trains as one process does (N4): losses, weights, validation; on two and four ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trust import shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Ranks = list[dict[str, Any]]

OFTEN = ["plain", "adamw", "packed", "tied and tiled", "lora on the head, tiled", "checkpointed"]
"""On two processes; all other cases and four processes are exhaustive ones."""


def launched(folder: Path, world: int, names: list[str]) -> Ranks:
    """What each process found; all cases in one start, because starting takes long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", str(world), shards.__file__, str(folder), *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return launched(tmp_path_factory.mktemp("two"), 2, OFTEN)


@pytest.fixture(scope="module")
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return launched(tmp_path_factory.mktemp("many"), request.param, list(shards.CASES))


def check_equal_to_one_process(ranks: Ranks, found: str, case: str) -> None:
    """The same start, steps, losses and gradient norms, and the same weights behind them."""
    alone = shards.trained(shards.CASES[case], world=len(ranks), is_sharded=False)
    for part in (rank[found] for rank in ranks):
        assert part["steps"] == alone["steps"] == 3
        assert part["counts"] == alone["counts"]
        assert part["validation"] == pytest.approx(alone["validation"], rel=2e-6)
        for ours, theirs in zip(part["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=5e-6)
        assert part["before"].keys() == alone["before"].keys()
        moved = [part["after"][n] - part["before"][n] for n in part["before"]]
        wanted = [alone["after"][n] - alone["before"][n] for n in part["before"]]
        assert all(torch.equal(part["before"][n], alone["before"][n]) for n in part["before"])
        # AdamW divides by the root of a gradient's square: rounding of tiny ones is a whole step.
        limit = 1e-3 if case == "adamw" else 4e-6
        assert distance(moved, wanted) <= limit
    first = ranks[0][found]["after"]
    assert all(torch.equal(first[n], rank[found]["after"][n]) for rank in ranks for n in first)


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    flat = [torch.cat([one.double().flatten() for one in side]) for side in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("case", OFTEN)
def test_n4_two_shards_train_as_one_process(two: Ranks, case: str) -> None:
    check_equal_to_one_process(two, case, case)


def test_mutant_n4_per_rank_mean_is_killed_on_shards(two: Ranks) -> None:
    with pytest.raises(AssertionError):
        check_equal_to_one_process(two, "per_rank_mean", "plain")


def test_weights_that_are_loaded_behind_an_evaluation_are_used(two: Ranks) -> None:
    """The head is zero then, so that every token is as likely as any other."""
    uniform = torch.tensor(float(shards.llama().config.vocab_size)).log()
    for rank in two:
        assert rank["zeroed"][0] == pytest.approx(float(uniform), rel=1e-6)


def test_mutant_gathered_weights_that_stay_behind_an_evaluation_are_killed(two: Ranks) -> None:
    uniform = torch.tensor(float(shards.llama().config.vocab_size)).log()
    assert two[0]["zeroed"][1] != pytest.approx(float(uniform), rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("many", [2, 4], indirect=True)
@pytest.mark.parametrize("case", sorted(shards.CASES))
def test_n4_shards_of_families_and_modes_train_as_one_process(many: Ranks, case: str) -> None:
    check_equal_to_one_process(many, case, case)
