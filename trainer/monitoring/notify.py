"""Notifier: whom a run tells that it ended, failed or is silent; the side of the run.

The other side is `trainer.views.notify`, a process that outlives this one when it is killed, and
that sees it hang. It looks at the files of the run, so that telling costs training nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.child import Child
from trainer.config.receiver import is_webhook, shown_notify
from trainer.errors import ConfigError
from trainer.monitoring.events import Event, RunEnded, json_line, plain_values

logger = logging.getLogger(__name__)

OTHER_SIDE = "trainer.views.notify"

LAST_WORD_S = 25.0
"""How long the end of a run waits for whoever is told of it: all tries and their time limits."""


@dataclass(frozen=True)
class NotifySettings:
    """What the other side is started with; over a pipe, as a command line can be read by all."""

    notify: tuple[str, ...]
    is_webhook: bool
    silence_s: float
    """0: silence is not told."""
    folder: str
    """Of the run; it need not be there yet."""
    pid: int
    """Of the run."""
    since: float
    """Seconds since the epoch: a status that was written before is another run's."""
    num_processes: int
    """Above 1 somebody else may say how this process ended."""


def notify_trouble(notify: Sequence[str]) -> str | None:
    """Why a command cannot be run here; None: it can, or it is a webhook."""
    if notify and not is_webhook(notify) and shutil.which(notify[0]) is None:
        return (
            f"monitoring.notify: there is no program {notify[0]!r} to run; give its whole path, or "
            "the address of a webhook."
        )
    return None


def check_notify(notify: Sequence[str]) -> None:
    """Refuse a command that cannot be run.

    Raises:
        ConfigError: there is no such program.
    """
    trouble = notify_trouble(notify)
    if trouble is not None:
        raise ConfigError(trouble)


class Notifier:
    """An observer: starts the other side, and tells it of an end that the run itself knows."""

    def __init__(
        self,
        notify: tuple[str, ...],
        *,
        silence_s: float,
        folder: Path,
        warn: Callable[[str], None],
        num_processes: int = 1,
    ) -> None:
        """Start the process that tells.

        Args:
            notify: the words of `monitoring.notify`.
            silence_s: seconds without a sign of life until it tells of silence; 0: never.
            folder: of the run.
            warn: told once, in a thread, that somebody could not be told.
        """
        self._notify, self._warn = notify, warn
        self._is_warned = self._is_ended = False
        self._child = Child([OTHER_SIDE])
        settings = NotifySettings(
            notify,
            is_webhook(notify),
            silence_s,
            str(folder.absolute()),
            os.getpid(),
            time.time(),
            num_processes,
        )
        self._send(json.dumps(asdict(settings)))
        self._listener = threading.Thread(target=self._listen, name="notify", daemon=True)
        self._listener.start()

    def on_event(self, event: Event) -> None:
        """Pass on how the run ended."""
        if isinstance(event, RunEnded):
            self._is_ended = True
            self._send(json_line({"kind": "ended", **plain_values(event)}).strip())

    def finish(self) -> None:
        """Wait until it is told, for a limited time: with this process its container may end.

        Called once everything else of the run is closed.
        """
        self._is_ended = True
        self._child.end(LAST_WORD_S, is_asked=False)
        self._listener.join(1.0)

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone, which the listener says
            self._child.send(line.encode())

    def _listen(self) -> None:
        """In a thread: hear what could not be told."""
        try:
            while True:
                self._say(json.loads(self._child.receive())["trouble"])
        except (EOFError, OSError):
            if not self._is_ended:
                self._say("the process that tells has ended")

    def _say(self, trouble: str) -> None:
        if self._is_warned:
            return
        self._is_warned = True
        words = f"monitoring.notify ({shown_notify(self._notify)[0]}): {trouble}"
        if self._is_ended:  # the terminal and the files of the run are closed
            logger.warning("%s", words)
        else:
            self._warn(f"{words}; training goes on, and this is said once")
