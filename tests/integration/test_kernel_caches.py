"""Compiled kernels of a CPU's bf16 are kept within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from trainer.core.preparation import check_config
from trainer.core.process import process_settings
from trainer.models.devices import KERNEL_CACHES
from trainer.models.precision import cpu_has_bf16

GROWTH = """
import psutil, torch
from trainer.models.devices import bound_kernel_caches
if {is_bound}:
    bound_kernel_caches()
torch.set_num_threads(1)
block = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
process = psutil.Process()

def step(tokens):
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.ones(tokens, 64)).float().sum().backward()

for tokens in range(20, 30):
    step(tokens)
before = process.memory_info().rss
for tokens in range(30, 330):
    step(tokens)
print(process.memory_info().rss - before)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_in_bf16_bounds_them_and_gives_the_process_back(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    first, second = KERNEL_CACHES
    monkeypatch.delenv(first, raising=False)
    monkeypatch.setenv(second, "7")
    put_back = process_settings()
    check_config(job(hyperparams={"fp_precision": precision}))
    assert os.environ.get(first) == (KERNEL_CACHES[first] if precision == "bf16" else None)
    assert os.environ[second] == "7"
    put_back()
    assert first not in os.environ


@pytest.mark.long
@pytest.mark.skipif(not cpu_has_bf16(), reason="a CPU that emulates bf16 compiles no such kernels")
def test_memory_of_changing_lengths_stops_growing() -> None:
    grown = [
        int(subprocess.check_output([sys.executable, "-c", GROWTH.format(is_bound=is_bound)]))
        for is_bound in (False, True)
    ]
    assert grown[1] < grown[0] / 2, grown
