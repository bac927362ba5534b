"""The publisher as the trainer holds it: a process, a pipe, and a thread that reads it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer

logger = logging.getLogger(__name__)

GRACE_S = 1.0
KILL_TIMEOUT_S = 5.0


class PublisherProcess:
    """One process of `trainer.preview.publisher`; it ends when its pipe closes."""

    def __init__(
        self,
        setup: dict[str, Any],
        *,
        log: Path | None,
        on_event: Callable[[dict[str, Any]], None],
        on_end: Callable[[PublisherProcess], None],
    ) -> None:
        """Start it, and the thread that reads its events.

        Args:
            setup: its first line.
            log: where its stderr goes; None: nowhere.
            on_event: called in the reading thread with each event; what it raises is logged.
            on_end: called in the reading thread once the process is gone.
        """
        self._on_event, self._on_end = on_event, on_end
        # Not by multiprocessing, which would run the user's script again.
        root = str(Path(trainer.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        with open(log or os.devnull, "ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.preview.publisher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C in the terminal is the trainer's to handle
            )
        self.send(setup)
        self._reader = threading.Thread(target=self._read, name="preview-read", daemon=True)
        self._reader.start()

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.returncode

    def send(self, values: dict[str, Any]) -> None:
        """Write one line; a process that is gone is noticed by the thread that reads from it."""
        assert self._process.stdin is not None, "spawned with a pipe"
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed by `close`
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Let it end by itself, then end it; may be called twice."""
        assert self._process.stdin is not None, "spawned with a pipe"
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(KILL_TIMEOUT_S)

    def join(self, timeout_s: float) -> None:
        """Wait for the reading thread."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        assert self._process.stdout is not None, "spawned with a pipe"
        with self._process.stdout as lines:
            for line in lines:
                try:
                    self._on_event(json.loads(line))
                except Exception:
                    logger.exception("an event of the publisher is of no use; training goes on")
        self._process.wait()
        self._on_end(self)
