"""Copies of the weights, taken between two optimizer steps into files that others can read.

An arena is a file in shared memory that is laid out as a safetensors file from the start: header
first, every tensor at its fixed place. It is mapped once; a snapshot only overwrites the tensors,
and the file can then be loaded by the stock reader. What is done with it (hashing, sending) happens
in another process: see `trainer.publish.publisher`.

On a GPU the copy runs on a stream of its own and overlaps the next forward and backward pass; only
`optimizer.step()` changes weights, and it waits for the copy on the device, not on the CPU.
The CUDA path has not run on the machines this was written on; its tests run where a GPU is.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import PreviewError
from trainer.files import is_alive
from trainer.models import is_quantization_state
from trainer.publish.identity import DTYPES
from trainer.publish.weight_file import make_header

SHARED_MEMORY = Path("/dev/shm")

STAGING_BYTES = 64 << 20
"""Size of the page-locked buffer through which a GPU's weights go to a file on a disk."""

CGROUPS = Path("/sys/fs/cgroup")

FOLDER_PREFIX = "trainer-weights-"


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in an arena: a safetensors header made once per run."""

    header: bytes
    """Length prefix and JSON, padded with spaces."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    """Name -> dtype in the file, shape, byte offset from the start of the file."""
    size: int
    """Bytes of the whole file."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> Layout:
        """Lay out tensors; floating ones travel in the compute dtype, all others as they are.

        So do the scales of quantized weights: rounded, they would be those of other weights.
        """
        dtypes = {
            name: compute_dtype
            if tensor.is_floating_point() and not is_quantization_state(name)
            else tensor.dtype
            for name, tensor in tensors.items()
        }
        # Wide dtypes first, so that every tensor is aligned to its own width.
        order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
        entries: dict[str, Any] = {}
        places, offset = {}, 0
        for name in order:
            length = tensors[name].numel() * dtypes[name].itemsize
            entries[name] = {
                "dtype": DTYPES[dtypes[name]],
                "shape": list(tensors[name].shape),
                "data_offsets": [offset, offset + length],
            }
            places[name] = (dtypes[name], tuple(tensors[name].shape), offset)
            offset += length
        header = make_header(entries)
        placed = {name: (d, s, len(header) + o) for name, (d, s, o) in places.items()}
        return cls(header, placed, len(header) + offset)


