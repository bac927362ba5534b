"""Which checkpoint of a run somebody means: a step by its number, or the best one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.checkpoint import step_dir, verify_checkpoint
from trainer.core.hf_trainer import RUN_STATE_FILE
from trainer.core.run_folder import RunFolder
from trainer.errors import CheckpointError, OutputError
from trainer.monitoring.control import read_mark
from trainer.monitoring.run_files import checkpoint_steps

BEST = "best"


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
        wanted: a step, or `best`: the step that a person marked as best, else the one with the
            lowest validation loss.
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
    state = _newest_state(root)
    if state is None:
        raise OutputError(f"{run_dir}: no checkpoint was written yet, so there is no best one.")
    # Runs of before semantics 2 have no `lowest_step`.
    step = state.get("lowest_step", state["best_step"])
    loss = state.get("lowest_loss", state["best_loss"])
    if not step:
        raise OutputError(
            f"{run_dir}: no step is marked as best and no validation loss was measured, so there "
            f"is no best one; name a step ({_there_are(root)})."
        )
    return step, f"lowest validation loss, {loss:.4f}"


def _newest_state(root: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint knows of validation losses; None: there is none."""
    for step in reversed(checkpoint_steps(root)):
        try:
            text = (step_dir(root, step) / RUN_STATE_FILE).read_text(encoding="utf-8")
            return dict(json.loads(text)["early_stopping"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one; whichever is chosen in the end is verified
    return None


def _there_are(root: Path) -> str:
    steps = checkpoint_steps(root)
    return f"checkpoints: step {', '.join(map(str, steps))}" if steps else "it has none"
