"""control.json, both ends: commands for a running job, written by anybody, read after each step."""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.files import (
    CHECKPOINTS_NAME,
    checkpoint_steps,
    read_json_object,
    remove_quietly,
    replace_file,
)

# ---- ControlFile: commands for a running job, read from RUN/control.json at the end of a step
#
# The file may be written by anybody who can write the folder, at any moment, so it is read as a
# whole, capped, without following links, and a file that is not what we expect is reported once and
# otherwise ignored. Each command is done once, told apart by its id.


CONTROL_NAME = "control.json"

BEST_NAME = "best.json"

SCHEMA_VERSION = 1

MAX_COMMANDS = 20

MAX_BYTES = 64 * 1024

Command = Literal["preview", "save", "mark_best", "stop"]


class ControlCommand(BaseModel):
    """One thing to do."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-zA-Z_-]{1,64}$")]
    """Told apart by it: a command is done once."""
    command: Command
    step: Annotated[int, Field(ge=0)] | None = None
    """With `mark_best` only: the step whose answers were judged; None: the one that ends then."""
    created_at: float = 0.0

    @model_validator(mode="after")
    def _check_step(self) -> ControlCommand:
        if self.step is not None and self.command != "mark_best":
            raise ValueError(f"step={self.step} goes with mark_best, not with {self.command}")
        return self


class ControlContent(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    commands: Annotated[list[ControlCommand], Field(max_length=MAX_COMMANDS)]


class ControlFile:
    """What a run folder's control.json asks for. Commands from before the start do not count."""

    def __init__(self, folder: Path, report: Callable[[str, Literal["info", "warning"]], None]):
        """Take the run folder.

        Args:
            folder: of the run.
            report: takes words for the user and how serious they are.
        """
        self.path, self._report = folder / CONTROL_NAME, report
        self._best_path = folder / BEST_NAME
        self._stamp: tuple[int, int, int] | None = None
        self._is_reported = False
        self._pending: list[ControlCommand] = []
        self._done = {command.id for command in self._read()}
        self.marked_step = read_mark(folder)
        """The step that a person marked as best; 0: none. Its checkpoint is kept."""

    def poll(self) -> frozenset[Command]:
        """Commands that are new; a look at the file's date where nothing changed."""
        for command in self._read():
            if command.id not in self._done:
                self._done.add(command.id)
                self._pending.append(command)
        return frozenset(command.command for command in self._pending)

    def is_save_asked(self, step: int) -> bool:
        """Whether a pending command needs a checkpoint of `step`, which ends now."""
        return any(
            one.command == "save" or (one.command == "mark_best" and one.step in (None, step))
            for one in self._pending
        )

    def acknowledge(self, step: int, *, is_previewed: bool) -> None:
        """Say of each pending command what is done at the end of `step`; marks the best step.

        A step is marked only where its checkpoint is there, or is about to be: `is_save_asked`.

        Args:
            is_previewed: whether previews of this step were asked for (not where they are off).
        """
        said: dict[Command, str] = {
            "preview": f"previews at step {step}"
            if is_previewed
            else "no previews: this run makes none",
            "save": f"checkpoint of step {step}",
            "stop": f"stop after step {step}",
        }
        for command in self._pending:
            if command.command != "mark_best":
                self._report(f"control: {said[command.command]} ({command.id})", "info")
                continue
            wanted = step if command.step is None else command.step
            if wanted == step or wanted in self._kept():
                self._report(f"control: {self._mark_best(wanted)} ({command.id})", "info")
            else:
                self._report(f"control: {self._not_kept(wanted)} ({command.id})", "warning")
        self._pending.clear()

    def _kept(self) -> list[int]:
        return checkpoint_steps(self.path.parent / CHECKPOINTS_NAME)

    def _not_kept(self, step: int) -> str:
        """Another step in its place would be one that nobody judged."""
        kept = ", ".join(map(str, self._kept())) or "none"
        return (
            f"step {step} is not marked as best: it has no checkpoint, so its weights are gone "
            f"(checkpoints: {kept}); with output.checkpoint_interval = monitoring."
            "inference_interval every previewed step has one"
        )

    def _mark_best(self, step: int) -> str:
        """Remember `step` as the best one, over a resume too."""
        self.marked_step = step
        try:
            replace_file(self._best_path, json.dumps({"step": step}) + "\n")
        except OSError as error:
            return f"step {step} marked as best until the run ends ({BEST_NAME}: {error.strerror})"
        return f"step {step} marked as best; its checkpoint is kept"

    def unmark(self) -> None:
        """No step is marked as best any more."""
        self.marked_step = 0
        remove_quietly(self._best_path)

    def _read(self) -> Sequence[ControlCommand]:
        """The commands of the file, if it changed since the last look."""
        try:
            data = self._bytes()
        except OSError as error:
            return self._refuse(error.strerror or str(error))
        if data is None:
            return ()
        if len(data) > MAX_BYTES:
            return self._refuse(f"it is larger than {MAX_BYTES} bytes")
        try:
            return ControlContent.model_validate_json(data).commands
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            return self._refuse(f"{place}: {first['msg']}")

    def _bytes(self) -> bytes | None:
        """The file's content; None where there is no file or it is the one of the last look."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            if not stat.S_ISREG(found.st_mode):
                raise OSError("it is no regular file")
            # The file is replaced as a whole, so one read gets all of it or more than is allowed.
            return os.read(descriptor, MAX_BYTES + 1)
        finally:
            os.close(descriptor)

    def _refuse(self, why: str) -> Sequence[ControlCommand]:
        if not self._is_reported:
            self._is_reported = True
            self._report(
                f"{self.path} is ignored ({why[:200]}); commands are written by `trainer monitor "
                "--allow-control`. This warning is shown only once.",
                "warning",
            )
        return ()


def read_mark(folder: Path) -> int:
    """The step of a run folder that a person marked as best; 0: none."""
    try:
        step = json.loads((folder / BEST_NAME).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    return step if isinstance(step, int) and step > 0 else 0


# ---- ControlWriter: puts commands for a run into its control.json


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
