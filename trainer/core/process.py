"""What a run takes of its process and gives back: signals, environment variables, threads."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data._utils import signal_handling
from transformers.utils import logging as transformers_logging

from trainer.errors import (
    EXIT_COMPLETED,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    StoppedError,
)
from trainer.models.devices import DETERMINISTIC_VARIABLES, KERNEL_CACHES
from trainer.net import hub_setting

# ---- Ctrl-C, SIGTERM, SIGHUP: the first asks for a stop at the end of the step, a second aborts
#
# The control file asks for a stop too, but of another kind: the run then ends as if it were done.


EXIT_CODES = {
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGTERM: EXIT_SIGTERM,
    signal.SIGHUP: EXIT_SIGHUP,  # the terminal or the connection is gone
}


class StopRequest:
    """Whether somebody asked this process to stop, and whether a signal may abort what is done.

    A signal raises at most once, and only between `work` and the end of its block: closing a run
    is never cut short, however often somebody presses Ctrl-C.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.asked_by: str | None = None
        """Who asked without a signal, in words."""
        self.is_fault = False
        """Another process of the run has failed: nothing is waited for."""
        self.can_wait = False
        """True while training: the stop then waits for the end of the step."""
        self._may_abort = False

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

    def agree(self, number: int) -> None:
        """Stop as all processes of the run do, by a signal; 0: because the control file asks."""
        if number:
            self.signal = self.signal or signal.Signals(number)
        else:
            self.ask("the control file")

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP; 0 without a signal."""
        return EXIT_CODES[self.signal] if self.signal is not None else EXIT_COMPLETED

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """The part of a run that a signal may abort.

        Raises:
            StoppedError: out of whatever is done in the block; also at its start, for a signal
                that came before.
        """
        self._may_abort = True
        try:
            if self.is_signalled:
                self._abort()
            yield
        finally:
            self._may_abort = False

    def settle(self) -> None:
        """The work is done and its result stands: signals that come now are too late to abort."""
        self._may_abort = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first signal, abort at the second or outside a step."""
        if self.is_fault:
            if self._may_abort:
                self._abort()
            return
        is_second = self.is_signalled
        self.signal = self.signal or signal.Signals(number)
        if self._may_abort and (is_second or not self.can_wait):
            self._abort()

    def _abort(self) -> None:
        self._may_abort = False
        raise StoppedError(f"by {self.by}", exit_code=self.exit_code)


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
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: not Python's to give back
    }
    child_handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        _set_child_handler(child_handler)
        _give_back(before)


def _give_back(handlers: dict[signal.Signals, Any]) -> None:
    """Set each; one that is back may raise at once, and the run is over without its help."""
    left = dict(handlers)
    while left:
        with contextlib.suppress(BaseException):
            for number in list(left):
                signal.signal(number, left[number])
                del left[number]


def ignore_dead_workers() -> None:
    """Take away torch's handler of SIGCHLD, for a run that is over.

    Where a DataLoader worker was killed it raises again for every child that ends, out of whatever
    is being done: writing how the run ended, for instance.
    """
    if threading.current_thread() is threading.main_thread():
        _set_child_handler(signal.SIG_DFL)


def _set_child_handler(handler: Any) -> None:
    """Set the handler of SIGCHLD, and let the next DataLoader with workers set torch's again."""
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
        # Private, but torch sets its handler once in the life of a process.
        signal_handling._SIGCHLD_handler_set = False


# ---- settings


VARIABLES = (
    *("ACCELERATE_", "FSDP_", "PYTORCH_ENABLE_MPS_FALLBACK", "WANDB_CONSOLE"),
    *DETERMINISTIC_VARIABLES,
    *KERNEL_CACHES,
)
"""How the variables are called that this program, transformers and accelerate set for a run."""


def process_settings() -> Callable[[], None]:
    """A function that puts back what a run sets in its process, as it is now.

    Environment variables, threads, deterministic algorithms, transformers' progress bars and log
    level, the hub's switch.
    Random states stay where the seeds of a run have brought them.
    """
    put_hub_back = hub_setting()
    environment, num_threads = _variables(), torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_tries = torch.backends.cudnn.benchmark
    had_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()

    def put_back() -> None:
        put_hub_back()
        for name in _variables().keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cudnn.benchmark = cudnn_tries
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()

    return put_back


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
