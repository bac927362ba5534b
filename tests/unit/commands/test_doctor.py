"""`trainer doctor` says what a GPU cannot do, and why one cannot be used at all."""

from __future__ import annotations

import contextlib
import shutil
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.commands import doctor
from trainer.models import devices
from trainer.publish import snapshot

Usage = namedtuple("Usage", "total used free")


def gpu(monkeypatch: pytest.MonkeyPatch, name: str, *, has_bf16: bool) -> None:
    properties = SimpleNamespace(name=name, major=7, minor=5)
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (2**30, 2**34),
        "device": lambda index: contextlib.nullcontext(),
        "is_bf16_supported": lambda including_emulation: has_bf16 or including_emulation,
    }
    for attribute, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, attribute, fake)


@pytest.mark.parametrize(
    ("name", "has_bf16", "words"),
    [
        ("Tesla T4", False, "cuda:0: fp32 and fp16 (bf16 is emulated, and refused)"),
        ("H100", True, "cuda:0: fp32, bf16 and fp16"),
    ],
)
def test_precisions_are_those_that_a_gpu_computes_in(
    name: str, has_bf16: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, name, has_bf16=has_bf16)
    found = dict(doctor._devices())
    assert name in found["cuda:0"]
    assert found["precision"] == f"cpu: fp32 and bf16; {words}"


def test_a_driver_that_is_too_old_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: Any) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as NVML counts
    monkeypatch.setattr(torch.cuda, "get_device_properties", too_old)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "DRIVER_FILES", (snapshot.CGROUPS.parent,))  # anything that is
    found = dict(doctor._devices())
    assert found["cuda"] == "CANNOT be used: The NVIDIA driver on your system is too old"


def test_a_small_shared_memory_and_a_memory_limit_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(snapshot, "memory_left", lambda: 2.0**28)
    [(label, text)] = doctor._shared_memory()
    assert label == "shared memory"
    assert "64 of 64 MiB free in /dev/shm; too small" in text
    assert "--shm-size" in text
    assert "memory limit of this container leaves 0.2 GiB" in text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**34, 0, 2**34))
    monkeypatch.setattr(snapshot, "memory_left", lambda: float("inf"))
    assert doctor._shared_memory()[0][1] == "16384 of 16384 MiB free in /dev/shm"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_described() -> None:
    found = dict(doctor._devices())
    assert torch.cuda.get_device_name(0) in found["cuda:0"]
    assert "cuda:0: fp32" in found["precision"]
