"""Work of the main process in which all processes of a run take part, and that ends for all alike.

Rank 0 does the work and may ask all processes, itself too, for one task at a time. What it returns
or raises, every process returns or raises. Between two tasks the others wait where no exchange can
run out of time.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import pickle
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import TrainerError
from trainer.monitoring.processes import is_launched, wait_for_main

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class OfRankError(OSError):
    """An error of files that names the rank by itself, and that all processes may have."""


Ask = Callable[..., list[Any]]
"""(name of a task, its arguments) -> what each process returned, in order of rank."""


def join_processes(device: torch.device, timeout_s: float) -> None:
    """Make the process group, which accelerate then finds, where several were launched.

    Args:
        device: of this process.
        timeout_s: after which an exchange ends the run.
    """
    if not is_launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What is no tensor goes by the CPU.
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=dt.timedelta(seconds=timeout_s))


def is_alone() -> bool:
    """Whether no other process takes part in this run."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def num_ranks() -> int:
    """Processes that take part in what is done together."""
    return 1 if is_alone() else dist.get_world_size()


def rank_of_this() -> int:
    """This process's number among those of the run."""
    return 0 if is_alone() else dist.get_rank()


def true_for_all(mine: bool) -> bool:
    """Whether all processes say so; each calls it at the same place."""
    return mine if is_alone() else all(_exchange(mine))


def together(work: Callable[[Ask], T], tasks: Mapping[str, Callable[..., Any]]) -> T:
    """Have the main process do something with the help of all; every process calls this.

    Args:
        work: called on rank 0, with what asks all processes for a task.
        tasks: name -> what each process does when it is asked; must not exchange anything with the
            others unless all of them can be relied on to come to it.
    Returns:
        What `work` returned, on all processes.
    Raises:
        Exception: what `work` raised, on all processes; of a task that failed an error of its kind
            that names the rank.
    """
    if is_alone():
        return work(lambda name, *values: [tasks[name](*values)])
    if dist.get_rank() != 0:
        followed: T = _follow(tasks)
        return followed
    end: tuple[str, Any] = ("error", RuntimeError("rank 0 broke off"))
    try:
        result = work(lambda name, *values: _ask(tasks, name, values))
        end = ("result", result)
        return result
    except BaseException as error:
        end = ("error", _portable(error))
        raise
    finally:
        if end[0] == "result":
            _tell(end)
        else:  # the exchange itself may be what is broken
            with contextlib.suppress(RuntimeError):
                _tell(end)


def _follow(tasks: Mapping[str, Callable[..., Any]]) -> Any:
    """What the other processes do: tasks as they are asked for, until the work has ended."""
    while True:
        kind, value = _tell(None)
        if kind == "error":
            raise value
        if kind == "result":
            return value
        name, values = value
        _exchange(_attempt(tasks[name], values))


def _ask(tasks: Mapping[str, Callable[..., Any]], name: str, values: tuple[Any, ...]) -> list[Any]:
    _tell(("task", (name, values)))
    answers = _exchange(_attempt(tasks[name], values))
    for _, error in answers:
        if error is not None:
            raise error
    return [value for value, _ in answers]


def _tell(message: tuple[str, Any] | None) -> tuple[str, Any]:
    """What rank 0 says, on all processes."""
    wait_for_main()
    holder = [message]
    dist.broadcast_object_list(holder, src=0)
    assert holder[0] is not None, "rank 0 says something"
    return holder[0]


def _exchange(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _attempt(task: Callable[..., Any], values: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return task(*values), None
    except Exception as error:
        if isinstance(error, OfRankError):
            return None, OfRankError(str(error))
        where = f"rank {dist.get_rank()} on {socket.gethostname()}"
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TrainerError):
            return None, _portable(type(error)(f"{where}: {words}"))
        if isinstance(error, OSError):
            return None, OSError(f"{where}: {words}")
        return None, RuntimeError(f"{where}: {type(error).__name__}: {words}")


def _portable(error: E) -> E | RuntimeError:
    """An error as it can be sent; one that cannot be becomes its words."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
