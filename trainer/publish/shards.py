"""Snapshots of a sharded model: all processes gather its weights together, some keep them.

Each process holds a part of every weight, so that a copy needs all of them, in one order. The main
process alone decides whether a step is copied (a slot is free, newer weights have not taken its
place) and says so before the first gather; the others wait for its word at the same places of
their own loop, and so nobody waits for a gather that another does not make.

The arenas are the main process's, and the processes on its machine write into them too, each the
tensors that it owns: what is copied out of a device goes by as many ways as there are devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.errors import PreviewError
from trainer.preview.scheduler import OnFinished
from trainer.publish.snapshot import Arena, Layout, Snapshotter, read_later

SKIP, END = "skip", "end"
"""What the main process says beside the number of an arena, which is: copy the weights into it.
Leave this step out; and nothing comes any more."""


def whole_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a sharded model as every process may have it; all of them call it together.

    It travels in `dtype`, where that is another than the tensor's own.
    """
    part = tensor.detach().to(dtype)
    if not isinstance(part, DTensor):
        return part
    # Shards that are kept on the host are gathered where the processes can exchange them.
    there: Any = part.to(device=part.device_mesh.device_type)
    whole: torch.Tensor = there.full_tensor()
    return whole


def shares_of(layout: Layout, owners: Sequence[int]) -> dict[int, set[str]]:
    """Which tensors each owner copies, so that all copy about as many bytes.

    Args:
        owners: ranks; the result is the same wherever it is asked for.
    """
    shares: dict[int, set[str]] = {rank: set() for rank in owners}
    loads = dict.fromkeys(owners, 0)
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize
        for name, (dtype, shape, _) in layout.tensors.items()
    }
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        rank = min(owners, key=lambda one: (loads[one], one))
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


class ShardSnapshotter(Snapshotter):
    """As its base; `copy` is of a sharded model, whose other processes `take_part` in it."""

    is_shared = True

    def __init__(
        self,
        model: Any,
        tensors_of: Callable[[Any], Mapping[str, torch.Tensor]],
        compute_dtype: torch.dtype,
        device: torch.device,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Lay the arenas out; the model may still be whole, and sharded in place later.

        Args:
            tensors_of: finds the model's tensors by name, the same on all processes.
            say: tells the other processes a word; they hear each, in order.
        """
        super().__init__(tensors_of(model), compute_dtype, device)
        self.tensors = {}  # of the whole model, whose memory is wanted back
        self.arenas: list[Arena] = []
        self.owned: set[str] = set()
        """The tensors that this process copies."""
        self._model, self._tensors_of, self._say = model, tensors_of, say

    def arena(self, path: Path) -> Arena:
        """As the base's; it is numbered."""
        self.arenas.append(super().arena(path))
        return self.arenas[-1]

    def open_arenas(self, paths: Sequence[Path]) -> None:
        """Map the main process's arenas, which the caller closes.

        Raises:
            OSError: they cannot be had.
        """
        for path in paths:
            self.arenas.append(Arena(path, self.layout, pin=self.is_on_gpu, is_new=False))

    def share_out(self) -> None:
        """Agree on who copies what, of those that have the arenas; all processes together."""
        flags: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(flags, bool(self.arenas))
        owners = [rank for rank, has_arenas in enumerate(flags) if has_arenas]
        self.owned = shares_of(self.layout, owners).get(dist.get_rank(), set())

    def copy(self, arena: Arena) -> Callable[[], None]:
        """Gather the weights as they are now; what is owned is copied as it comes.

        What goes wrong with the copy, here or in another process, is told by the function that is
        returned: the gathers go on, because the other processes are in them.
        """
        number = self.arenas.index(arena)
        self._say(str(number))
        return self.take_part(number)

    def take_part(self, number: int) -> Callable[[], None]:
        """The part of every process in a copy into an arena."""
        errors: list[Exception] = []
        for name, whole in self._gathered():
            if name not in self.owned or errors:
                continue
            try:
                arena = self.arenas[number]
                arena.views[name].copy_(whole, non_blocking=arena.is_pinned)
            except Exception as error:
                errors.append(error)
        # It is behind every process's copies, on their devices too: what is read of it says that
        # they have been made.
        failed = torch.tensor(float(bool(errors)), device=self._device)
        dist.all_reduce(failed)
        num_failed = read_later(failed)

        def wait() -> None:
            if num_failed():
                raise errors[0] if errors else PreviewError("the copy of another process failed")

        return wait

    def leave_out(self) -> None:
        """No copy of this step: the others go on."""
        self._say(SKIP)

    def settle(self) -> None:
        """No copies any more: the others wait for none."""
        self._say(END)

    def guard(self, optimizer: Any) -> None:
        """Nothing to guard: the gathers are in the stream of training, before its next step."""

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # so that the parameters are the shards, on all processes
        tensors = self._tensors_of(self._model)
        with torch.no_grad():
            for name, (dtype, _, _) in self.layout.tensors.items():
                yield name, whole_tensor(tensors[name], dtype)


class FollowingLane:
    """What a process that is not the main one does where that one asks for a preview."""

    def __init__(
        self,
        snapshotter: ShardSnapshotter,
        hear: Callable[[], str],
        score: Callable[[], Any] | None,
    ) -> None:
        """Take its part in a copy, how the main process is heard, and the canary."""
        self.snapshotter, self._hear, self._score = snapshotter, hear, score

    def start(self, on_finished: OnFinished) -> None:
        """The main process tells what became of a step."""

    def ask(self, step: int, *, is_kept: bool, is_evaluated: bool = False) -> None:
        """Do as the main process does with this step."""
        self._follow()

    def pending(self) -> list[int]:
        """Nothing that this process answers."""
        return []

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    def give_up(self, reason: str) -> None:
        """Nothing to give up."""

    def settle(self) -> None:
        """Stay until the main process copies no more: it may still copy the last weights."""
        while self._follow() != END:
            pass

    def summary(self) -> dict[str, Any]:
        """The main process has the figures."""
        return {}

    def close(self) -> None:
        """Let go of the arenas."""
        for arena in self.snapshotter.arenas:
            arena.close()
        self.snapshotter.arenas.clear()

    def _follow(self) -> str:
        word = self._hear()
        if word not in (SKIP, END):
            self.snapshotter.take_part(int(word))
            if self._score is not None:
                self._score()
        return word
