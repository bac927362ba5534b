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

from trainer import __version__
from trainer.commands.arguments import parse

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")

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
    for label, text in [
        *_machine(),
        *_devices(),
        ("versions", ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES)),
        *_optional(),
        ("model hub", "not asked (--offline)" if words.offline else _hub()),
    ]:
        table.add_row(label, text)
    Console().print(table)
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

    lines = [("threads", f"torch uses {torch.get_num_threads()}")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        lines.append(
            (
                f"cuda:{index}",
                f"{gpu.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
                f"compute capability {gpu.major}.{gpu.minor}, bf16 {'yes' if bf16 else 'NO'}",
            )
        )
    if not torch.cuda.device_count():
        lines.append(("cuda", "no GPU found"))
    lines.append(("mps", "yes" if torch.backends.mps.is_available() else "no"))
    from trainer.models.attention import installed_attention

    lines.append(("attention", ", ".join(["sdpa", "eager", *installed_attention()])))
    lines.append(("precision", "fp32 and bf16" + (", fp16" if torch.cuda.is_available() else "")))
    return lines


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
