"""RunStore: all runs of a folder, read by one task however many pages are open."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainer.files import require_folder
from trainer.monitoring.status_reader import METRICS_NAME, PREVIEWS_NAME
from trainer.views.headline import Headline
from trainer.views.page.answer_data import answer_of
from trainer.views.page.own_server import OwnServer
from trainer.views.page.panel_data import RowsData, rows_of
from trainer.views.run_reader import RunReader, find_runs


@dataclass(frozen=True)
class PageOptions:
    """Permissions of the page."""

    is_control_allowed: bool = False
    """Whether pages may write control.json."""
    worker_hosts: frozenset[str] = frozenset()
    """Hosts besides this machine whose workers may be asked."""
    own_server: OwnServer | None = None
    """It answers for ended runs; None: nothing is started for them."""


@dataclass(frozen=True)
class Judged:
    """What the list of runs says of the answers of a run, all of it of one reading."""

    stamp: tuple[int, ...]
    """Of the files that it was made of."""
    at: float
    headline: Headline
    shares: list[float]
    """As of `RowsData.shares`."""


def _stamp_of(reader: RunReader) -> tuple[int, ...]:
    """What a headline is made of, in short: sizes of files, and whether the run is over."""
    sizes = [int(reader.is_over)]
    for name in (METRICS_NAME, PREVIEWS_NAME):
        try:
            sizes.append((reader.folder / name).stat().st_size)
        except OSError:
            sizes.append(-1)
    return tuple(sizes)


def _work_ahead(reader: RunReader) -> None:
    """What the first page of a run would wait for."""
    with reader.lock:
        rows = rows_of(reader)
        rows.headline()
        found = rows.since(0)
        if found is not None and found["order"]:
            answer_of(reader, found["order"][0], None)


# ---- RunStore: all runs of a folder, read by one task however many pages are open


logger = logging.getLogger(__name__)

POLL_S = 0.5

NUM_AHEAD = 8
"""Runs, the newest ones, that are read before anybody asks for them."""

SUMMARY_S = 2.0
"""Runs that nobody looks at are only asked for their status, this often."""

FIND_S = 5.0

JUDGE_S = 10.0
"""A verdict of the list is at least so old before it is made anew."""


class RunStore:
    """Knows the runs below a folder; pages say which ones they look at."""

    def __init__(self, root: Path) -> None:
        """Find the runs; a folder that is not there yet is waited for.

        Raises:
            OutputError: it is something else than a folder.
        """
        if root.exists() or root.is_symlink():
            require_folder(root, "give the folder of a run, or of runs.")
        self.root = root
        self._is_missing = not root.is_dir()
        self.readers: dict[str, RunReader] = {}
        self.watched: Counter[str] = Counter()
        """Id -> pages that look at it."""
        self.num_lists = 0
        """Pages that show the list of runs."""
        self._judged: dict[str, Judged] = {}
        self._summary_at = self._found_at = 0.0
        self._loading = asyncio.Lock()
        self.find()

    def find(self) -> None:
        """Look for new runs."""
        self._found_at = time.monotonic()
        was_missing, self._is_missing = self._is_missing, not self.root.is_dir()
        if self._is_missing:
            if not was_missing:
                logger.warning("%s: this folder went away; it may come back", self.root)
            return
        for folder in find_runs(self.root):
            key = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:12]
            if key not in self.readers:
                self.readers[key] = RunReader(folder)
                self.readers[key].poll_summary()

    async def load(self, key: str) -> RunReader | None:
        """The run of an id with all that is in its files; None when there is none."""
        reader = self.readers.get(key)
        if reader is not None:
            async with self._loading:
                await asyncio.to_thread(reader.poll)
        return reader

    async def refresh_forever(self) -> None:
        """Read what is new, until cancelled; first the newest runs, as they will be looked at."""
        for key, _ in self.by_age()[:NUM_AHEAD]:
            reader = await self.load(key)
            if reader is not None:
                await asyncio.to_thread(_work_ahead, reader)
        while True:
            try:
                async with self._loading:
                    await asyncio.to_thread(self._refresh)
            except Exception:
                logger.exception("reading the runs failed; it is tried again")
            await asyncio.sleep(POLL_S)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._found_at >= FIND_S:
            self.find()
        is_summary_due = now - self._summary_at >= SUMMARY_S
        for key, reader in list(self.readers.items()):
            if self.watched[key] > 0:
                reader.poll()
            elif is_summary_due:
                reader.poll_summary()
        if is_summary_due:
            self._summary_at = now
        if self.num_lists > 0:
            self._judge_next(now)

    def judged(self, key: str) -> Judged | None:
        """The verdict on a run of the list; None until its files have been read for it."""
        return self._judged.get(key)

    def _judge_next(self, now: float) -> None:
        """Read one run for its row in the list, the newest first, where its files have grown."""
        for key, reader in self.by_age():
            judged, stamp = self._judged.get(key), _stamp_of(reader)
            if judged is not None and (judged.stamp == stamp or now - judged.at < JUDGE_S):
                continue
            if not self.watched[key]:
                # A list may be of hundreds of runs: what is read for a sentence is not kept.
                reader = RunReader(reader.folder)
                reader.poll()
            with reader.lock:
                rows = rows_of(reader) if self.watched[key] else RowsData(reader)
                self._judged[key] = Judged(stamp, now, rows.headline(), rows.shares())
            return

    def by_age(self) -> list[tuple[str, RunReader]]:
        """(id, run) pairs, the one that began last first."""

        def key(pair: tuple[str, RunReader]) -> float:
            status = pair[1].status
            return -status.started_at if status is not None else 0.0

        return sorted(self.readers.items(), key=key)

    @property
    def is_one_run(self) -> bool:
        """Whether the folder is that of one run, so that there is no list."""
        return len(self.readers) == 1 and self.root in [r.folder for r in self.readers.values()]

    def key_of(self, name: str) -> str:
        """The id of the run that has this label; the name itself where none has."""
        found = (key for key, reader in self.readers.items() if self.label(reader) == name)
        return next(found, name)

    def label(self, reader: RunReader) -> str:
        """The run's place below the folder, or its name where it is the folder."""
        try:
            inside = str(reader.folder.relative_to(self.root))
        except ValueError:
            inside = "."
        return reader.name if inside == "." else inside
