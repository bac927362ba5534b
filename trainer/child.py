"""A child process that speaks lines with its parent: started, and ended for certain.

No multiprocessing: its spawning imports the user's main script again, and a script that calls
`TrainerEngine` without a `__main__` guard would train twice. A child reads lines from its stdin,
writes lines to its stdout, and ends when its stdin closes, which the kernel does for a killed
parent too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import trainer

logger = logging.getLogger(__name__)

KILL_TIMEOUT_S = 5.0
"""Longest wait for a process that was killed: one that is stuck in a driver does not go."""


class Child:
    """A Python process that runs a module; one thread reads from it, one writes to it."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        log: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        shared: Sequence[int] = (),
        has_own_session: bool = True,
    ) -> None:
        """Start it.

        Args:
            words: module and its arguments. It finds modules where this process finds them.
            log: file that its stderr is added to; None: it shares that of this process.
            environment: None: that of this process.
            shared: file descriptors that it has under the same numbers.
            has_own_session: signals to this process's group, such as Ctrl-C in a terminal, do not
                reach it.
        """
        root = str(Path(trainer.__file__).parents[1])
        places = dict.fromkeys([root, *(place or os.getcwd() for place in sys.path)])
        with contextlib.ExitStack() as stack:
            stderr = None if log is None else stack.enter_context(open(log, "ab"))
            self.process = subprocess.Popen(
                # -P: no other place is put before those, such as the working folder.
                [sys.executable, "-P", "-m", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={
                    **(os.environ if environment is None else environment),
                    "PYTHONPATH": os.pathsep.join(places),
                },
                pass_fds=shared,
                start_new_session=has_own_session,
            )
        assert self.process.stdin is not None, "started with a pipe"
        assert self.process.stdout is not None, "started with a pipe"
        self._stdin, self.lines = self.process.stdin, self.process.stdout

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self.process.poll()

    def send(self, *lines: bytes) -> None:
        """Write lines, given without line feeds.

        Raises:
            BrokenPipeError: it is gone, or `end` was called.
        """
        try:
            for line in lines:
                self._stdin.write(line + b"\n")
            self._stdin.flush()
        except ValueError as error:  # the file object is closed
            raise BrokenPipeError(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next line, without its line feed.

        Args:
            timeout_s: longest wait for its first byte; for the first line only, because what was
                read ahead is not seen. None: no limit.
        Raises:
            EOFError: it is gone; a line that it did not finish is lost.
            TimeoutError: nothing came.
        """
        try:
            if timeout_s is not None and not select.select([self.lines], [], [], timeout_s)[0]:
                raise TimeoutError(f"nothing within {timeout_s:g} s")
            line = self.lines.readline()
        except ValueError as error:  # the file object is closed
            raise EOFError(str(error)) from error
        if not line.endswith(b"\n"):
            raise EOFError("the process ended")
        return line[:-1]

    def wait(self, timeout_s: float) -> int | None:
        """How it ended; None: it has not within this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s)
        return None

    def end(self, timeout_s: float, *, is_asked: bool = True) -> None:
        """Close its stdin, wait, then kill it; may be called twice, and from any thread.

        Args:
            timeout_s: how long it may take to end by itself.
            is_asked: it gets SIGTERM too, and need not read its stdin to the end.
        """
        if is_asked:  # first: a thread that writes to it holds the lock that closing needs
            self.process.terminate()
        with contextlib.suppress(OSError):  # it is gone, and what was not sent with it
            self._stdin.close()
        if self.wait(timeout_s) is None:
            self.process.kill()
            if self.wait(KILL_TIMEOUT_S) is None:
                logger.warning("process %d was killed and is still there", self.pid)


def usable_cores() -> int:
    """CPU cores that this process may use, at least 1; its affinity counts where it is known."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def half_the_cores() -> int:
    """Threads of a process that computes beside another one, at least 1."""
    return max(1, usable_cores() // 2)


def thread_variables(num_threads: int) -> dict[str, str]:
    """Environment of a child that computes beside others: its CPU threads, and how they wait."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits leaves its core to the others
    }


FALSE_HERE = {
    # Rows are cut or dropped after they were made into tokens.
    "transformers.tokenization_utils_base": "will result in indexing errors",
    # They are unpacked.
    "transformers.quantizers.quantizer_gguf": "the weights stay quantized regardless",
}
"""Logger -> words of a message that is not true of what this program does."""


def _is_true(record: logging.LogRecord) -> bool:
    return FALSE_HERE.get(record.name, "\n") not in record.getMessage()


def quiet_libraries() -> Callable[[], None]:
    """Keep packages from telling of kernels for other machines, and what is false here.

    Returns:
        A function that lets them speak again.
    """
    loggers = [logging.getLogger(n) for n in ("bitsandbytes", "torchao", "torch.utils._pytree")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    for name in FALSE_HERE:
        logging.getLogger(name).addFilter(_is_true)

    def put_back() -> None:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        for name in FALSE_HERE:
            logging.getLogger(name).removeFilter(_is_true)

    return put_back


def end_quickly() -> None:
    """When this process ends, look for no garbage: among torch's objects that takes seconds."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def first_line(descriptor: int) -> bytes:
    """In a child: one line and not a byte more, as the rest is read as it comes."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            sys.exit("the parent has ended")
        line += byte
    return line


def own_lines() -> tuple[IO[bytes], IO[bytes]]:
    """In a child: where its lines come from and go to.

    What libraries print, or read, no longer meets the lines: their stdout is stderr from here on.
    """
    quiet_libraries()
    end_quickly()
    lines_in, lines_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return lines_in, lines_out


# ---- this process as one that a launcher of several has started


TOLD_S = 10.0
"""How long a process waits for the first one of its machine to tell a mistake and end the run."""


def is_first_of_machine() -> bool:
    """Whether a launcher of several processes has started none before this one on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_told_by_first() -> bool:
    """Whether the first process of this machine has ended the run, as it finds the same mistakes.

    Its launcher then ends this one too, by SIGTERM.
    """
    if is_first_of_machine() or threading.current_thread() is not threading.main_thread():
        return False
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        return came.wait(TOLD_S)
    finally:
        signal.signal(signal.SIGTERM, before)
