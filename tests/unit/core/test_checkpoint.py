"""Checkpoints are whole or not there; a broken one is named, never loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import files
from trainer.core.checkpoint import (
    MANIFEST,
    clean_staging,
    find_latest_checkpoint,
    load_named_checkpoint,
    save_checkpoint,
    step_dir,
    verify_checkpoint,
)
from trainer.errors import CheckpointError, ResumeError

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "run_state.json",
)


def write_state(folder: Path, mark: str = "x") -> None:
    for name in FILES:
        files.write_text(folder / name, f"{name} {mark} " * 20)


def save(root: Path, step: int, keep: int = 10, **options: object) -> Path:
    return save_checkpoint(
        root, step, lambda f: write_state(f, str(step)), keep=keep, metadata={"a": 1}, **options
    )  # type: ignore[arg-type]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_verifies_and_names_every_file(tmp_path: Path) -> None:
    manifest = verify_checkpoint(save(tmp_path, 7))
    assert (manifest.step, manifest.metadata) == (7, {"a": 1})
    assert set(manifest.files) == set(FILES)
    assert names(tmp_path) == ["step-00000007"]


def test_the_newest_by_step_number_is_found_whatever_the_clock_said(tmp_path: Path) -> None:
    for step in (3, 12, 9):
        save(tmp_path, step)
    os.utime(step_dir(tmp_path, 3), (time.time() + 9999,) * 2)
    path, manifest, problems = find_latest_checkpoint(tmp_path)
    assert (path.name, manifest.step, problems) == ("step-00000012", 12, [])


def test_retention_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=1, protect={2})
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def truncate(path: Path) -> None:
    (path / "optimizer.pt").write_text("short")


def flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def remove(path: Path) -> None:
    (path / "rng_state.pth").unlink()


def add(path: Path) -> None:
    (path / "training_args.bin").write_text("a pickle")


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def half_manifest(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])


def renamed_manifest(path: Path) -> None:
    record = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**record, "step": 99}))


BREAKS = {
    truncate: "optimizer.pt has 5 bytes",
    flip: "model.safetensors was changed",
    remove: "missing rng_state.pth",
    add: "unknown file training_args.bin",
    no_manifest: "not a finished checkpoint",
    half_manifest: "cannot be read",
    renamed_manifest: "says step 99",
}


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path: Path, spoil: object) -> None:
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    spoil(broken)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=BREAKS[spoil]):  # type: ignore[index]
        verify_checkpoint(broken)
    path, _, problems = find_latest_checkpoint(tmp_path)
    assert path.name == "step-00000001"
    assert "step-00000002" in problems[0]
    with pytest.raises(ResumeError, match="step-00000002"):
        load_named_checkpoint(broken)


def test_foreign_and_empty_step_folders_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000999").mkdir()
    (tmp_path / "checkpoint-1000").mkdir()
    path, _, problems = find_latest_checkpoint(tmp_path)
    assert path.name == "step-00000005"
    assert len(problems) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_saved_without_a_part_of_the_state_is_refused(
    tmp_path: Path, name: str
) -> None:
    def without(folder: Path) -> None:
        write_state(folder)
        (folder / name).unlink()

    path = save_checkpoint(tmp_path, 1, without, keep=1, metadata={})
    with pytest.raises(ResumeError, match="saved without"):
        load_named_checkpoint(path)


def test_nothing_to_resume_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        find_latest_checkpoint(tmp_path / "none")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save_checkpoint(tmp_path, 4, lambda f: write_state(f, "new"), keep=1, metadata={"b": 2})
    assert verify_checkpoint(step_dir(tmp_path, 4)).metadata == {"b": 2}
    assert names(tmp_path) == ["step-00000004"]


def test_a_failing_save_leaves_older_checkpoints_and_no_staging(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fails(folder: Path) -> None:
        write_state(folder)
        raise OSError(28, "No space left on device")

    for step in (1, 2):
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path, step, fails, keep=1, metadata={})
    assert names(tmp_path) == ["step-00000001"]
    verify_checkpoint(step_dir(tmp_path, 1))


def test_a_full_disk_leaves_older_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from trainer.core.checkpoint import save_checkpoint
from trainer.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_checkpoint(Path({str(tmp_path)!r}), 2, lambda f: (f / "model.safetensors").write_bytes(
        b"x" * 5000), keep=1, metadata={{}})
except CheckpointError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("refused:"), done.stderr
    assert names(tmp_path) == ["step-00000001"]


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_staging_of_dead_processes_is_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    living = subprocess.Popen(["sleep", "60"])
    try:
        for pid in (ended.pid, living.pid):
            (tmp_path / f".tmp-step-00000003-{pid}").mkdir()
        removed = clean_staging(tmp_path)
        assert [path.name for path in removed] == [f".tmp-step-00000003-{ended.pid}"]
        assert names(tmp_path) == [f".tmp-step-00000003-{living.pid}"]
    finally:
        living.kill()
        living.wait()


def test_a_checkpoint_set_aside_by_a_killed_save_is_taken_back(tmp_path: Path) -> None:
    shutil.move(save(tmp_path, 6), tmp_path / ".old-step-00000006")
    path, _, _ = find_latest_checkpoint(tmp_path)
    assert path.name == "step-00000006"


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_library_that_cannot_write_makes_a_checkpoint_error(tmp_path: Path, library: str) -> None:
    import resource
    import signal

    import torch
    from safetensors.torch import save_file

    big = torch.zeros(100_000)

    def write(folder: Path) -> None:
        if library == "torch":
            torch.save(big, folder / "optimizer.pt")
        else:
            save_file({"big": big}, folder / "model.safetensors")

    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN  # Python's own choice
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_checkpoint(tmp_path, 1, write, keep=2, metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_state_itself_stays_what_it_is(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        save_checkpoint(tmp_path, 1, write, keep=2, metadata={})
