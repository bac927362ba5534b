"""The API process's side of the engine: start it, ask it, start it again when it dies."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import signal
import tempfile
from collections.abc import Callable
from typing import Any

from trainer.child import Child, half_the_cores, thread_variables
from trainer.errors import ModelError

START_TIMEOUT_S = 600.0

STOP_TIMEOUT_S = 5.0

NOTHING = 0
"""In the cancel flag: no message is to be given up (they are numbered from 1)."""


class EngineDiedError(Exception):
    """The engine process ended while it was asked something."""


class SharedNumbers:
    """Two numbers in memory of both processes: whoever writes one never waits for the other."""

    def __init__(self, descriptor: int) -> None:
        """Map an open file of SIZE bytes."""
        self._map = mmap.mmap(descriptor, self.SIZE)
        self.cancelled = ctypes.c_int64.from_buffer(self._map, 0)
        """The message that is to be given up, or NOTHING."""
        self.beats = ctypes.c_int64.from_buffer(self._map, 8)
        """Grows while the engine process runs, whatever it computes."""

    SIZE = 16

    @classmethod
    def new_file(cls) -> int:
        """Descriptor of an open file of zeros without a name; in memory where the system can."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("trainer-engine")
        else:  # macOS
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, cls.SIZE)
        return descriptor


class EngineProcess:
    """One engine process; `ask` is for one thread at a time."""

    def __init__(
        self,
        model_path: str | None,
        device: str,
        *,
        wait_for_weights: bool = False,
        dtype: str = "auto",
        base: str | None = None,
        date: str | None = None,
        quantize: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Take what the engine will load; nothing is started.

        Args:
            model_path: None: to be set before `start`.
            dtype: `auto`, `bf16` or `fp32`.
            base: where the base is, of a `model_path` that is an adapter.
            date: of the run that made the weights (YYYY-MM-DD); its template prints this one.
            quantize: `nf4`: quantize the model while it is loaded.
            num_threads: CPU threads; None: as OMP_NUM_THREADS says, else half of the cores, for
                a server often runs beside training.
        """
        self.quantize, self.num_threads = quantize, num_threads
        self.model_path, self.device, self.base, self.date = model_path, device, base, date
        self.wait_for_weights, self.dtype = wait_for_weights, dtype
        self.hello: dict[str, Any] = {}
        self.starts = 0
        self._ids = itertools.count(1)
        self._process: Child | None = None
        self._numbers: SharedNumbers | None = None

    def start(self) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            ModelError: the model does not load.
        """
        assert self.model_path is not None, "set it first"
        self.stop()
        descriptor = SharedNumbers.new_file()
        try:
            self._numbers = SharedNumbers(descriptor)
            self._process = Child(
                ["trainer.server.inference", str(descriptor)],
                environment={**os.environ, **self._thread_variables()},
                shared=[descriptor],
                has_own_session=False,  # a signal to the server's group is for both
            )
        finally:
            os.close(descriptor)
        setup = {
            "model_path": self.model_path,
            "device": self.device,
            "wait_for_weights": self.wait_for_weights,
            "dtype": self.dtype,
            "base": self.base,
            "date": self.date,
            "quantize": self.quantize,
        }
        self.starts += 1
        self.hello = self._wait_for_hello(self._process, setup)

    def _thread_variables(self) -> dict[str, str]:
        if self.num_threads is None and os.environ.get("OMP_NUM_THREADS"):
            return {}
        return thread_variables(self.num_threads or half_the_cores())

    def _wait_for_hello(self, process: Child, setup: dict[str, Any]) -> dict[str, Any]:
        try:
            process.send(json.dumps(setup).encode())
            reply = json.loads(process.receive(START_TIMEOUT_S))
        except TimeoutError as error:
            raise ModelError(
                f"{self.model_path} did not load within {START_TIMEOUT_S:g} s."
            ) from error
        except (EOFError, OSError) as error:
            raise ModelError(
                f"the engine process ended while loading {self.model_path}; is there enough memory?"
            ) from error
        if not reply["ok"]:
            raise ModelError(reply["error"])
        result: dict[str, Any] = reply["result"]
        return result

    def new_id(self) -> int:
        """A number for the next message."""
        return next(self._ids)

    def ask(
        self,
        message_id: int,
        operation: str,
        body: bytes,
        on_text: Callable[[int, str], None] | None = None,
    ) -> tuple[dict[str, Any], int]:
        """Send one message and wait for its reply.

        Args:
            body: JSON without line feeds.
            on_text: told the number of a sample and pieces of it while it is made, in this thread.
        Returns:
            The reply, and how many bytes it had.
        Raises:
            EngineDiedError: the process ended instead of answering.
        """
        process = self._process
        if process is None:
            raise EngineDiedError("no engine runs")
        head = {"id": message_id, "op": operation, "stream": on_text is not None}
        try:
            process.send(json.dumps(head).encode(), body)
            while True:
                data = process.receive()
                reply: dict[str, Any] = json.loads(data)
                if "text" not in reply:
                    if operation == "load_weights" and reply["ok"]:
                        self.hello["dtype"] = reply["result"]["dtype"]
                    return reply, len(data)
                if on_text is not None:
                    on_text(reply["sample"], reply["text"])
        except (EOFError, OSError) as error:
            raise EngineDiedError(str(error)) from error

    def cancel(self, message_id: int) -> None:
        """Ask the engine to give up the message that it answers; never waits, may be repeated.

        One message is answered at a time, so one number says all: an older one means nothing.
        """
        if self._numbers is not None:
            self._numbers.cancelled.value = message_id

    @property
    def beats(self) -> int:
        """A number that grows while the process runs, whatever it computes."""
        return 0 if self._numbers is None else int(self._numbers.beats.value)

    @property
    def pid(self) -> int | None:
        """The process's id, None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    def was_killed(self) -> bool:
        """Whether somebody else ended the process (slow: waits for it to be gone)."""
        if self._process is None:
            return False
        return self._process.wait(2) == -signal.SIGKILL

    def kill(self) -> None:
        """End a process that no longer reacts; whoever waits for its answer is told."""
        if self._process is not None:
            self._process.process.kill()

    def stop(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is not None:
            process.end(STOP_TIMEOUT_S)
            process.lines.close()
