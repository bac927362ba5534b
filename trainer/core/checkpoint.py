"""Checkpoints that are whole or not there: stage, hash, manifest, rename, verify, then retention.

A checkpoint is a folder `step-00000042` with the state's files and a `manifest.json` that names
each of them with size and sha256. Nothing here knows about models or trainers.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import files
from trainer.config.section import VAL_LOSS
from trainer.core.run_folder import RunFolder
from trainer.errors import CheckpointError, OutputError, ResumeError
from trainer.files import STAGING_NAME, checkpoint_steps, is_alive, step_name
from trainer.monitoring.control import read_mark

MANIFEST = "manifest.json"

RUN_STATE_FILE = "run_state.json"

SCHEMA_VERSION = 1

RETIRED_PREFIX = ".old-"

LEFT_PREFIX = "left-at-"
"""Of folders with checkpoints that a resume from an older one left behind."""

REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", RUN_STATE_FILE)
"""Without any of these a resume would silently restart a part of the training."""

TRAINING_FILES = (*REQUIRED, "scaler.pt", "rng_state*.pth", "moments")
"""Patterns of the files that are no part of the model."""

Hashes = dict[str, dict[str, Any]]
"""File name -> {"size": bytes, "sha256": hex}."""

HashFiles = Callable[[Path, list[str]], dict[str, str]]
"""(folder, names of files in it) -> the sha256 of each, hex."""

REQUIRED_KINDS = {"weights": r".*model.*\.safetensors$", "random state": r"rng_state.*\.pth$"}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    files: Hashes
    metadata: dict[str, Any]


def step_dir(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / step_name(step)


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """The sha256 of files, hex, by this process alone."""
    return {name: files.hash_file(folder / name) for name in names}


def save_checkpoint(
    root: Path,
    step: int,
    write_state: Callable[[Path], Hashes | None],
    *,
    keep: int,
    protect: Collection[int] = (),
    metadata: dict[str, Any],
    hashing: HashFiles = hash_files,
) -> Path:
    """Write a checkpoint, verify it, and only then remove older ones.

    Args:
        root: `checkpoints/` of a run; made if it is not there.
        step: optimizer steps done.
        write_state: writes the state's files into the folder it is given; returns what others
            than this process wrote, synced and hashed.
        keep: newest checkpoints that stay.
        protect: steps that stay besides, such as the best one.
        metadata: JSON values for the manifest.
        hashing: reads what was written again.
    Returns:
        The checkpoint's folder.
    Raises:
        CheckpointError: it could not be written or verified; older ones are as before.
    """
    staging = root / f".tmp-step-{step:08d}-{os.getpid()}"
    target = step_dir(root, step)
    try:
        files.make_dir(staging)
        with files.library_errors():
            known = write_state(staging) or {}
        _write_manifest(staging, step, metadata, known)
        retired = _set_aside(target)
        files.replace(staging, target)
        files.sync_dir(root)
    except CheckpointError:
        raise
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        _put_back(target)
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written ({error}); older checkpoints are as they "
            "were. Free some space or check the disk, then --resume."
        ) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    verify_checkpoint(target, hashing)
    if retired is not None:
        files.remove_tree(retired)
    _retain(root, keep, {*protect, step})
    return target


def _write_manifest(folder: Path, step: int, metadata: dict[str, Any], known: Hashes) -> None:
    """Hash and sync every file but the known ones, then write the manifest, the last to appear."""
    saved = dict(known)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in known:
            continue
        files.sync_file(path)
        saved[name] = {
            "size": path.stat().st_size,
            "sha256": files.hash_file(path),
        }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "created_at": time.time(),
        "files": saved,
        "metadata": metadata,
    }
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
    files.sync_file(folder / MANIFEST)
    files.sync_dir(folder)


def _set_aside(target: Path) -> Path | None:
    """Move an earlier checkpoint of the same step away; it is removed when the new one is whole."""
    if not target.exists():
        return None
    retired = target.with_name(f"{RETIRED_PREFIX}{target.name}")
    shutil.rmtree(retired, ignore_errors=True)
    files.replace(target, retired)
    return retired


def _put_back(target: Path) -> None:
    """Undo `_set_aside` after a failure."""
    retired = target.with_name(f"{RETIRED_PREFIX}{target.name}")
    if retired.exists() and not target.exists():
        os.replace(retired, target)


def _retain(root: Path, keep: int, protect: Collection[int]) -> None:
    """Remove all but the newest `keep` checkpoints, by step number, never a protected one."""
    steps = checkpoint_steps(root)
    for step in steps[: max(len(steps) - keep, 0)]:
        if step not in protect:
            files.remove_tree(step_dir(root, step))
    files.sync_dir(root)


def verify_checkpoint(path: Path, hashing: HashFiles = hash_files) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Args:
        hashing: reads the files; several processes share them out.
    Raises:
        CheckpointError: something is missing, changed or too much; it is named.
    """
    manifest = _read_manifest(path)
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    missing, extra = sorted(set(manifest.files) - found), sorted(found - set(manifest.files))
    if missing or extra:
        words = [f"missing {name}" for name in missing] + [f"unknown file {name}" for name in extra]
        raise CheckpointError(f"{path}: {', '.join(words)}.")
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size
        if size != record["size"]:
            raise CheckpointError(f"{path}: {name} has {size} bytes, written {record['size']}.")
    try:
        hashes = hashing(path, list(manifest.files))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    for name, record in manifest.files.items():
        if hashes[name] != record["sha256"]:
            raise CheckpointError(f"{path}: {name} was changed: its sha256 is not the manifest's.")
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(int(record["step"]), dict(record["files"]), dict(record["metadata"]))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no {MANIFEST}: not a finished checkpoint.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error!r}).") from error
    if step_dir(path.parent, manifest.step).name != path.name:
        raise CheckpointError(f"{path}: its {MANIFEST} says step {manifest.step}.")
    return manifest


