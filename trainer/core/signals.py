"""Ctrl-C, SIGTERM, SIGHUP: the first asks for a stop at the end of the step, a second aborts.

The control file asks for a stop too, but of another kind: the run then ends as if it were done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from trainer.errors import EXIT_COMPLETED, EXIT_SIGHUP, EXIT_SIGINT, EXIT_SIGTERM, StoppedError

EXIT_CODES = {
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGTERM: EXIT_SIGTERM,
    signal.SIGHUP: EXIT_SIGHUP,  # the terminal or the connection is gone
}


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        """Nobody asked yet, and no step is being made."""
        self.signal: signal.Signals | None = None
        self.asked_by: str | None = None
        """Who asked without a signal, in words."""
        self.can_wait = False
        """True while training: the stop then waits for the end of the step."""

    @property
    def is_set(self) -> bool:
        """Whether a signal came, or somebody asked in another way."""
        return self.signal is not None or self.asked_by is not None

    @property
    def by(self) -> str:
        """Who asked, such as `SIGINT`."""
        return self.signal.name if self.signal is not None else str(self.asked_by)

    @property
    def is_signalled(self) -> bool:
        """Whether a signal came: there may be little time, so nothing but a checkpoint is made."""
        return self.signal is not None

    def ask(self, who: str) -> None:
        """Ask for a stop at the end of the step, with everything that the end of a run makes."""
        self.asked_by = self.asked_by or who

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP; 0 without a signal."""
        return EXIT_CODES[self.signal] if self.signal is not None else EXIT_COMPLETED

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first signal, abort at the second or outside a step."""
        is_second = self.is_signalled
        self.signal = self.signal or signal.Signals(number)
        if is_second or not self.can_wait:
            raise StoppedError(f"by {self.signal.name}", exit_code=self.exit_code)


@contextlib.contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Send the signals to `request` within the block; only the main thread can.

    A signal that is ignored stays so: `nohup` asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, request.handle)
        for number in EXIT_CODES
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_dead_workers() -> None:
    """Take away torch's handler of SIGCHLD, for a run that has failed already.

    Where a DataLoader worker was killed it raises again for every child that ends, out of whatever
    is being done: writing how the run ended, for instance.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
