"""RunFolder: one run's folder, its names, its lock, and what refuses a second run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any

from trainer.config.loader import RESOLVED_NAME
from trainer.config.schema import TrainerConfig
from trainer.errors import OutputError, ResumeError
from trainer.files import CHECKPOINTS_NAME, LOCK, SAVED_BASE, STATUS_NAME, replace_file
from trainer.monitoring.events import plain_values
from trainer.preview.drift import BASE_NAME

OWN_FILES = (
    *("run.json", "status.json", "metrics.jsonl", "previews.jsonl", "evaluations.jsonl"),
    *("worker.json", BASE_NAME),
)

SHARED_NAMES = (RESOLVED_NAME, "logs", SAVED_BASE)
"""What a run writes too, and a folder may have had before it: of a dry run, or of the user."""


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
        self._is_over_unstarted = False
        """An earlier run is in it that made no step."""
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
        cls._check_content(path, resume=resume)
        is_new = not path.exists()
        folder = cls(path, None, is_new=is_new)
        try:
            folder._take_lock()
            # Again, now that nobody else can: a run may have come and gone meanwhile.
            cls._check_content(path, resume=resume)
        except BaseException:
            folder.close()
            raise
        folder._is_over_unstarted = not resume and (path / cls.RUN_JSON).exists()
        folder._added = [name for name in SHARED_NAMES if not (path / name).exists()]
        return folder

    @classmethod
    def _check_content(cls, path: Path, *, resume: bool) -> None:
        holds_run = cls._holds_run(path)
        if holds_run and not resume:
            raise OutputError(
                f"{path}: this folder holds a run already. Continue it with --resume, or give "
                "another --output."
            )
        if resume and not holds_run:
            what = "a run that made no step" if cls._holds_unstarted(path) else "no run"
            raise ResumeError(
                f"--resume: {path} holds {what}, so there is nothing to resume. Give the --output "
                "of the run, or leave --resume out."
            )

    @classmethod
    def _holds_run(cls, path: Path) -> bool:
        try:
            return not cls._holds_unstarted(path) and any(
                (path / name).exists() for name in (cls.RUN_JSON, cls.STATUS, cls.CHECKPOINTS)
            )
        except OSError:
            return False  # not a folder we may look into: taking the lock will say why

    @classmethod
    def _holds_unstarted(cls, path: Path) -> bool:
        """Whether a run was stopped here while it loaded: it said nothing and trained nothing."""
        if (path / cls.CHECKPOINTS).exists() or (path / cls.FINAL_MODEL).exists():
            return False
        try:
            state = json.loads((path / cls.RUN_JSON).read_text(encoding="utf-8"))["state"]
            metrics = path / "metrics.jsonl"
            if state != "stopped" or not metrics.exists():
                return bool(state == "stopped")
            with metrics.open("rb") as lines:
                return not any(b'"StepDone"' in line for line in lines)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def clear_unstarted(self) -> None:
        """Remove what a run left here that was stopped before its first step."""
        if not self._is_over_unstarted:
            return
        for path in (self.path / name for name in (*OWN_FILES, SAVED_BASE)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._added = [name for name in SHARED_NAMES if not (self.path / name).exists()]
        self._is_over_unstarted = False

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
