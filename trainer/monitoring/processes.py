"""The processes of one run: what they agree on, and how the others wait while the main one works.

An exchange between processes (gather, all-reduce, barrier) gives up after a time and ends the run.
Previews, evaluations and checkpoints of the main process may take longer than that, so the others
do not wait in an exchange: they look into the store by which the processes found each other.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather

MAX_PAUSE_S = 0.2

KEY = "trainer/main"

WORDS = "trainer/word"

_numbers, _words = itertools.count(), itertools.count()
"""Every process passes the same places in the same order, so that equal numbers are one place."""


LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a process that was launched as one of several."""


def is_launched() -> bool:
    """Whether this is one of several processes that can find each other."""
    return num_processes() > 1 and all(name in os.environ for name in LAUNCHED)


def num_processes() -> int:
    """Processes of this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def any_process(*wants: bool) -> list[bool]:
    """For each flag whether any process has it set; one exchange for all of them."""
    return [number > 0 for number in highest(*wants)]


def highest(*numbers: int) -> list[int]:
    """Of each number the highest that any process has; one exchange for all of them."""
    state = PartialState()
    if state.num_processes == 1:
        return list(map(int, numbers))
    mine = torch.tensor([[float(one) for one in numbers]], device=state.device)  # (1, N)
    return [int(one) for one in gather(mine).amax(dim=0).tolist()]  # (P, N) when gathered


def wait_for_main() -> None:
    """Return once the main process has come here as well, however long that takes.

    A main process that has ended takes the store with it, which is an error here.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    store, number = _store(), next(_numbers)
    if torch.distributed.get_rank() == 0:
        store.set(KEY, str(number))
        return
    _wait_until(lambda: store.check([KEY]) and int(store.get(KEY)) >= number)


def say(word: str) -> None:
    """Tell all other processes, each of which hears it once; of the main process."""
    _store().set(f"{WORDS}/{next(_words)}", word)


def hear() -> str:
    """The next word of the main process, however long it takes."""
    store, key = _store(), f"{WORDS}/{next(_words)}"
    _wait_until(lambda: store.check([key]))
    return str(store.get(key).decode())


def _store() -> Any:
    # Private, but the one store that is there whoever has started the processes.
    return torch.distributed.distributed_c10d._get_default_store()


def _wait_until(is_so: Callable[[], bool]) -> None:
    """Look now and then: in the store's own `wait` no signal would be heard."""
    pause_s = 0.001
    while not is_so():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
