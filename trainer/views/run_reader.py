"""RunReader: what a run folder says, read bit by bit while it grows."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.counts import counted
from trainer.errors import OutputError
from trainer.files import (
    CHECKPOINTS_NAME,
    STATUS_NAME,
    checkpoint_steps,
    read_json_object,
    require_folder,
)
from trainer.monitoring.events import TRAINING
from trainer.monitoring.status_reader import (
    METRICS_NAME,
    PREVIEWS_NAME,
    RESUMED,
    LineTail,
    TrainingStatusReader,
    as_preview,
    limit_of_resume,
    parse_lines,
)
from trainer.monitoring.status_schema import TrainingStatus
from trainer.preview.base import PreviewResult
from trainer.views.metrics import MetricsTable
from trainer.views.timeline import FinalEvaluation, PreviewBook, read_final_evaluation
from trainer.views.words import ending_words, going_on_words, is_silent, lost_words, working_words

logger = logging.getLogger(__name__)

MANIFEST_NAME = "run.json"

ORIGINS_NAME = "config.origins.json"

LOCK_NAME = ".lock"

RECENT_STEPS = 20
"""The longest of so many steps is what a step takes."""

STEP_DONE = "StepDone"

OVER = ("completed", "stopped", "failed")


PIECE = 5_000
"""Lines that are parsed and taken at a time."""

LONG_PHASE_S = 600.0
"""A phase other than training that says nothing for so long gets its time beside it."""


@dataclass(frozen=True)
class Silence:
    """That a run says nothing for longer than can be explained."""

    since: float
    """When it said something last, in unix seconds."""
    phase: str
    """What it did then, in words."""
    step_time_s: float
    """Seconds that a step takes; 0 where nothing tells."""


@dataclass
class Versions:
    """Raised by one whenever something of that kind changed; pages compare them."""

    status: int = 0
    metrics: int = 0
    previews: int = 0
    manifest: int = 0

    def copy(self) -> Versions:
        """The values of this moment."""
        return Versions(self.status, self.metrics, self.previews, self.manifest)


class RunReader:
    """One run. `poll` reads what is new; everything else looks at what was read.

    `poll` may run in another thread; whoever reads meanwhile holds `lock`.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder of a run; nothing is read yet."""
        self.folder = folder
        self.lock = threading.RLock()
        self.versions = Versions()
        self.status: TrainingStatus | None = None
        self.problem: str | None = None
        """Why there is no status; None when there is one."""
        self.manifest: dict[str, Any] = {}
        """run.json: config, data card, versions, how it ended."""
        self.origins: dict[str, str] = {}
        """Dotted config key -> where its value came from; empty where nobody wrote that down."""
        self.metrics = MetricsTable()
        self.previews = PreviewBook()
        self.final_evaluation: FinalEvaluation | None = None
        """Of a run that is over and had one."""
        self.num_bad_lines = 0
        self._tails = {name: LineTail(folder / name) for name in (METRICS_NAME, PREVIEWS_NAME)}
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._reported: set[str] = set()

    # ---- reading

    def poll(self) -> bool:
        """Read what is new; True when anything changed. Trouble is kept in words, never raised."""
        before = self.versions.copy()
        self.poll_summary()
        self._poll_lines(METRICS_NAME)
        self._poll_lines(PREVIEWS_NAME)
        return before != self.versions

    def poll_summary(self) -> None:
        """Read status.json and run.json only, where they changed."""
        self._poll_status()
        self._poll_manifest()

    def _is_changed(self, name: str) -> bool:
        try:
            found = os.stat(self.folder / name)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            stamp = (0, 0, 0)
        if self._stamps.get(name) == stamp:
            return False
        self._stamps[name] = stamp
        return True

    def _poll_status(self) -> None:
        if not self._is_changed(STATUS_NAME):
            return
        status, problem = None, None
        try:
            status = TrainingStatusReader(self.folder).read()
        except OutputError as error:
            problem = str(error)
        summary = status.summary if status is not None and status.state in OVER else {}
        final = read_final_evaluation(self.folder, summary)
        with self.lock:
            self.final_evaluation = final
            # A status that cannot be read now does not make the last good one untrue.
            self.status = status or self.status
            self.problem = problem
            self.versions.status += 1

    def _poll_manifest(self) -> None:
        for name in (MANIFEST_NAME, ORIGINS_NAME):
            if not self._is_changed(name):
                continue
            values = read_json_object(self.folder / name) or {}
            with self.lock:
                if name == MANIFEST_NAME:
                    self.manifest = values
                else:
                    self.origins = {key: str(value) for key, value in values.items()}
                self.versions.manifest += 1

    def _poll_lines(self, name: str) -> None:
        try:
            new = self._tails[name].poll()
        except OSError as error:
            self._report(name, f"cannot be read ({error})")
            return
        if not (new.lines or new.is_reset or new.num_too_long):
            return
        num_bad = new.num_too_long
        is_reset = new.is_reset
        # In pieces: a hundred thousand rows at once would be hundreds of MiB for a moment.
        for start in range(0, max(len(new.lines), 1), PIECE):
            kept, num_bad_rows = parse_lines(new.lines[start : start + PIECE])
            results = [as_preview(row) for row in kept] if name == PREVIEWS_NAME else []
            num_bad += num_bad_rows + sum(result is False for result in results)
            with self.lock:
                if name == METRICS_NAME:
                    self._take_metrics(kept, is_reset=is_reset)
                else:
                    self._take_previews(results, is_reset=is_reset)
            is_reset = False
        if num_bad:
            self._report(
                name,
                f"{counted(num_bad, 'line of it is', 'lines of it are')} not what a run writes; "
                "left out",
            )
            with self.lock:
                self.num_bad_lines += num_bad

    def _take_metrics(self, rows: list[dict[str, Any]], *, is_reset: bool) -> None:
        if is_reset:
            self.metrics.clear()
        for kind, group in itertools.groupby(rows, key=lambda row: row.get("type")):
            if kind == STEP_DONE:
                self.metrics.add_steps(list(group))
                continue
            for row in group:
                if kind == RESUMED:
                    self.metrics.drop_after(limit_of_resume(row["step"]))
                else:
                    self.metrics.add(row)
        self.versions.metrics += 1

    def _take_previews(self, results: list[PreviewResult | int | bool], *, is_reset: bool) -> None:
        if is_reset:
            self.previews.clear()
        for result in results:
            if isinstance(result, PreviewResult):
                self.previews.add(result)
            elif result is not False:
                self.previews.drop_after(limit_of_resume(result))
        self.versions.previews += 1

    def _report(self, name: str, what: str) -> None:
        if name not in self._reported:
            self._reported.add(name)
            logger.warning("%s: %s", self.folder / name, what)

    # ---- what it says

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """Optimizer steps done: status.json is written every few steps, metrics at each."""
        newest = self.metrics.steps[-1] if len(self.metrics) else 0
        return max(newest, self.status.step if self.status is not None else 0)

    @property
    def is_over(self) -> bool:
        """Whether the run said how it ended."""
        return self.status is not None and self.status.state in OVER

    def is_lost(self) -> bool:
        """Whether the process is gone without having said how it ended (this machine only)."""
        status = self.status
        if status is None or self.is_over or not self._is_local():
            return False
        try:
            process = psutil.Process(status.pid)
            if process.status() == psutil.STATUS_ZOMBIE:  # in containers nobody may wait for it
                return True
            # A number that was given to another process since is not our process.
            return process.create_time() > status.started_at + 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def _is_local(self) -> bool:
        """Whether the run's lock names this machine; without one it is taken to be here."""
        try:
            text = (self.folder / LOCK_NAME).read_text(encoding="utf-8")[:300]
        except (OSError, UnicodeDecodeError):
            return True
        return not text.strip() or text.strip().endswith(f"on {socket.gethostname()}")

    def state(self) -> str:
        """The run's state, or `lost` or `unknown`."""
        if self.status is None:
            return "unknown"
        return "lost" if self.is_lost() else self.status.state

    def words(self, now: float | None = None) -> str:
        """The state in a sentence, such as `training, step 420 of 1000, 3 min left`."""
        status = self.status
        if status is None:
            return self.problem or "not read yet"
        now = time.time() if now is None else now
        silent_s = max(0.0, now - status.updated_at)
        if self.is_over:
            error_type = status.error.type if status.error else None
            reason = status.error.message if status.error else status.phase
            return ending_words(
                status.state,
                status.step,
                status.total_steps,
                error_type=error_type,
                reason=reason,
            )
        if self.is_lost():
            return lost_words(self.step, status.total_steps, silent_s)
        waited_s = self._waited_s(status, now)
        progress = f": {status.phase_progress}" if status.phase_progress else ""
        words = working_words(
            status.phase + progress,
            self.step,
            status.total_steps,
            status.eta_s,
            waited_s=waited_s,
            step_time_s=self._step_time_s(status),
        )
        if status.phase != TRAINING and waited_s > LONG_PHASE_S:
            words += f" (no update for {waited_s / 60:.0f} min)"
        return words

    def is_silent(self, now: float | None = None) -> bool:
        """Whether the run trains and says nothing for longer than its pace explains."""
        found = self.silence(now)
        return found is not None and found.phase == TRAINING

    def silence(self, now: float | None = None) -> Silence | None:
        """Since when the run says nothing for too long; None where it does not.

        While it trains its pace tells what is too long, in every other phase LONG_PHASE_S.
        """
        status = self.status
        if status is None or self.is_over or self.is_lost():
            return None
        now = time.time() if now is None else now
        waited_s, step_time_s = self._waited_s(status, now), self._step_time_s(status)
        is_long = status.phase != TRAINING and waited_s > LONG_PHASE_S
        if not (is_long or is_silent(status.phase, waited_s, step_time_s)):
            return None
        return Silence(now - waited_s, status.phase, step_time_s)

    def began_at(self) -> float:
        """When the first process of the run began to report, in unix seconds; 0 if not known."""
        if self.status is None:
            return 0.0
        return self.status.started_at if self.status.began_at is None else self.status.began_at

    def duration_s(self) -> float:
        """Seconds that the processes of the run were at work, those before a resume too."""
        if self.status is None:
            return 0.0
        return self.status.earlier_s + max(0.0, self.status.updated_at - self.status.started_at)

    def _waited_s(self, status: TrainingStatus, now: float) -> float:
        """Seconds since the run said something: status.json is not written at every step."""
        newest = self.metrics.newest("created_at")
        last = status.updated_at if math.isnan(newest) else max(status.updated_at, newest)
        return max(0.0, now - last)

    def _step_time_s(self, status: TrainingStatus) -> float:
        """Seconds between two words of a run that trains; 0 where nothing tells."""
        recent = self.metrics.last("step_time_s", RECENT_STEPS)
        if len(recent):
            return float(recent.max())
        left = (status.total_steps or 0) - status.step
        if status.eta_s is None or left <= 0:
            return 0.0
        # Only status.json was read, which is written every few steps.
        return status.eta_s / left * self._status_interval()

    def _status_interval(self) -> int:
        found = self.config_value("monitoring", "status_update_interval")
        return found if isinstance(found, int) and found > 0 else 1

    def config_value(self, section: str, name: str) -> Any:
        """A value of the run's config; None where run.json does not have it."""
        config = self.manifest.get("config")
        values = config.get(section) if isinstance(config, dict) else None
        return values.get(name) if isinstance(values, dict) else None

    def last_checkpoint_step(self) -> int | None:
        """Step of the newest checkpoint in the run folder; None where there is none."""
        try:
            return max(checkpoint_steps(self.folder / CHECKPOINTS_NAME), default=None)
        except OSError:
            return None

    def going_on(self) -> str:
        """How to go on with a run that failed or broke off; "" for every other one."""
        state, newest = self.state(), self.last_checkpoint_step()
        said = self.status.error.message if self.status and self.status.error else ""
        # A run that was stopped says it itself, and so do some errors.
        if state == "lost" or (state == "failed" and newest and "--resume" not in said):
            return going_on_words(str(self.folder), newest, self.manifest.get("config"))
        return ""


