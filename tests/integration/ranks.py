"""A launcher of runs of several processes that forks them, so that nothing is imported twice.

Each line on stdin is one launch, see `launch`; two lines come back: the processes, once they are
there, and their exit codes, once all have ended. It does what torchrun does: once a process has
failed, the others get SIGTERM, and SIGKILL 30 seconds later.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from benchmarks.ranks import variables

GRACE_S = 30


def launch(words: list[str], folder: str, patch: str, world: int) -> None:
    """Run `trainer train WORDS` in `world` processes.

    Args:
        folder: gets rank-N.txt, all that rank N prints.
        patch: code that each process runs before; it knows `rank`.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            be_rank(rank, world, port, folder, patch, words)
        ranks[pid] = rank
    print(json.dumps(list(ranks)), flush=True)
    codes: dict[int, int] = {}
    failed_at = None
    while len(codes) < world:
        for pid, rank in ranks.items():
            # How one ended can be read by others only until it is waited for: that is done last.
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if rank not in codes and found is not None:
                is_code = found.si_code == os.CLD_EXITED
                codes[rank] = found.si_status if is_code else -found.si_status
        left = [pid for pid, rank in ranks.items() if rank not in codes]
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
            send(left, signal.SIGTERM)
        elif failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            send(left, signal.SIGKILL)
        time.sleep(0.02)
    for pid in ranks:
        os.waitpid(pid, 0)
    print(json.dumps([codes[rank] for rank in range(world)]), flush=True)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def be_rank(rank: int, world: int, port: int, folder: str, patch: str, words: list[str]) -> None:
    code = 1
    try:
        os.setsid()
        text = os.open(Path(folder, f"rank-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(text, 1)
        os.dup2(text, 2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # the launcher's own lines
        os.environ.update(variables(rank, world, port))
        exec(patch, {"rank": rank})
        code = main(["train", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from trainer.cli import main

    print("ready", flush=True)
    for line in sys.stdin:
        launch(**json.loads(line))
