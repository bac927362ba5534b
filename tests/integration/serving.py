"""Start `trainer serve` as a user does, on a free port."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO


@dataclass
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[str]
    line: str
    errors: IO[str]

    def log(self) -> str:
        """What it has written to stderr so far."""
        self.errors.seek(0)
        return self.errors.read()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


def command(*words: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "trainer", "serve", "--device", "cpu", *words]


@contextlib.contextmanager
def running_server(*words: str, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """A server on a free port, ended with the block; `prefix` runs its command line."""
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = stack.enter_context(
            subprocess.Popen(
                [*prefix, *command("--port", "0", *words)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        line = process.stdout.readline()
        errors.seek(0)
        assert line.startswith("ready:"), errors.read()
        yield Server(int(line.split()[1].rsplit(":", 1)[1]), process, line, errors)
