"""The API process's side of the engine: start it, ask it, start it again when it dies."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from trainer.errors import ModelError

START_TIMEOUT_S = 600.0

NOTHING = 0
"""In the cancel flag: no message is to be given up (they are numbered from 1)."""


class EngineDiedError(Exception):
    """The engine process ended while it was asked something."""


class EngineProcess:
    """One engine process; `ask` is for one thread at a time."""

    def __init__(
        self,
        model_path: str | None,
        device: str,
        *,
        wait_for_weights: bool = False,
        base: str | None = None,
        date: str | None = None,
    ) -> None:
        """Take what the engine will load; nothing is started.

        Args:
            model_path: None: to be set before `start`.
            base: where the base is, of a `model_path` that is an adapter.
            date: of the run that made the weights (YYYY-MM-DD); its template prints this one.
        """
        self.model_path, self.device, self.base, self.date = model_path, device, base, date
        self.wait_for_weights = wait_for_weights
        self.hello: dict[str, Any] = {}
        self.starts = 0
        self._ids = itertools.count(1)
        self._process: Any = None
        self._jobs: Connection | None = None
        self._cancelled: Any = None
        self._beats: Any = None

    def start(self) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            ModelError: the model does not load.
        """
        assert self.model_path is not None, "set it first"
        self.stop()
        from trainer.server.inference import engine_main  # torch: only where an engine is started

        context = multiprocessing.get_context("spawn")
        self._jobs, theirs = context.Pipe()
        # Two numbers in shared memory: whoever writes one never waits, whatever the engine does.
        self._cancelled = context.RawValue("q", NOTHING)
        self._beats = context.RawValue("q", 0)
        self._process = context.Process(
            target=engine_main,
            args=(
                theirs,
                self._cancelled,
                self._beats,
                self.model_path,
                self.device,
                self.wait_for_weights,
                self.base,
                self.date,
            ),
            name="trainer-engine",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.starts += 1
        self.hello = self._wait_for_hello()

    def _wait_for_hello(self) -> dict[str, Any]:
        assert self._jobs is not None, "start() makes the pipe"
        try:
            if not self._jobs.poll(START_TIMEOUT_S):
                raise ModelError(f"{self.model_path} did not load within {START_TIMEOUT_S:g} s.")
            reply = json.loads(self._jobs.recv_bytes())
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
            body: JSON.
            on_text: told the number of a sample and pieces of it while it is made, in this thread.
        Returns:
            The reply, and how many bytes it had.
        Raises:
            EngineDiedError: the process ended instead of answering.
        """
        if self._jobs is None:
            raise EngineDiedError("no engine runs")
        jobs = self._jobs
        head = {"id": message_id, "op": operation, "stream": on_text is not None}
        try:
            jobs.send_bytes(json.dumps(head).encode())
            jobs.send_bytes(body)
            while True:
                data = jobs.recv_bytes()
                reply: dict[str, Any] = json.loads(data)
                if "text" not in reply:
                    return reply, len(data)
                if on_text is not None:
                    on_text(reply["sample"], reply["text"])
        except (EOFError, OSError) as error:
            raise EngineDiedError(str(error)) from error

    def cancel(self, message_id: int) -> None:
        """Ask the engine to give up the message that it answers; never waits, may be repeated.

        One message is answered at a time, so one number says all: an older one means nothing.
        """
        if self._cancelled is not None:
            self._cancelled.value = message_id

    @property
    def beats(self) -> int:
        """A number that grows while the process runs, whatever it computes."""
        return 0 if self._beats is None else int(self._beats.value)

    @property
    def pid(self) -> int | None:
        """The process's id, None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def was_killed(self) -> bool:
        """Whether somebody else ended the process (slow: waits for it to be gone)."""
        if self._process is None:
            return False
        self._process.join(2)
        return bool(self._process.exitcode == -signal.SIGKILL)

    def kill(self) -> None:
        """End a process that no longer reacts; whoever waits for its answer is told."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the process; may be called twice."""
        if self._jobs is not None:
            self._jobs.close()
        if self._process is not None:
            self._process.terminate()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(5)
        self._process = self._jobs = None
