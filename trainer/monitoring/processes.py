"""The processes of one run: what they agree on, and how the others wait while the main one works.

An exchange between processes (gather, all-reduce, barrier) gives up after a time and ends the run.
Previews, evaluations and checkpoints of the main process may take longer than that, so the others
do not wait in an exchange: they look into the store by which the processes found each other.
"""

from __future__ import annotations

import itertools
import time

import torch
from accelerate import PartialState
from accelerate.utils import gather

MAX_PAUSE_S = 0.2

KEY = "trainer/main"

_numbers = itertools.count()
"""Every process passes the same places in the same order, so that equal numbers are one place."""


def any_process(*wants: bool) -> list[bool]:
    """For each flag whether any process has it set; one exchange for all of them."""
    state = PartialState()
    if state.num_processes == 1:
        return list(wants)
    flags = torch.tensor([[float(one) for one in wants]], device=state.device)  # (1, N)
    return [bool(one) for one in gather(flags).amax(dim=0) > 0]  # (P, N) when gathered


def wait_for_main() -> None:
    """Return once the main process has come here as well, however long that takes.

    A main process that has ended takes the store with it, which is an error here.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    # Private, but the one store that is there whoever has started the processes.
    store = torch.distributed.distributed_c10d._get_default_store()
    number, pause_s = next(_numbers), 0.001
    if torch.distributed.get_rank() == 0:
        store.set(KEY, str(number))
        return
    # Not the store's own `wait`, in which no signal would be heard.
    while not store.check([KEY]) or int(store.get(KEY)) < number:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
