"""One decision gives load dtype, masters, autocast and flags together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.config import TrainerConfig
from trainer.errors import ConfigError
from trainer.models import bf16_speed, precision
from trainer.models.precision import resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_full_fine_tuning_in_bf16_keeps_fp32_masters() -> None:
    found = resolve_precision("bf16", "full", CPU)
    assert (found.load_dtype, found.master_dtype) == (torch.float32, torch.float32)
    assert (found.compute_dtype, found.autocast_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (found.use_bf16, found.use_fp16) == (True, False)
    assert "fp32 master weights" in found.reason


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_without_bf16_arithmetic_is_told_of(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    reasons = [resolve_precision(name, "full", CPU).reason for name in ("bf16", "fp32")]
    assert ["--fp32" in reason for reason in reasons] == [not has_bf16, False]


def test_lora_keeps_its_frozen_base_in_the_compute_dtype() -> None:
    found = resolve_precision("bf16", "lora", CPU)
    assert (found.load_dtype, found.master_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_fp32_means_fp32_everywhere(mode: str) -> None:
    found = resolve_precision("fp32", mode, CPU)  # type: ignore[arg-type]
    assert {found.load_dtype, found.master_dtype, found.compute_dtype} == {torch.float32}
    assert found.autocast_dtype is None
    assert not found.use_bf16 | found.use_fp16


def test_fp16_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU"):
        resolve_precision("fp16", "full", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_on_cuda_scales_gradients() -> None:
    assert resolve_precision("fp16", "full", torch.device("cuda", 0)).use_fp16


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA devices"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("has_bf16", [True, False])
def test_empty_is_fp32_on_a_cpu_whatever_it_has(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    config, name = precision.fill_precision(TrainerConfig(), CPU)
    assert (name, config.hyperparams.fp_precision) == ("fp32", "fp32")
    asked = TrainerConfig.model_validate({"hyperparams": {"fp_precision": "bf16"}})
    assert precision.fill_precision(asked, CPU)[1] == "bf16"


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((2.0, 1.0), "2.00 times fp32's speed (2.00 to 2.00: an MLP block of 64 x 128"),
        ((1.0, 2.0), "0.50 times fp32's speed"),
    ],
)
def test_what_bf16_would_gain_is_measured_by_turns(
    monkeypatch: pytest.MonkeyPatch, times: tuple[float, float], words: str
) -> None:
    ticks, is_bf16 = [0.0], [False]

    def clock() -> float:
        return ticks[0]

    autocast = torch.autocast

    def noted(*args: Any, enabled: bool) -> Any:
        is_bf16.append(enabled)
        ticks[0] += times[enabled]
        return autocast(*args, enabled=enabled)

    monkeypatch.setattr(bf16_speed, "PASS_FLOPS", 1e6)
    monkeypatch.setattr(bf16_speed.time, "perf_counter", clock)
    monkeypatch.setattr(bf16_speed.torch, "autocast", noted)
    before = torch.random.get_rng_state()
    found = bf16_speed.measure_bf16(64, 128)
    assert torch.equal(before, torch.random.get_rng_state())
    assert is_bf16[1:] == [False, True] * (1 + bf16_speed.PAIRS)
    assert words in found.words
    advice = "ask for it with --bf16" if times[0] > times[1] else "slower here"
    assert found.words.endswith(advice)


def test_a_cpu_that_only_emulates_bf16_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_speed, "cpu_has_bf16", lambda: False)
    assert "fp32 is faster" in bf16_speed.measure_bf16(64, 128).words
