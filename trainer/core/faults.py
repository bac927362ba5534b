"""How a run of several processes ends when one of them dies, hangs or fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from trainer.config.schema import TrainerConfig
from trainer.core.run import Job
from trainer.errors import RankError
from trainer.monitoring.beats import Fault
from trainer.monitoring.processes import is_launched
from trainer.monitoring.ranks import RankWatch

SETTLE_S = 1.0
"""What all ranks find by themselves, such as a loss that is NaN, each one says in its own words."""

GRACE_S = 5.0
"""How long the main thread may take to leave what it does, before it counts as hanging in it."""


def watch_ranks(job: Job, config: TrainerConfig) -> None:
    """Have the processes of this run watched, where it has more than one."""
    if job.ranks is None and is_launched():
        job.ranks = RankWatch(
            timeout_s=config.distributed.heartbeat_timeout_s,
            start_s=config.distributed.timeout_s,
            folder=Path(config.output.output_dir),
            on_fault=partial(_end_with, job),
        )


def _end_with(job: Job, fault: Fault) -> None:
    """End this process because of a fault of another: by its main thread, else by this one.

    The main thread may be deep in an exchange that no signal ends.
    """
    time.sleep(SETTLE_S)
    if job.ending.locked():
        return
    job.stop.is_fault = True
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if handler is job.stop:  # wakes it from whatever Python code it is in
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    if job.ending.acquire(timeout=GRACE_S):
        result = job.failed(RankError(str(fault), fault.exit_code, fault.traceback))
        job.end(result)
        if not result.is_told_elsewhere:
            tell_failure(result.error_message)
        leave(result.exit_code)


def tell_failure(message: str | None) -> None:
    """Say on stderr why this process ends, and which one it is."""
    print(f"[rank {os.environ.get('RANK', '0')}] error: {message}", file=sys.stderr, flush=True)


def let_the_end_be_told() -> None:
    """Have SIGTERM do nothing when the run is over.

    A launcher sends it once one process has ended, while the main one still writes the report.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)


def leave(exit_code: int) -> NoReturn:
    """End this process at once: the end of Python would wait for exchanges that never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
