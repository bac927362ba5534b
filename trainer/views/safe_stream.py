"""SafeStream: a text stream whose troubles never reach training."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import TextIO

logger = logging.getLogger(__name__)


class SafeStream(io.TextIOBase):
    """A text stream that never fails: odd characters become `?`, a closed reader means silence."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream, which stays open."""
        self.stream = stream
        self._is_broken = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of what is wrapped."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what the encoding can hold of a text."""
        if not self._is_broken:
            safe = text.encode(self.encoding, "replace").decode(self.encoding)
            self._attempt(lambda: self.stream.write(safe))
        return len(text)

    def flush(self) -> None:
        """Flush what is wrapped."""
        if not self._is_broken:
            self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        """Whether a terminal is wrapped."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The number of the file that is wrapped."""
        return self.stream.fileno()

    def line(self, text: str) -> None:
        """Write one line and flush it."""
        self.write(text + "\n")
        self.flush()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: closed by its owner
            self._is_broken = True
            logger.warning("the terminal output broke off (%s); training goes on", error)
