"""Which device a process computes on, and why the machine's GPU cannot be used where that is so."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.errors import ConfigError

DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
"""There where the system has NVIDIA's driver, whether torch can use it or not."""


def is_under_torchrun() -> bool:
    """Whether a launcher started this process as one of several, each with a GPU of its own."""
    return "LOCAL_RANK" in os.environ


def own_device(device: torch.device, asked: str) -> torch.device:
    """The device of this process: with an index where it is a GPU, of its own under torchrun.

    Args:
        device: what `asked` means to a process that is alone.
        asked: `environment.device`.
    Raises:
        ConfigError: all processes are sent to the same GPU, or there are more of them than GPUs.
    """
    if device.type != "cuda":
        return device
    if not is_under_torchrun():
        return torch.device("cuda", device.index or 0)
    if asked != "auto" and device.index is not None:
        raise ConfigError(
            f"environment.device={asked}: under torchrun each process has a GPU of its own; use "
            "cuda or auto, and name the GPUs in the environment variable CUDA_VISIBLE_DEVICES."
        )
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if started > count:
        raise ConfigError(
            f"{started} processes were started on this machine, which has {count} "
            f"{'GPU' if count == 1 else 'GPUs'}; each needs one of its own: start {count} "
            f"(torchrun --nproc_per_node {count} ...), or set environment.device=cpu."
        )
    return torch.device("cuda", rank)


DETERMINISTIC_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read when the first matrix product is made
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # read by transformers
}


def be_deterministic() -> None:
    """From now on this process uses algorithms that give the same bits every time, or none."""
    os.environ.update(DETERMINISTIC_VARIABLES)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


KERNEL_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""Of oneDNN, and of the layer that torch has above it. Each keeps 1024 compiled kernels, one or
more for each shape of a product in bf16: over a gigabyte where lengths change. A step makes 20."""


def bound_kernel_caches() -> None:
    """Keep fewer kernels of a CPU's bf16; read at the first product that a process makes so."""
    for name, capacity in KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


@contextlib.contextmanager
def any_algorithm() -> Iterator[None]:
    """Allow all algorithms within the block, for what no deterministic one exists for."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warns_only)


def cuda_problem() -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU; None where it can, or where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is returned here
        if torch.cuda.is_available():
            return None
    if not any(path.exists() for path in DRIVER_FILES):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:300]
    return "no GPU can be reached from this process or container"