def find_runs(root: Path, *, depth: int = 3, most: int = 500) -> list[Path]:
    """Run folders in `root`, or `root` itself; links are not followed.

    Raises:
        OutputError: there is no such folder, or no run in it.
    """
    require_folder(root, "give the folder of a run, or of runs.")
    found: list[Path] = []
    level = [root]
    for _ in range(depth + 1):
        below: list[Path] = []
        for folder in level:
            if _is_run(folder):
                found.append(folder)
            else:
                below += _subfolders(folder)
        level = below
    return found[:most]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STATUS_NAME, MANIFEST_NAME))


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                Path(entry.path)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
    except OSError:
        return []  # a folder that may not be looked into holds no run for us


def config_rows(reader: RunReader) -> list[tuple[str, str, str]]:
    """(dotted key, value, origin) of the run's config; origin `` where it was not written down."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value), reader.origins.get(key, ""))
        for key, value in config_values(reader).items()
    ]


def config_values(reader: RunReader) -> dict[str, Any]:
    """Dotted key -> value of the run's config, as JSON values."""
    config = reader.manifest.get("config")
    return {
        f"{section}.{name}": value
        for section, values in (config if isinstance(config, dict) else {}).items()
        for name, value in (values if isinstance(values, dict) else {}).items()
    }
