"""Snapshots: files that the stock reader loads, in the compute dtype, overwritten in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.errors import PreviewError
from trainer.publish import snapshot
from trainer.publish.identity import canonical_tensors, model_manifest
from trainer.publish.snapshot import FOLDER_PREFIX, Snapshotter, arena_folder
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import ServerHashes

CPU = torch.device("cpu")


def snapshotter(model: Any, dtype: torch.dtype = torch.float32) -> Snapshotter:
    return Snapshotter(canonical_tensors(model), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_reader_loads_a_snapshot_in_the_compute_dtype(
    make_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model()
    model.register_buffer("counts", torch.arange(3))  # of a width that must stay its own
    snapshots = snapshotter(model, dtype)
    arena = snapshots.arena(tmp_path / "arena")
    snapshots.copy(arena)()
    found = load_file(arena.path)
    expected = {name: value.detach() for name, value in canonical_tensors(model).items()}
    assert found.keys() == expected.keys()
    assert found["counts"].dtype == torch.int64
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype))
    assert found["model.norm.weight"].dtype == dtype
    arena.close()
    assert not arena.path.exists()


def test_a_second_snapshot_shows_the_weights_of_then_and_not_of_before(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model()
    snapshots = snapshotter(model)
    arena = snapshots.arena(tmp_path / "arena")
    snapshots.copy(arena)()
    first = load_file(arena.path)["model.norm.weight"].clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(load_file(arena.path)["model.norm.weight"], first)
    snapshots.copy(arena)()
    assert torch.equal(load_file(arena.path)["model.norm.weight"], first + 1)


def test_the_publisher_hashes_a_snapshot_to_the_id_that_the_model_has(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(vocab_size=len(tokenizer))
    snapshots = snapshotter(model)
    arena = snapshots.arena(tmp_path / "arena")
    snapshots.copy(arena)()
    theirs = model_manifest(model, tokenizer)
    hashes = ServerHashes.model_validate(theirs.model_dump())
    assert WeightFile(arena.path, hashes).manifest().weights_id == theirs.weights_id


def test_folders_of_killed_runs_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    with open("/proc/sys/kernel/pid_max") as file:
        gone = int(file.read()) + 1
    dead, alive = (
        tmp_path / f"{FOLDER_PREFIX}{gone}-x",
        tmp_path / f"{FOLDER_PREFIX}{os.getpid()}-y",
    )
    dead.mkdir()
    alive.mkdir()
    before = snapshot.SHARED_MEMORY
    try:
        snapshot.SHARED_MEMORY = tmp_path
        made = arena_folder(1, tmp_path)
    finally:
        snapshot.SHARED_MEMORY = before
    assert not dead.exists()
    assert alive.exists()
    assert made.stat().st_mode & 0o777 == 0o700


def test_no_room_anywhere_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PreviewError, match=r"need 1099511627776 MiB"):
        arena_folder(2**60, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_snapshot_holds_the_weights_of_its_step_though_the_next_step_follows_at_once(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    snapshots = Snapshotter(canonical_tensors(model), torch.float32, torch.device("cuda"))
    model.to("cuda")  # as the Trainer does, after the snapshotter was made
    snapshots.guard(optimizer)
    arena = snapshots.arena(tmp_path / "arena")
    expected = {name: v.detach().cpu().clone() for name, v in canonical_tensors(model).items()}
    wait = snapshots.copy(arena)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wait()
    found = load_file(arena.path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
