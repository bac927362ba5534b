"""The processes of published previews: the publisher, and the server where it is a sidecar."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.child import Child, thread_variables

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3

NICENESS = 5

STOP_TIMEOUT_S = 10.0

Announce = Callable[[str | None, int | None], None]
"""Told the address and, for a sidecar, the process's number whenever a server is ready; told None
when it is gone."""


class Worker(Protocol):
    """Where the server is, and who looks after it when it is ours."""

    url: str | None
    """None: not listening yet."""

    def start(self, on_ready: Callable[[], None]) -> None:
        """Begin; `on_ready` is called from any thread once `url` is known, and after restarts."""
        ...

    def look_after(self) -> None:
        """Called when the server does not answer; never blocks."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether it has ended and is not started again."""
        ...

    def close(self) -> None:
        """End what is ours; may be called twice."""
        ...


@dataclass
class RemoteWorker:
    """A `trainer serve` that somebody else started and looks after."""

    url: str | None
    announce: Announce

    def start(self, on_ready: Callable[[], None]) -> None:
        """It is there, or comes back by itself."""
        self.announce(self.url, None)
        on_ready()

    def look_after(self) -> None:
        """Not ours."""

    @property
    def is_lost(self) -> bool:
        """Never: somebody may start it again."""
        return False

    def close(self) -> None:
        """Not ours."""


@dataclass
class SidecarWorker:
    """A `trainer serve` on loopback that lives as long as this run, and no longer.

    It ends when the pipe to it closes, which happens also when the trainer is killed.
    """

    model_dir: Path
    """Config and tokenizer; the weights come by `weights_dir`."""
    weights_dir: Path
    key_file: Path
    device: str
    num_threads: int
    announce: Announce
    log: Path | None = None
    url: str | None = None
    restarts: int = 0
    _process: Child | None = None
    _is_closing: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self, on_ready: Callable[[], None]) -> None:
        """Start it; loading takes seconds, and nobody waits for them."""
        self._on_ready = on_ready
        with self._lock:
            self._spawn()

    def look_after(self) -> None:
        """Start it again if it ended, a few times."""
        with self._lock:
            process = self._process
            if self._is_closing or process is None or process.returncode is None:
                return
            if self.restarts >= MAX_RESTARTS:
                return
            self.restarts += 1
            logger.warning("the sidecar ended (%s); starting it again", process.returncode)
            process.end(0)  # it is gone: only our end of its pipe is still open
            self._spawn()

    @property
    def is_lost(self) -> bool:
        """Whether it has ended and is not started again."""
        with self._lock:
            process = self._process
            is_gone = process is not None and process.returncode is not None
            return is_gone and self.restarts >= MAX_RESTARTS

    def close(self) -> None:
        """End it; may be called twice."""
        with self._lock:
            self._is_closing = True
            process, self._process, self.url = self._process, None, None
        if process is None:
            return
        self.announce(None, None)
        process.end(STOP_TIMEOUT_S)

    def _spawn(self) -> None:
        process = Child(
            self._words(),
            log=self.log or os.devnull,
            environment={
                **{n: v for n, v in os.environ.items() if not n.startswith("TRAINER_")},
                **thread_variables(self.num_threads),
            },
        )
        with contextlib.suppress(OSError):  # training comes first where cores are scarce
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        self._process = process
        threading.Thread(target=self._watch, args=(process,), name="sidecar", daemon=True).start()

    def _words(self) -> list[str]:
        port = self.url.rsplit(":", 1)[1] if self.url else "0"
        return [
            *("trainer", "serve", "--model", str(self.model_dir)),
            *("--wait-for-weights", "--end-with-stdin", "--keep-weights", "1", "--port", port),
            *("--device", self.device, "--weights-dir", str(self.weights_dir)),
            *("--api-key-file", str(self.key_file)),
        ]

    def _watch(self, process: Child) -> None:
        """Wait for the line that says it is ready; what comes after it is of no use here."""
        with process.lines as lines:
            for line in lines:
                words = line.decode("utf-8", "replace").split()
                if words[:1] == ["ready:"] and len(words) > 1:
                    with self._lock:
                        if self._is_closing:
                            break
                        self.url = words[1]
                    self.announce(words[1], process.pid)
                    self._on_ready()
        code = process.process.wait()
        if not self._is_closing:
            where = f"; see {self.log}" if self.log is not None else ""
            logger.warning("the sidecar ended (%s)%s; training goes on", code, where)
            if self.url is None:  # it never came up: no publisher asks for it, so nobody else will
                self.look_after()


# ---- the publisher as the trainer holds it: a process, a pipe, and a thread that reads it


GRACE_S = 1.0


class PublisherProcess:
    """One process of `trainer.publish.publisher`; it ends when its pipe closes."""

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
        self._process = Child(
            ["trainer.publish.publisher"],
            log=log or os.devnull,
            environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
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
        with contextlib.suppress(OSError):
            self._process.send(json.dumps(values).encode())

    def close(self) -> None:
        """Let it end by itself, then end it; may be called twice."""
        self._process.end(GRACE_S, is_asked=False)

    def join(self, timeout_s: float) -> None:
        """Wait for the reading thread."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        with self._process.lines as lines:
            for line in lines:
                try:
                    self._on_event(json.loads(line))
                except Exception:
                    logger.exception("an event of the publisher is of no use; training goes on")
        self._process.process.wait()
        self._on_end(self)
