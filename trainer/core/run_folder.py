"""RunFolder: one run's folder, its names, its lock, and what refuses a second run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.config.loader import RESOLVED_NAME
from trainer.config.schema import TrainerConfig
from trainer.errors import OutputError, ResumeError
from trainer.files import (
    CHECKPOINTS_NAME,
    LOCK,
    SAVED_BASE,
    STAGING_NAME,
    STATUS_NAME,
    read_json_object,
    replace_file,
)
from trainer.monitoring.control import BEST_NAME
from trainer.monitoring.events import plain_values
from trainer.monitoring.resuming import resume_command
from trainer.preview.drift import BASE_NAME

OWN_FILES = (
    *("run.json", "status.json", "metrics.jsonl", "previews.jsonl", "evaluations.jsonl"),
    *("worker.json", BASE_NAME, BEST_NAME),
)

SHARED_NAMES = (RESOLVED_NAME, "logs", SAVED_BASE)
"""What a run writes too, and a folder may have had before it: of a dry run, or of the user."""


@dataclass(frozen=True)
class Content:
    """What a folder holds of an earlier run."""

    is_run: bool = False
    """A run that has a checkpoint or a model, or whose record cannot be read."""
    is_unsaved: bool = False
    """A run that ended, however, before its first checkpoint."""
    step: int = 0
    """Of an unsaved one: steps that it made."""

    @property
    def is_without_checkpoint(self) -> bool:
        """Whether steps were made, of which there are figures but no checkpoint."""
        return self.is_unsaved and self.step > 0


class RunFolder:
    """The folder of `--output` while this process runs in it."""

    RUN_JSON = "run.json"
    CONFIG = RESOLVED_NAME
    STATUS = STATUS_NAME
    CHECKPOINTS = CHECKPOINTS_NAME
    FINAL_MODEL = "final_model"

    def __init__(self, path: Path, lock: IO[str] | None, *, is_new: bool) -> None:
        """Use `create`, which checks."""
        self.path, self._lock, self._is_new = path, lock, is_new
        self._added: list[str] = []
        self._is_over_unsaved = False
        """An earlier run is in it that has no checkpoint."""
        self.notices: list[str] = []

    @classmethod
    def create(cls, path: Path, *, resume: bool) -> RunFolder:
        """Take a folder for one run.

        Args:
            path: made if it is not there; may hold other files.
            resume: continue the run that is in it.
        Raises:
            OutputError: it cannot be written, holds a run already, or another process runs in it.
            ResumeError: there is no run to resume.
        """
        folder = cls(path, None, is_new=not path.exists())
        folder._check(resume=resume)
        try:
            folder._take_lock()
            # Again, now that nobody else can: a run may have come and gone meanwhile.
            folder._check(resume=resume)
        except BaseException:
            folder.close()
            raise
        folder._is_over_unsaved = not resume and folder._content().is_unsaved
        folder._added = [name for name in SHARED_NAMES if not (path / name).exists()]
        return folder

    @classmethod
    def check(cls, path: Path, *, resume: bool) -> None:
        """As `create` refuses a folder, as far as it is seen without taking it.

        Raises:
            OutputError, ResumeError: as of `create`.
        """
        cls(path, None, is_new=False)._check(resume=resume)

    def _check(self, *, resume: bool) -> None:
        """Refuse what does not fit what is in the folder.

        Without the lock, a run that has no checkpoint may be one that is at work.
        """
        path, found = self.path, self._content()
        if found.is_run and not resume:
            raise OutputError(
                f"{path}: this folder holds a run already. Continue it with "
                f"`{self._resume_command()}`, or give another --output."
            )
        if found.is_without_checkpoint and not resume and self._lock is not None:
            raise OutputError(
                f"{path}: the run in this folder ended after step {found.step}, before its first "
                f"checkpoint. Start it again from step 0, over what it wrote, with "
                f"`{self._resume_command()}`, or give another --output."
            )
        if resume and not (found.is_run or found.is_unsaved):
            raise ResumeError(
                f"--resume: {path} holds no run, so there is nothing to resume. Give the --output "
                "of the run, or leave --resume out."
            )

    def _resume_command(self) -> str:
        record = read_json_object(self.run_json) or {}
        return resume_command(str(self.path), record.get("config"))

    def _content(self) -> Content:
        names = (self.RUN_JSON, self.STATUS, self.CHECKPOINTS)
        try:
            if not any((self.path / name).exists() for name in names):
                return Content()
            step = self._step_without_checkpoint()
        except OSError:
            return Content()  # not a folder we may look into: taking the lock will say why
        return Content(is_run=step is None, is_unsaved=step is not None, step=step or 0)

    def _step_without_checkpoint(self) -> int | None:
        """The last step of a run that has neither checkpoint nor model; None of every other run.

        Raises:
            OSError: it cannot be read.
        """
        checkpoints = self.path / self.CHECKPOINTS
        kept = checkpoints.iterdir() if checkpoints.is_dir() else ()
        # A save that was killed left a folder that is no checkpoint.
        if (self.path / self.FINAL_MODEL).exists() or any(
            not STAGING_NAME.match(one.name) for one in kept
        ):
            return None
        record = read_json_object(self.run_json if self.run_json.exists() else self.status_json)
        state = (record or {}).get("state")
        # Where there are no locks, one that did not say that it ended may be at work.
        is_over = state in ("stopped", "failed") or (state != "completed" and not self.notices)
        if not isinstance(state, str) or not is_over:
            return None
        metrics = self.path / "metrics.jsonl"
        if not metrics.exists():
            return 0
        with metrics.open("rb") as lines:
            return sum(b'"StepDone"' in line for line in lines)

    def begin_anew(self) -> bool:
        """With `--resume`: whether the run has no checkpoint, and will start again from step 0."""
        found = self._content()
        self._is_over_unsaved = self._is_over_unsaved or found.is_unsaved
        return found.is_unsaved

    def clear_unsaved(self) -> None:
        """Remove what a run left here that ended before its first checkpoint."""
        if not self._is_over_unsaved:
            return
        for path in (self.path / name for name in (*OWN_FILES, SAVED_BASE, self.CHECKPOINTS)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._added = [name for name in SHARED_NAMES if not (self.path / name).exists()]
        self._is_over_unsaved = False

    def _take_lock(self) -> None:
        """Make the folder and hold an exclusive lock in it as long as this process lives."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); give another --output."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._lock.seek(0)
                holder = self._lock.read().strip() or "another process"
                self._lock.close()
                raise OutputError(
                    f"{self.path}: {holder} is running in this folder; wait for it, stop it, or "
                    "give another --output."
                ) from error
            self.notices.append(
                f"{self.path} is on a file system without locks ({error.strerror}): nothing keeps "
                "a second run out of it"
            )
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()
        except OSError as error:  # a full disk
            with contextlib.suppress(OSError):
                self._lock.close()
            self.discard_if_empty()
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space or give "
                "another --output."
            ) from error

    # ---- names

    @property
    def run_json(self) -> Path:
        """The manifest of the run."""
        return self.path / self.RUN_JSON

    @property
    def status_json(self) -> Path:
        """What it does now, for views."""
        return self.path / self.STATUS

    @property
    def config_resolved(self) -> Path:
        """The config with everything filled in; loads as a config file."""
        return self.path / self.CONFIG

    @property
    def checkpoints_dir(self) -> Path:
        """Where checkpoints are."""
        return self.path / self.CHECKPOINTS

    @property
    def final_model_dir(self) -> Path:
        """The finished model."""
        return self.path / self.FINAL_MODEL

    @property
    def logs_dir(self) -> Path:
        """TensorBoard's files."""
        return self.path / "logs"

    def log(self, name: str) -> Path:
        """Where a helper process of this run complains."""
        self.logs_dir.mkdir(exist_ok=True)
        return self.logs_dir / f"{name}.log"

    @property
    def worker_json(self) -> Path:
        """Where this run's preview server is, while it has one."""
        return self.path / "worker.json"

    @property
    def drift_base(self) -> Path:
        """What the weights before training answer to general prompts."""
        return self.path / BASE_NAME

    @property
    def final_evaluation_jsonl(self) -> Path:
        """Answers of the final evaluation."""
        return self.path / "final_evaluation.jsonl"

    # ---- files

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Replace a JSON file as a whole; numbers JSON cannot hold become null."""
        text = json.dumps(plain_values(values), indent=2, allow_nan=False) + "\n"
        try:
            replace_file(path, text)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror}); free some space or give another "
                "--output."
            ) from error

    def update_json(self, path: Path, values: dict[str, Any]) -> None:
        """Replace some top-level values of a JSON file."""
        self.write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})

    def discard_if_empty(self) -> None:
        """Remove the lock, and the folder if we made it and nothing else is in it."""
        (self.path / LOCK).unlink(missing_ok=True)
        if self._is_new and not any(self.path.iterdir()):
            shutil.rmtree(self.path)

    def discard_unstarted_run(self) -> None:
        """Remove what a run wrote that the user's input stopped before its first step.

        Only names that were free before; a folder that was there before keeps its other files.
        """
        if (self.path / self.CHECKPOINTS).exists():
            return
        if self._is_new:
            shutil.rmtree(self.path)
            return
        for path in (self.path / name for name in (*OWN_FILES, *self._added)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.discard_if_empty()

    def close(self) -> None:
        """Let the folder go; may be called twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def resolved_config(config: TrainerConfig) -> dict[str, Any]:
    """The config as JSON values that start the same run anew: where it was resumed is no part."""
    values: dict[str, Any] = config.model_dump(mode="json")
    values["output"] |= {"resume": None, "allow_changes": False}
    return values
