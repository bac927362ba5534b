"""Counts what processes exchange: every collective of torch that a block of code makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPACES = ("c10d", "_c10d_functional")

KINDS = ("reduce_scatter", "all_gather", "allgather", "allreduce", "all_reduce", "broadcast")


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Payload of each kind of collective, and how many there were.

    The payload is the whole tensor, before it is cut into shards or after it is put together. A
    process sends and receives (N-1)/N of it in an all-gather or a reduce-scatter, and twice that
    in an all-reduce.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, and count it if it is an exchange."""
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func).partition(".")
        kind = next((kind for kind in KINDS if kind in name), None)
        if space in SPACES and kind is not None:
            kind = {"allgather": "all_gather", "allreduce": "all_reduce"}.get(kind, kind)
            sizes = [one.nbytes for one in tree_leaves((args, result)) if _is_tensor(one)]
            self.num_bytes[kind] += max(sizes, default=0)
            self.calls[kind] += 1
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
