"""Which step of a run is its best one: marked by a person, else of the lowest validation loss."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.core.checkpoint import checkpoint_steps, step_dir
from trainer.core.hf_trainer import RUN_STATE_FILE
from trainer.core.run_folder import RunFolder
from trainer.errors import OutputError
from trainer.monitoring.control import BEST_NAME


def best_step(run: Path) -> tuple[int, str]:
    """The best step of a run, and in words why it is.

    Raises:
        OutputError: none was marked, and none was measured.
    """
    marked = _read(run / BEST_NAME).get("step")
    if isinstance(marked, int) and marked > 0:
        return marked, "marked as the best"
    root = run / RunFolder.CHECKPOINTS
    for step in reversed(checkpoint_steps(root)):
        state = _read(step_dir(root, step) / RUN_STATE_FILE).get("early_stopping")
        if isinstance(state, dict) and state.get("best_step"):
            return int(state["best_step"]), "of the lowest validation loss"
    raise OutputError(
        f"--step best: {run} has no step that was marked as the best and no validation loss; give "
        "the number of a step."
    )


def _read(path: Path) -> dict[str, object]:
    """A JSON object; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}).") from error
    return found if isinstance(found, dict) else {}
