"""The API process's side of the engine: start it, ask it, start it again when it dies."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from trainer.errors import ModelError

START_TIMEOUT_S = 600.0


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
    ) -> None:
        """Take what the engine will load; nothing is started.

        Args:
            model_path: None: to be set before `start`.
            base: where the base is, of a `model_path` that is an adapter.
        """
        self.model_path, self.device, self.base = model_path, device, base
        self.wait_for_weights = wait_for_weights
        self.hello: dict[str, Any] = {}
        self.starts = 0
        self._ids = itertools.count(1)
        self._process: Any = None
        self._jobs: Connection | None = None
        self._control: Connection | None = None

    def start(self) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            ModelError: the model does not load.
        """
        assert self.model_path is not None, "set it first"
        self.stop()
        from trainer.server.engine import engine_main  # torch: only where an engine is started

        context = multiprocessing.get_context("spawn")
        self._jobs, theirs = context.Pipe()
        self._control, their_control = context.Pipe()
        self._process = context.Process(
            target=engine_main,
            args=(
                theirs,
                their_control,
                self.model_path,
                self.device,
                self.wait_for_weights,
                self.base,
            ),
            name="trainer-engine",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        their_control.close()
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
        body: Any,
        on_text: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Send one message and wait for its reply.

        Args:
            on_text: told pieces of the answer while it is made, in this thread.
        Raises:
            EngineDiedError: the process ended instead of answering.
        """
        assert self._jobs is not None, "start() comes first"
        jobs = self._jobs
        is_streamed = on_text is not None
        message = {"id": message_id, "op": operation, "body": body, "stream": is_streamed}
        try:
            jobs.send_bytes(json.dumps(message).encode())
            while True:
                reply: dict[str, Any] = json.loads(jobs.recv_bytes())
                if "text" not in reply:
                    return reply
                if on_text is not None:
                    on_text(reply["text"])
        except (EOFError, OSError) as error:
            raise EngineDiedError(str(error)) from error

    def cancel(self, message_id: int) -> None:
        """Ask the engine to give up the message before its next token."""
        if self._control is not None:
            try:
                self._control.send_bytes(json.dumps({"cancel": message_id}).encode())
            except OSError:
                return  # it died: whoever asks next notices and starts a new one

    @property
    def pid(self) -> int | None:
        """The process's id, None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def stop(self) -> None:
        """End the process; may be called twice."""
        for connection in (self._jobs, self._control):
            if connection is not None:
                connection.close()
        if self._process is not None:
            self._process.terminate()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(5)
        self._process = self._jobs = self._control = None