class Arena:
    """One file that holds one snapshot at a time."""

    def __init__(
        self, path: Path, layout: Layout, *, pin: bool = False, is_new: bool = True
    ) -> None:
        """Make, fill and map the file; all its pages are allocated now, not while training.

        Args:
            pin: page-lock the memory for copies from a GPU.
            is_new: False: it is another process's, and only mapped here.
        Raises:
            OSError: no room.
        """
        self.path, self._is_ours = path, is_new
        flags = os.O_CREAT | os.O_EXCL if is_new else 0
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
        try:
            if is_new:
                _reserve(descriptor, layout.size)
            self._map = mmap.mmap(descriptor, layout.size)
        finally:
            os.close(descriptor)
        if is_new:
            self._map[: len(layout.header)] = layout.header
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._address = whole.data_ptr()
        self.is_pinned = pin and _page_lock(self._address, layout.size)
        if is_new:
            whole[len(layout.header) :: mmap.PAGESIZE] = 0  # touch every page
        self.views = {
            name: _view(whole, offset, dtype, shape)
            for name, (dtype, shape, offset) in layout.tensors.items()
        }

    def close(self) -> None:
        """Give the memory back and remove the file, wherever it was renamed to."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
            self.is_pinned = False
        self.views = {}
        # Tensors over the buffer may still be alive in a caller: the map then ends with them.
        with contextlib.suppress(BufferError):
            self._map.close()
        if self._is_ours:
            self.path.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, where the system can, its memory: a full disk shows here."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


def _view(
    whole: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    length = dtype.itemsize
    for size in shape:
        length *= size
    return whole[offset : offset + length].view(dtype).view(shape)


def _page_lock(address: int, size: int) -> bool:
    """Register memory for asynchronous copies; True when it worked."""
    if not torch.cuda.is_available():
        return False
    done = torch.cuda.cudart().cudaHostRegister(address, size, 0)  # type: ignore[no-untyped-call]
    if int(done) == 0:
        return True
    # CUDA keeps the error and torch would raise it at the next kernel, which would be training's.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def is_in_memory(path: Path) -> bool:
    """Whether a file lies in shared memory, which can be page-locked; files on a disk cannot."""
    return path.resolve().is_relative_to(SHARED_MEMORY.resolve())


class Snapshotter:
    """Copies a model's tensors into an arena, between two steps."""

    is_shared = False
    """Whether other processes take part in a copy, and in what follows it."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the live parameters; they stay the same objects for the whole run.

        Args:
            tensors: parameters and buffers themselves, not detached: moving a model to its device
                gives them other storage.
            compute_dtype: dtype in which floating tensors travel; fp32 stays fp32.
            device: where the model trains.
        """
        self.tensors = dict(tensors)
        self.layout = Layout.of(self.tensors, compute_dtype)
        self._device = device
        self._cuda = device if device.type == "cuda" else None
        self._stream: Any = None
        if self._cuda is not None:
            self._stream = torch.cuda.Stream(self._cuda)  # type: ignore[no-untyped-call]
        self._copied: Any = None
        self._staging: torch.Tensor | None = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether copies run beside training instead of inside it."""
        return self._stream is not None

    def arena(self, path: Path) -> Arena:
        """A new arena for this model.

        Raises:
            OSError: no room.
        """
        return Arena(path, self.layout, pin=self.is_on_gpu and is_in_memory(path))

    def copy(self, arena: Arena) -> Callable[[], None]:
        """Copy the weights as they are now.

        Returns:
            A function that waits until the copy is in the arena (at once, without a GPU). Call it
            in another thread than the training one.
        """
        if self._stream is None:
            with torch.no_grad():
                for name, view in arena.views.items():
                    view.copy_(self.tensors[name].detach())
            return lambda: None
        if not arena.is_pinned:
            self._copy_staged(arena)
            return lambda: None
        return self._copy_beside(arena)

    def leave_out(self) -> None:
        """Called where a step is asked for and not copied."""

    def settle(self) -> None:
        """Called behind the last copy."""

    def _copy_staged(self, arena: Arena) -> None:
        """Copy through a small page-locked buffer; training waits for it.

        Into memory that is not page-locked, CUDA copies while the thread waits in any case.
        """
        if self._staging is None:
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        with torch.no_grad():
            for name, view in arena.views.items():
                there = self.tensors[name].detach().to(view.dtype).contiguous()
                source = torch.split(there.reshape(-1).view(torch.uint8), STAGING_BYTES)
                target = torch.split(view.reshape(-1).view(torch.uint8), STAGING_BYTES)
                for piece, place in zip(source, target, strict=True):
                    held = self._staging[: len(piece)]
                    held.copy_(piece)
                    place.copy_(held)

    def _copy_beside(self, arena: Arena) -> Callable[[], None]:
        """Start the copy on the side stream, behind what training has queued so far."""
        assert self._stream is not None, "only with a GPU"
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._cuda))
        with torch.cuda.stream(stream), torch.no_grad():
            for name, view in arena.views.items():
                # The cast makes a small temporary on the device, freed in stream order.
                view.copy_(self.tensors[name].detach().to(view.dtype), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self._copied = event
        return lambda: _wait_for(event, self._cuda)

    def guard(self, optimizer: Any) -> None:
        """Have the device finish a copy before this optimizer changes the weights."""
        if self.is_on_gpu:
            optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._cuda).wait_event(self._copied)
            self._copied = None


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """Bring a number from where it is computed to the CPU, without waiting for it.

    Returns:
        A function that waits until it is there and gives it. It asks nothing of the device, whose
        stream is full of training, so that another thread may call it.
    """
    if value.device.type != "cuda":
        found = float(value)
        return lambda: found
    value_device = value.device
    held = torch.empty((), dtype=value.dtype, pin_memory=True)
    held.copy_(value, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(value_device))

    def read() -> float:
        _wait_for(event, value_device)
        return float(held)

    return read


def _wait_for(event: Any, device: torch.device | None) -> None:
    """Wait in a thread of any kind: a new one begins on GPU 0, and would make a context there."""
    with torch.cuda.device(device):
        event.synchronize()


def arena_folder(
    size: int, run_dir: Path, *, instead: str = "monitoring.preview_backend=local"
) -> Path:
    """A private folder (mode 700) with room for `size` bytes: shared memory, else the run folder.

    Shared memory counts against the memory limit of a container, which is compared too. What
    killed runs left in either is removed first.

    Raises:
        PreviewError: neither has room.
    """
    for parent in (SHARED_MEMORY, run_dir):
        try:
            _remove_abandoned(parent)
            room: float = shutil.disk_usage(parent).free
            if parent == SHARED_MEMORY:
                room = min(room, memory_left())
            if room > size * 1.05 and os.access(parent, os.W_OK):
                prefix = f"{FOLDER_PREFIX}{os.getpid()}-"
                return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        except OSError:
            continue  # not there: the next one
    raise PreviewError(
        f"previews need {size / 2**20:.0f} MiB for copies of the weights, and neither "
        f"{SHARED_MEMORY} nor {run_dir} has that room; free some, or set {instead}."
    )


def memory_left() -> float:
    """Bytes that this process's control groups may still take; infinity without a limit.

    Files that were read can be dropped from memory, and are not counted.
    """
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").partition("0::/")[2]
    except OSError:  # not Linux
        return math.inf
    folder = CGROUPS / own.partition("\n")[0]
    left = [_left_in(one) for one in (folder, *folder.parents) if one.is_relative_to(CGROUPS)]
    return min(left, default=math.inf)


def _left_in(group: Path) -> float:
    """Of one control group, in either version's files."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((group / limit).read_text())
            now = int((group / used).read_text())
            lines = (group / limit).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        dropped = dict(line.split() for line in lines).get(cached, 0)
        return max(0, most - now + int(dropped))
    return math.inf


def _remove_abandoned(parent: Path) -> None:
    """Remove folders of this user whose process is gone: a killed run cannot tidy up."""
    for path in parent.glob(f"{FOLDER_PREFIX}*-*"):
        number = path.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        is_ours = number.isdigit() and path.stat().st_uid == os.getuid()
        if is_ours and not is_alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)
