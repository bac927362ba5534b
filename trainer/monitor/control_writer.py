"""ControlWriter: puts commands for a run into its control.json."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

from trainer.monitor.small_files import read_json_object
from trainer.monitoring.control import CONTROL_NAME, MAX_COMMANDS, SCHEMA_VERSION
from trainer.monitoring.run_files import CHECKPOINTS_NAME, checkpoint_steps, replace_file

COMMAND_WORDS = {
    "preview": ("Preview now", "Make previews at the end of the current step?"),
    "save": ("Save", "Save a checkpoint at the end of the current step?"),
    "mark_best": (
        "Mark as best",
        "Save a checkpoint at the end of the current step and keep it as the best one?",
    ),
    "stop": (
        "Stop after this step",
        "Stop the run at the end of the current step? It writes a checkpoint and the final model, "
        "and `--resume` continues it.",
    ),
}
"""Command -> its button, and the question asked before it is sent."""


class ControlWriter:
    """Sends commands; remembers the last one to tell what became of it."""

    def __init__(self, folder: Path) -> None:
        """Take the run folder; nothing is written yet."""
        self.path = folder / CONTROL_NAME
        self._last: tuple[str, str] | None = None

    def mark_question(self, step: int | None) -> tuple[str, bool]:
        """What to ask before `mark_best` of a step is sent, and whether it can be done.

        Args:
            step: whose answers are looked at; None: there are none, so it is the current step.
        """
        if step is None:
            return COMMAND_WORDS["mark_best"][1], True
        if step in checkpoint_steps(self.path.parent / CHECKPOINTS_NAME):
            return f"Keep the checkpoint of step {step}, whose answers you see, as the best?", True
        return (
            f"Step {step}, whose answers you see, has no checkpoint, so it cannot be marked.",
            False,
        )

    def send(self, command: str, *, step: int | None = None) -> str:
        """Add a command and return its id.

        Args:
            step: with `mark_best`: the step that was judged; None: the one that ends then.
        Raises:
            OSError: the file cannot be written.
        """
        found = (read_json_object(self.path) or {}).get("commands")
        earlier = found if isinstance(found, list) else []
        identity = secrets.token_hex(4)
        entry = {"id": identity, "command": command, "created_at": time.time()}
        if step is not None:
            entry["step"] = step
        commands = [*earlier, entry][-MAX_COMMANDS:]
        values = {"schema_version": SCHEMA_VERSION, "commands": commands}
        replace_file(self.path, json.dumps(values, indent=1) + "\n")
        self._last = (identity, COMMAND_WORDS[command][0])
        return identity

    def outcome(self, notices: list[str]) -> str:
        """What became of the last command, from the run's notices; empty where none was sent."""
        if self._last is None:
            return ""
        identity, label = self._last
        for notice in reversed(notices):
            if f"({identity})" in notice:
                return notice
        return f"{label}: sent, done at the end of the step."
