"""Snapshots: files that the stock reader loads, in the compute dtype, overwritten in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.errors import PreviewError
from trainer.publish import snapshot
from trainer.publish.identity import canonical_tensors, model_manifest
from trainer.publish.shards import shares_of
from trainer.publish.snapshot import FOLDER_PREFIX, Arena, Layout, Snapshotter, arena_folder
from trainer.publish.weight_file import WeightFile, make_header, read_header
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


# ---- copies from a GPU


class FakeStream:
    def __init__(self, device: Any = None) -> None: ...


def on_a_gpu(
    model: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16
) -> Snapshotter:
    """A snapshotter that takes the CPU for a GPU; page-locking works wherever it is tried."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(snapshot, "_page_lock", lambda address, size: True)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    return Snapshotter(canonical_tensors(model), dtype, torch.device("cuda", 0))


def test_a_file_on_a_disk_is_not_page_locked_and_is_filled_through_a_small_buffer(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.register_buffer("counts", torch.arange(3))
    snapshots = on_a_gpu(model, monkeypatch)
    monkeypatch.setattr(snapshot, "STAGING_BYTES", 96)  # less than most tensors have
    arena = snapshots.arena(tmp_path / "arena")
    assert not arena.is_pinned
    snapshots.copy(arena)()
    expected = snapshotter(model, torch.bfloat16)
    plain = expected.arena(tmp_path / "plain")
    expected.copy(plain)()
    assert arena.path.read_bytes() == plain.path.read_bytes()
    assert snapshots._staging is not None
    assert snapshots._staging.numel() == 96


def test_a_file_in_shared_memory_is_page_locked(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", tmp_path)
    arena = on_a_gpu(make_model(), monkeypatch).arena(tmp_path / "arena")
    assert arena.is_pinned
    arena.is_pinned = False  # nothing is to be unlocked here


def test_an_error_of_page_locking_is_not_left_for_training_to_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in CUDA: a call that fails leaves its error, and the next kernel raises it."""
    left: list[str] = []

    class Runtime:
        def cudaHostRegister(self, *_: Any) -> int:  # noqa: N802
            left.append("out of memory")
            return 2

    def kernel(*_: Any, **__: Any) -> None:
        if left:
            raise RuntimeError(left.pop())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", kernel)
    assert snapshot._page_lock(0, 1) is False
    assert left == []


def cgroup(folder: Path, most: str, now: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{now}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_shared_memory_counts_against_the_limit_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, run_dir, shm = tmp_path / "groups", tmp_path / "run", tmp_path / "shm"
    run_dir.mkdir()
    shm.mkdir()
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", shm)
    monkeypatch.setattr(snapshot, "CGROUPS", groups)
    assert snapshot.memory_left() == float("inf")
    cgroup(groups, "max", 10**9, 0)
    assert arena_folder(2**20, run_dir).parent == shm
    cgroup(groups, str(2**21), 3 * 2**20, 2**19 + 2**20)
    assert snapshot.memory_left() == 2**19
    assert arena_folder(2**20, run_dir).parent == run_dir
    assert not snapshot.is_in_memory(run_dir)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_shared", [True, False])
def test_a_gpu_snapshot_holds_the_weights_of_its_step_though_the_next_step_follows_at_once(
    tmp_path: Path, is_shared: bool
) -> None:
    device = torch.device("cuda")
    model = torch.nn.Sequential(
        *(torch.nn.Linear(4096, 4096) for _ in range(10))
    )  # 320 MiB in bf16
    snapshots = Snapshotter(canonical_tensors(model), torch.bfloat16, device)
    model.to(device)  # as where the model moves after the snapshotter was made
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    snapshots.guard(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    folder = arena_folder(snapshots.layout.size, tmp_path) if is_shared else tmp_path
    arena = snapshots.arena(folder / "arena")
    try:
        assert arena.is_pinned is is_shared
        expected = {
            name: value.detach().to(torch.bfloat16).cpu()
            for name, value in canonical_tensors(model).items()
        }
        torch.cuda._sleep(500_000_000)  # what training has queued, and the copy must wait for
        wait = snapshots.copy(arena)
        optimizer.step()
        wait()
        found = load_file(arena.path)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        changed = model[0].weight.detach().to(torch.bfloat16).cpu()
        assert not torch.equal(found["0.weight"], changed), "the step was made"
    finally:
        arena.close()
        if is_shared:
            folder.rmdir()
    torch.ones(1, device=device).add_(1)  # no error is left
    torch.cuda.synchronize()


def test_a_header_that_is_made_is_the_one_that_is_read(tmp_path: Path) -> None:
    places = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    }
    header = make_header(places)
    assert len(header) % 8 == 0
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header + bytes(11))
    with path.open("rb") as file:
        assert read_header(file, path.stat().st_size) == (places, len(header))
    with safe_open(path, framework="numpy") as found:
        assert found.metadata() == {"format": "pt"}
        assert sorted(found.keys()) == ["a", "b"]


def test_owners_of_a_sharded_model_share_its_bytes_and_leave_none_out() -> None:
    tensors = {f"layer.{n}": torch.empty(100 + 7 * n, 10) for n in range(20)}
    layout = Layout.of({**tensors, "embedding": torch.empty(1500, 10)}, torch.bfloat16)
    for owners in ([0], [0, 1], [0, 2, 3]):
        shares = shares_of(layout, owners)
        assert sorted(shares) == owners
        assert sorted(n for names in shares.values() for n in names) == sorted(layout.tensors)
        loads = [
            sum(2 * torch.Size(layout.tensors[name][1]).numel() for name in names)
            for names in shares.values()
        ]
        assert max(loads) - min(loads) <= 2 * 10 * 240, loads


def test_an_arena_that_another_process_made_is_written_into_and_left_there(tmp_path: Path) -> None:
    layout = Layout.of({"w": torch.ones(4), "v": torch.ones(4)}, torch.float32)
    ours = Arena(tmp_path / "arena", layout)
    theirs = Arena(tmp_path / "arena", layout, is_new=False)
    ours.views["w"].fill_(3)
    theirs.views["v"].fill_(5)
    theirs.close()
    assert (ours.views["w"][0], ours.views["v"][0]) == (3, 5)
    assert load_file(tmp_path / "arena")["v"].tolist() == [5.0] * 4
    ours.close()
    assert not (tmp_path / "arena").exists()
