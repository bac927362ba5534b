"""The server that `trainer monitor --ask` starts, so that the weights of an ended run can be asked.

One process at a time, `trainer serve RUN` on 127.0.0.1: started with the first question, ended
after a while without one, before another run's is started, and with the monitor, however that ends.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from trainer.child import Child
from trainer.errors import PreviewError
from trainer.views.page.worker_link import FINAL_MODEL, WorkerAddress
from trainer.views.run_reader import OVER, RunReader

IDLE_S = 600.0

LOAD_S = 300.0
"""Longest time for the libraries and the weights."""

END_S = 10.0

READY = "ready: "

ASKING_WORDS = (
    "A question starts a server with the weights of final_model on this machine; it ends after "
    f"{IDLE_S / 60:.0f} minutes without one, and with the monitor."
)


def can_serve(reader: RunReader) -> bool:
    """Whether a run is over and has left a final model."""
    return reader.state() in (*OVER, "lost") and (reader.folder / FINAL_MODEL).is_dir()


class OwnServer:
    """Starts and ends the one process; the methods may be called from any thread."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        """Nothing is started yet.

        Args:
            idle_s: how long after the last question it is ended.
        """
        self.idle_s = idle_s
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._folder: Path | None = None
        self._url = ""
        self._asked_at = 0.0
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None where none runs."""
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    def worker(self, reader: RunReader) -> WorkerAddress:
        """Where the final model of a run is asked; blocks until it is loaded.

        Raises:
            PreviewError: it cannot be started, with what it said last.
        """
        with self._lock:
            if self._is_closed:
                raise PreviewError("the monitor is ending")
            self._asked_at = time.monotonic()
            if self.pid is None or self._folder != reader.folder:
                self._end()
                self._start(reader.folder)
            self._asked_at = time.monotonic()
            prompt = reader.config_value("profile", "system_prompt")
            return WorkerAddress(
                url=self._url,
                backend="final_model",
                system_prompt=prompt if isinstance(prompt, str) else None,
                pid=self.pid,
            )

    def close(self) -> None:
        """End it; none is started after this."""
        with self._lock:
            self._is_closed = True
            self._end()

    def _start(self, folder: Path) -> None:
        words = ["trainer", "serve", str(folder), "--port", "0", "--end-with-stdin"]
        with tempfile.NamedTemporaryFile(prefix="trainer-ask-", suffix=".log") as log:
            self._child, self._folder = Child(words, log=log.name), folder
            try:
                line = self._child.receive(LOAD_S).decode(errors="replace")
            except (EOFError, TimeoutError) as error:
                self._end()
                said = Path(log.name).read_text(errors="replace").strip().splitlines()
                why = said[-1] if said else str(error)
                raise PreviewError(f"the server of final_model did not start: {why}") from error
        if not line.startswith(READY):
            self._end()
            raise PreviewError(f"the server of final_model did not start: {line}")
        self._url = line.removeprefix(READY).split()[0]
        threading.Thread(target=self._end_when_idle, args=[self._child], daemon=True).start()

    def _end_when_idle(self, child: Child) -> None:
        while child.returncode is None:
            left = self._asked_at + self.idle_s - time.monotonic()
            if left > 0:
                child.wait(left)
                continue
            with self._lock:
                is_idle = time.monotonic() - self._asked_at >= self.idle_s
                if self._child is child and is_idle:
                    self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end(END_S)
