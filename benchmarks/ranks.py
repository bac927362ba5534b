"""Forks the processes of a run from one that has imported everything, set as by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]

TOO_LATE = -1
"""Instead of an exit code: the process was still there at the end of the time, and was killed."""


def run_ranks(
    world: int, work: Callable[[int], int], log: Callable[[int], Path], *, timeout_s: float
) -> list[int]:
    """Run `work(rank)` in each of `world` new processes, which find each other on loopback.

    Args:
        work: its value is the exit code.
        log: file that takes what a rank prints.
    Returns:
        The exit codes by rank.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    served = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            told = {**variables(rank, world, store.port), **served} if world > 1 else {}
            _be_rank(rank, told, work, log(rank))
        pids.append(pid)
    deadline = time.monotonic() + timeout_s
    return [_exit_code(pid, deadline) for pid in pids]


def _exit_code(pid: int, deadline: float) -> int:
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return TOO_LATE
        time.sleep(0.02)


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of the processes of this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in {**numbers, **place}.items()}


def _be_rank(rank: int, told: dict[str, str], work: Callable[[int], int], log: Path) -> NoReturn:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(told)
    code = 1
    try:
        code = work(rank)
    except BaseException:  # whatever it is, this process must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
