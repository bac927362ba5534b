"""`trainer doctor`: what this machine has and can do for training."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer import __version__
from trainer.commands.arguments import parse, print_table

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")

SMALL_SHARED_MEMORY = 1 << 30
"""Containers have 64 MiB where nothing else is asked for."""

OPTIONAL = {
    # package: what it is for, and what pip is told
    "bitsandbytes": (
        "hyperparams.training_mode=qlora, optimizer=adamw_8bit",
        "'ultimate-trainer[qlora]'",
    ),
    "torchao": ("hyperparams.masters=bf16_stochastic", "'ultimate-trainer[torchao]'"),
    "liger-kernel": ("fused loss on a GPU", "'ultimate-trainer[liger]'"),
    "kernels": ("model.attn_implementation=owner/name", "'ultimate-trainer[kernels]'"),
    "flash-attn": ("model.attn_implementation=flash_attention_2", "flash-attn"),
    "gguf": ("model.model_path=FILE.gguf", "'ultimate-trainer[gguf]'"),
    "s3fs": ("data.dataset_path=s3://...", "'ultimate-trainer[s3]'"),
    "gcsfs": ("data.dataset_path=gs://...", "'ultimate-trainer[gcs]'"),
    "wandb": ("monitoring.report_to=wandb", "wandb"),
}


def run(argv: list[str]) -> int:
    """Print a table; always 0, for missing things are no failure."""
    parser = argparse.ArgumentParser(prog="trainer doctor", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="do not ask the model hub")
    words = parse(parser, argv)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    with Console(stderr=True).status("looking at this machine"):
        rows = [
            *_machine(),
            *_devices(),
            *_speed(),
            ("versions", ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES)),
            *_optional(),
            ("model hub", "not asked (--offline)" if words.offline else _hub()),
        ]
    for label, text in rows:
        table.add_row(label, Text(text))  # in plain text, [qlora] is markup
    print_table(table)
    return 0


def _machine() -> list[tuple[str, str]]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return [
        ("trainer", f"{__version__}, Python {platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        ("disk here", f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free"),
        ("cpu", f"{os.cpu_count()} cores"),
    ]


def _devices() -> list[tuple[str, str]]:
    import torch  # takes seconds, and the rest of the command line does without it

    from trainer.models.devices import cuda_problem

    lines = [("threads", f"torch uses {torch.get_num_threads()}"), *_shared_memory()]
    # Without `is_available` the count may be of GPUs that torch cannot use, which raise.
    count = torch.cuda.device_count() if (problem := cuda_problem()) is None else 0
    precisions = ["cpu: fp32 and bf16"]
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        names = "fp32, bf16 and fp16" if bf16 else "fp32 and fp16 (bf16 is emulated, and refused)"
        precisions.append(f"cuda:{index}: {names}")
        lines.append(
            (
                f"cuda:{index}",
                f"{gpu.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
                f"compute capability {gpu.major}.{gpu.minor}, bf16 {'yes' if bf16 else 'NO'}",
            )
        )
    if not count:
        lines.append(("cuda", f"CANNOT be used: {problem}" if problem else "no GPU found"))
    lines.append(("processes", _processes(count)))
    lines.append(("mps", "yes" if torch.backends.mps.is_available() else "no"))
    from trainer.models.attention import installed_attention

    lines.append(("attention", ", ".join(["sdpa", "eager", *installed_attention()])))
    lines.append(("precision", "; ".join(precisions)))
    return lines


def _speed() -> list[tuple[str, str]]:
    from trainer.models.bf16_speed import measure_bf16

    return [("bf16 on the cpu", measure_bf16(1024, 4096).words)]


def _processes(num_gpus: int) -> str:
    """How several of them train together here."""
    import torch.distributed as dist

    if not dist.is_available():
        return "one only: this torch has no torch.distributed"
    names = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = [name for name, is_there in names.items() if is_there]
    words = f"torchrun starts several; they exchange by {', '.join(backends) or 'nothing'}"
    if num_gpus > 1:
        words += f": torchrun --nproc_per_node {num_gpus} -m trainer train ..."
    return words


def _shared_memory() -> list[tuple[str, str]]:
    """Where copies of the weights lie for previews that are made elsewhere."""
    from trainer.publish.snapshot import SHARED_MEMORY, memory_left

    if not SHARED_MEMORY.exists():  # macOS
        return []
    found = shutil.disk_usage(SHARED_MEMORY)
    text = f"{found.free / 2**20:.0f} of {found.total / 2**20:.0f} MiB free in {SHARED_MEMORY}"
    if found.total < SMALL_SHARED_MEMORY:
        text += "; too small for copies of most models: docker run --shm-size=8g"
    left = memory_left()
    if left < psutil.virtual_memory().available:
        text += f"; the memory limit of this container leaves {left / 2**30:.1f} GiB"
    return [("shared memory", text)]


def _optional() -> list[tuple[str, str]]:
    lines = []
    for name, (purpose, wanted) in OPTIONAL.items():
        found = _version(name) or f"not installed: pip install {wanted}"
        lines.append((name, f"{found} ({purpose})"))
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hub() -> str:
    import httpx
    from huggingface_hub import constants

    from trainer.net import HUB_TIMEOUT_S, hub_is_offline

    if hub_is_offline():
        return "not asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    try:
        status = httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).status_code
    except (httpx.HTTPError, OSError) as error:
        return (
            f"{constants.ENDPOINT} does not answer ({error}); cached models and folders still work"
        )
    return f"{constants.ENDPOINT} answers ({status})"
