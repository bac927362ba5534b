"""`trainer WORDS` in a process that is forked from one which has imported the libraries already.

A real process with its own folder, files and exit code; it only starts some seconds faster. What a
process reads from its environment while libraries are imported needs a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "transformers", "peft", "accelerate", "datasets", "rich", "pydantic"]


def _enter(words: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    """In the child: become `python -m trainer WORDS`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, mode) in enumerate(zip(streams, ("r", "w", "w"), strict=True)):
        with open(name, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False)
        for number, mode in enumerate(("r", "w", "w"))
    )
    sys.argv = ["trainer", *words]
    sys.path.insert(0, environment["PYTHONPATH"])
    try:
        runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(
    words: list[str],
    *,
    cwd: Path,
    environment: dict[str, str],
    stdin: str = "",
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives for `python -m trainer WORDS`."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("in", "out", "err")]
        Path(streams[0]).write_text(stdin, encoding="utf-8")
        child = context.Process(target=_enter, args=(words, str(cwd), environment, streams))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = (Path(name).read_text(encoding="utf-8") for name in streams[1:])
    return subprocess.CompletedProcess(words, child.exitcode, out, err)
