"""How far a file of rows is read and encoded, in words: rows, rows a second, time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.data.data_files import DataFile

EVERY_ROWS = 64
"""Rows between two looks at the clock."""

FIRST_S, EVERY_S = 2.0, 1.0
"""A file that is read sooner is not spoken of; then words at most so often."""

MIN_SHARE = 0.01
"""Of a file; before, nothing is said of the time that is left."""


class ReadProgress:
    """Told of every row, tells in words how far it is. Rows are encoded as they are read."""

    def __init__(
        self,
        tell: Callable[[str], None],
        known: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take who is told.

        Args:
            tell: gets the words.
            known: a name of which the words are known to speak: it is not repeated.
            clock: seconds that only go forward.
        """
        self._tell, self._known, self._clock = tell, known, clock
        self._file: DataFile | str = ""
        self._place = ""
        self._rows = 0
        self._size: int | None = None
        self._began = self._told_at = clock()

    def begin(self, file: DataFile | str, place: str) -> None:
        """The next file.

        Args:
            file: or the name of a hub dataset.
            place: such as `3 of 12`; of one file nothing is said.
        """
        self._file, self._place, self._rows = file, place, 0
        self._began = self._told_at = self._clock()
        self._size = None
        if isinstance(file, DataFile):
            try:
                self._size = file.size()
            except OSError:  # its reader has the words
                self._size = None

    def add_row(self) -> None:
        """One more row of it."""
        self._rows += 1
        if self._rows % EVERY_ROWS:
            return
        now = self._clock()
        if now - self._began >= FIRST_S and now - self._told_at >= EVERY_S:
            self._told_at = now
            self._tell(self.words(now - self._began))

    def words(self, elapsed_s: float) -> str:
        """How far it is.

        Args:
            elapsed_s: since the file was begun.
        """
        name = "" if str(self._file) == self._known else f"{self._file}: "
        if self._place and self._place != "1 of 1":
            name = f"{self._file} (file {self._place}): "
        words = f"{name}{self._rows:,} rows, {self._rows / elapsed_s:,.0f} rows/s"
        share = None
        if isinstance(self._file, DataFile):
            share = self._file.position.share(self._size)
        if share is not None and MIN_SHARE <= share < 1:
            words += f", {_duration(elapsed_s * (1 - share) / share)} left"
        return words


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
