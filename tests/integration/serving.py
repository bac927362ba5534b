"""Start `trainer serve` as a user does, on a free port."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[str]
    line: str

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


def command(*words: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "trainer", "serve", "--device", "cpu", *words]


@contextlib.contextmanager
def running_server(*words: str) -> Iterator[Server]:
    """A server on a free port, ended with the block."""
    process = subprocess.Popen(
        command("--port", "0", *words),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield Server(int(line.split()[1].rsplit(":", 1)[1]), process, line)
    finally:
        process.terminate()
        process.wait(20)
