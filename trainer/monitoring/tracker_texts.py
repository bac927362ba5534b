"""Texts of previews in Weights & Biases and trackio: a table at each preview step, or nothing.

Their curves are transformers' own callbacks'. Answers that arrive after the last step go into the
same runs. W&B has to be kept from taking texts that nobody sent it: it records what is printed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from trainer.monitoring.events import Event, PreviewsDone
from trainer.monitoring.tracking import TEXT_CHARS
from trainer.preview.base import PreviewResult

WITH_TABLES = ("wandb", "trackio")
"""Trackers that get tables here; tensorboard gets its texts in `tracking.py`."""

KEY = "previews"

COLUMNS = (
    *("step", "prompt_id", "sample", "prompt", "golden", "generated", "matches", "weights"),
    "error",
)

WANDB_CONSOLE = "WANDB_CONSOLE"


def keep_console_out() -> str | None:
    """Have W&B record nothing that this process prints: previews are printed, with their texts.

    Returns:
        What is to be said where the user had asked for something else.
    """
    before = os.environ.get(WANDB_CONSOLE)
    os.environ[WANDB_CONSOLE] = "off"
    if before in (None, "off"):
        return None
    return (
        f"{WANDB_CONSOLE}={before} would send wandb what is printed, and with it the texts of "
        "previews: it is off, as monitoring.tracker_texts=false"
    )


class TrackerTables(TrainerCallback):  # type: ignore[misc]
    """A callback that finds the trackers' runs, and an observer that sends tables into them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the trackers of `monitoring.report_to`; those without tables are left alone."""
        self.names = [name for name in names if name in WITH_TABLES]
        self._runs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the runs that the trackers' own callbacks have just begun.

        In this thread: trackio knows its run in the thread that began it only, and previews may
        arrive in another one.
        """
        if not state.is_world_process_zero:
            return
        if "wandb" in self.names:
            import wandb

            self._runs["wandb"] = wandb.run
        if "trackio" in self.names:
            import trackio

            self._runs["trackio"] = trackio.context_vars.current_run.get()

    def on_event(self, event: Event) -> None:
        """Send the answers of a preview step."""
        if not isinstance(event, PreviewsDone) or event.is_superseded:
            return
        columns, rows = table_of(event.results)
        for name, run in self._runs.items():
            if run is None:
                continue
            if name == "wandb":
                import wandb

                table: Any = wandb.Table(columns=columns, data=rows)
            else:
                import trackio

                table = trackio.Table(columns=columns, data=rows)
            run.log({KEY: table, "train/global_step": event.step})

    def close(self) -> None:
        """Let the runs go: their own callbacks end them."""
        self._runs.clear()


def table_of(results: Sequence[PreviewResult]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: texts, verdict and scores of each answer, texts cut as for TensorBoard.

    A prompt has one row, or one of each of its samples.
    """
    given = [name for one in results for name, v in one.scores.items() if v is not None]
    names = list(dict.fromkeys(given))
    rows = [
        [
            result.step,
            result.prompt_id,
            number,
            result.prompt[:TEXT_CHARS],
            (result.golden_answer or "")[:TEXT_CHARS],
            said.text[:TEXT_CHARS],
            {True: "yes", False: "no", None: ""}[said.matches],
            result.weights,
            (said.error_message or "")[:TEXT_CHARS],
            *[said.scores.get(name) for name in names],
        ]
        for result in results
        for number, said in enumerate(result.answers)
    ]
    return [*COLUMNS, *[f"score.{name}" for name in names]], rows