def _verify_for_resume(path: Path, hashing: HashFiles) -> Manifest:
    """`verify_checkpoint`, and everything is there that a resume restores."""
    manifest = verify_checkpoint(path, hashing)
    missing = [name for name in REQUIRED if name not in manifest.files]
    missing += [
        kind
        for kind, pattern in REQUIRED_KINDS.items()
        if not any(re.match(pattern, name) for name in manifest.files)
    ]
    if missing:
        raise CheckpointError(f"{path}: saved without {', '.join(missing)}.")
    return manifest


def find_latest_checkpoint(
    root: Path, hashing: HashFiles = hash_files
) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        hashing: as of `verify_checkpoint`.
    Returns:
        Its folder, its manifest, and what is wrong with the newer ones that were passed over.
    Raises:
        ResumeError: there is none.
    """
    _restore_retired(root)
    problems: list[str] = []
    for step in reversed(checkpoint_steps(root)):
        path = step_dir(root, step)
        try:
            return path, _verify_for_resume(path, hashing), problems
        except CheckpointError as error:
            problems.append(f"passing over a broken checkpoint: {error}")
    found = "".join(f"\n  {problem}" for problem in problems) or " No checkpoint was written yet."
    raise ResumeError(
        f"{root}: nothing to resume.{found}\nStart a new run in another --output, or without "
        "--resume in an empty one."
    )


def load_named_checkpoint(path: Path, hashing: HashFiles = hash_files) -> Manifest:
    """Verify one checkpoint; a named one is never replaced by another.

    Args:
        hashing: as of `verify_checkpoint`.
    Raises:
        ResumeError: it is broken.
    """
    if not path.is_dir():
        raise ResumeError(f"--resume {path}: there is no such checkpoint folder.")
    try:
        return _verify_for_resume(path, hashing)
    except CheckpointError as error:
        raise ResumeError(
            f"--resume {error} Give another checkpoint, or --resume alone for the newest whole one."
        ) from error


def set_aside_newer(root: Path, step: int) -> Path | None:
    """Move checkpoints of later steps than `step` out of the way; none is removed.

    They belong to a course of the run that was given up: left in place, the next resume would take
    the newest of them, and retention would keep them instead of new ones.

    Returns:
        The folder they are in now; None where there were none.
    Raises:
        CheckpointError: they cannot be moved.
    """
    newer = [one for one in checkpoint_steps(root) if one > step]
    if not newer:
        return None
    names = (f"{LEFT_PREFIX}{step_name(step)}-{n}" for n in itertools.count(1))
    folder = next(root / name for name in names if not (root / name).exists())
    try:
        files.make_dir(folder)
        for one in newer:
            files.replace(step_dir(root, one), step_dir(folder, one))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: newer checkpoints cannot be moved there ({error})."
        ) from error
    return folder


def _restore_retired(root: Path) -> None:
    """Take back a checkpoint that was set aside by a save which never finished."""
    for retired in root.glob(f"{RETIRED_PREFIX}step-*") if root.is_dir() else ():
        target = retired.with_name(retired.name.removeprefix(RETIRED_PREFIX))
        if not target.exists():
            os.replace(retired, target)


def clean_staging(root: Path) -> list[Path]:
    """Remove what killed processes left half-written; not what a living one is writing.

    Returns:
        What was removed.
    """
    _restore_retired(root)
    removed = []
    for path in list(root.iterdir()) if root.is_dir() else []:
        staged = STAGING_NAME.match(path.name)
        owner = int(staged[1]) if staged is not None else None
        # This process is not saving: what has its number is another's, long gone.
        is_dead = owner is not None and (owner == os.getpid() or not is_alive(owner))
        if is_dead or path.name.startswith(RETIRED_PREFIX):
            shutil.rmtree(path)
            removed.append(path)
    return removed


# ---- which checkpoint of a run somebody means: a step by its number, or the best one


BEST = "best"

MARK = "mark"
"""A person's mark, among what makes a step the best one."""


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A verified checkpoint and why it was taken."""

    path: Path
    step: int
    why: str
    """In words, such as `marked as best`."""


def find_checkpoint(run_dir: Path, wanted: str | int) -> ChosenCheckpoint:
    """Find and verify a checkpoint of a run, for its weights.

    Args:
        run_dir: the folder that was --output.
        wanted: a step, or `best`: the step that a person marked as best, else the best one by
            `output.best_by`: the lowest validation loss, or a score.
    Raises:
        OutputError: there is no such checkpoint, or it is damaged; those there are are named.
    """
    root = run_dir / RunFolder.CHECKPOINTS
    if wanted == BEST:
        step, why = _best_step(run_dir, root)
    elif str(wanted).isdecimal():
        step, why = int(wanted), "as asked for"
    else:
        raise OutputError(f"--step {wanted}: give the number of a step, or {BEST}.")
    path = step_dir(root, step)
    if not path.is_dir():
        reason = "" if why == "as asked for" else f" ({why})"
        raise OutputError(f"{run_dir}: step {step}{reason} has no checkpoint; {_there_are(root)}.")
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        raise OutputError(f"{error} It is damaged; {_there_are(root)}.") from error
    return ChosenCheckpoint(path, step, why)


def _best_step(run_dir: Path, root: Path) -> tuple[int, str]:
    marked = read_mark(run_dir)
    if marked:
        return marked, "marked as best"
    # The end of a run takes evaluations that its last checkpoint was still waiting for.
    record = files.read_json_object(run_dir / RunFolder.RUN_JSON) or {}
    best = (record.get("summary") or {}).get("best") or {}
    if best.get("by", VAL_LOSS) not in (VAL_LOSS, MARK):
        return int(best["step"]), f"best by {best['by']}, {best['value']:.4g}"
    state = _newest_state(root)
    if state is None:
        raise OutputError(f"{run_dir}: no checkpoint was written yet, so there is no best one.")
    scores = state.get("deciding") or {}
    rule = scores.get("rules", {}).get(scores.get("best_by"))
    if rule is not None:
        return _best_by_score(run_dir, root, scores["best_by"], rule)
    losses = state["early_stopping"]
    # Runs of before semantics 2 have no `lowest_step`.
    step = losses.get("lowest_step", losses["best_step"])
    loss = losses.get("lowest_loss", losses["best_loss"])
    if not step:
        raise OutputError(
            f"{run_dir}: no step is marked as best and no validation loss was measured, so there "
            f"is no best one; name a step ({_there_are(root)})."
        )
    return step, f"lowest validation loss, {loss:.4f}"


def _best_by_score(run_dir: Path, root: Path, metric: str, rule: dict[str, Any]) -> tuple[int, str]:
    """What the state of its rule says."""
    if not rule.get("best_step"):
        raise OutputError(
            f"{run_dir}: no step is marked as best, and {metric} was clearly above step 0 at none, "
            f"so there is no best one; name a step ({_there_are(root)})."
        )
    mean = statistics.fmean(rule["reference"].values())
    return int(rule["best_step"]), f"best by {metric}, {mean:.4g}"


def _newest_state(root: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint knows of losses and scores; None: there is none."""
    for step in reversed(checkpoint_steps(root)):
        try:
            text = (step_dir(root, step) / RUN_STATE_FILE).read_text(encoding="utf-8")
            found = dict(json.loads(text))
            dict(found["early_stopping"])
            return found
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one; whichever is chosen in the end is verified
    return None


def _there_are(root: Path) -> str:
    steps = checkpoint_steps(root)
    return f"checkpoints: step {', '.join(map(str, steps))}" if steps else "it has none"
