"""The head in tiles: loss and gradients of all logits at once, and less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks import bench_loss
from tests.trust import reference
from tests.unit.core.test_loss import gradients, ragged_batch
from trainer.core import loss, tiles
from trainer.core.loss import find_post_head, prove_tiling, supervised_loss
from trainer.core.tiles import PostHead, Tiling
from trainer.data.batches import LOSS_WEIGHTS

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MINI = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
MINI.update({"v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 2})
FAMILIES: dict[str, tuple[dict[str, Any], PostHead]] = {
    "Qwen3": ({}, PostHead()),
    "Llama": ({"tie_word_embeddings": True}, PostHead()),
    "Gemma2": ({"final_logit_softcapping": 3.0}, PostHead(cap=3.0)),
    "Cohere": ({"logit_scale": 0.25}, PostHead(0.25)),
    "Granite": ({"logits_scaling": 8.0}, PostHead(1 / 8)),
    "HyperCLOVAX": ({"logits_scaling": 4.0}, PostHead(4.0)),
    "MiniCPM3": ({"dim_model_base": 16, **MINI}, PostHead()),
    "Phi": ({}, PostHead()),  # its head has a bias
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SIZES, **FAMILIES[family][0]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits of a size where a cap shows
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_a_family_does_behind_its_head_is_found(family: str) -> None:
    found = find_post_head(model_of(family), ragged_batch())
    expected = FAMILIES[family][1]
    assert found is not None
    assert found.scale == pytest.approx(expected.scale)
    assert found.cap == expected.cap


WAYS = ("beside the sum", "autograd")
"""How gradients are made: of a plain head in the forward pass, of all others by autograd."""


def check_tiles(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    post: PostHead | None,
    *,
    way: str = WAYS[0],
    weighted: bool = False,
    tolerance: tuple[float, float] = (1e-6, 1e-5),
) -> None:
    """Loss and gradients in tiles of 7 positions are those of all logits, made in the given way."""
    batch = ragged_batch()
    if weighted:
        drawn = torch.Generator().manual_seed(3)
        batch[LOSS_WEIGHTS] = torch.rand(batch["labels"].shape, generator=drawn)
    assert post is not None
    plain = supervised_loss(model, model, batch)
    plain_grad = gradients(model, plain)
    calls: dict[str, list[int]] = {name: [] for name in WAYS}
    head = loss.head_of(model)
    forward, with_gradient = head.forward, tiles._with_gradient

    def noting(states: torch.Tensor) -> torch.Tensor:
        calls["autograd"].append(states.shape[1])
        return forward(states)

    def noting_gradients(output: torch.Tensor, *rest: Any) -> Any:
        calls["beside the sum"].append(len(output))
        return with_gradient(output, *rest)

    monkeypatch.setattr(tiles, "_with_gradient", noting_gradients)
    if way == "autograd":
        head.forward = noting
    tiled = supervised_loss(model, model, batch, tiling=Tiling(post, 7))
    assert max(calls[way][1:]) == 7
    assert len(calls[way]) > 5
    tiled_grad = gradients(model, tiled)
    assert tiled.item() == pytest.approx(plain.item(), rel=tolerance[0])
    assert (tiled_grad - plain_grad).norm() <= tolerance[1] * plain_grad.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weighted", [False, True], ids=["tokens", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_in_tiles_are_those_of_all_logits(
    family: str, weighted: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, post = model_of(family), FAMILIES[family][1]
    check_tiles(monkeypatch, model, post, way=way, weighted=weighted)
    exact = model.double()
    check_tiles(monkeypatch, exact, post, way=way, weighted=weighted, tolerance=(1e-12, 1e-10))


@pytest.mark.parametrize("way", WAYS)
def test_mutant_a_cap_that_is_left_out_is_killed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_tiles(monkeypatch, model_of("Gemma2"), PostHead(), way=way)


@pytest.mark.parametrize("way", WAYS)
def test_mutant_a_scale_the_wrong_way_round_is_killed(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        check_tiles(monkeypatch, model_of("Granite"), PostHead(8.0), way=way)


@torch.no_grad()
def test_a_model_that_does_something_else_behind_its_head_is_not_tiled() -> None:
    model = model_of("Qwen3")
    forward = model.forward

    def shifted(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits + torch.arange(128)
        return output

    model.forward = shifted
    assert find_post_head(model, ragged_batch()) is None


@pytest.mark.parametrize(
    ("vocabulary", "device_type", "positions"),
    [
        (512, "cpu", 8192),
        (32_000, "cpu", 192),
        (151_936, "cpu", 192),
        (2**26, "cpu", 1),
        (2**27, "cpu", 1),
        (32_000, "cuda", 2097),
        (151_936, "cuda", 441),
    ],
)
def test_a_tile_is_shorter_on_a_cpu_than_on_a_gpu(
    vocabulary: int, device_type: str, positions: int
) -> None:
    assert tiles.tile_length(vocabulary, device_type) == positions


@pytest.mark.long
def test_a_loss_of_1536_tokens_and_32000_words_holds_100_mib_of_tensors() -> None:
    """All logits at once hold more than 500; gradients of parameters are not counted."""
    size = ["--tokens", "1536", "--vocabulary", "32000", "--hidden", "512"]
    for arm, low, high in (("192", 50, 100), ("all at once", 500, 600)):
        words = [sys.executable, "-m", "benchmarks.bench_loss", "--live", *size, "--arm", arm]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert low < json.loads(done.stdout.splitlines()[-1])["mib"] <= high
    assert bench_loss.usual_tile(32000) == 192


PEAK = """
import sys, torch
from pathlib import Path
from trainer.core import loss, tiles
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.set_num_threads(1)
config = Qwen3Config(vocab_size=32768, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1, head_dim=32)
model = Qwen3ForCausalLM(config)
ids = torch.randint(3, 32768, (1, 1024))
tiling = tiles.Tiling(tiles.PostHead(), 64) if sys.argv[1] == "tiled" else None
def high_water():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0])
few = ids[:, :80]  # what a first step loads and allocates once is not what is compared
loss.supervised_loss(model, model, {"input_ids": few, "labels": few}, tiling=tiling).backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = high_water()
loss.supervised_loss(model, model, {"input_ids": ids, "labels": ids}, tiling=tiling).backward()
print((high_water() - before) / 1024)
"""


@pytest.mark.slow
def test_tiles_take_less_than_half_of_the_memory_of_all_logits() -> None:
    def peak_mib(arm: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, arm],
            capture_output=True,
            text=True,
            check=True,
            # What is freed goes back at once: the peak is that of tensors, not of free lists.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        return float(done.stdout)

    whole, tiled = peak_mib("whole"), peak_mib("tiled")
    print(f"peak of one step over the model: {whole:.0f} MiB at once, {tiled:.0f} MiB in tiles")
    assert whole > 32768 * 1024 * 4 / 2**20  # all logits, once
    assert tiled < whole / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tiles_are_proved_in_the_dtype_of_the_run(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    found = prove_tiling(model, ragged_batch(), dtype)
    assert found is not None
    assert found.post.scale == pytest.approx(FAMILIES[family][1].scale)
    assert found.post.cap == FAMILIES[family][1].cap
    assert found.length == tiles.CPU_TILE_LOGITS // 128


@torch.no_grad()
def test_a_cap_is_found_by_logits_that_are_too_small_to_show_it() -> None:
    model = model_of("Gemma2").bfloat16()
    for parameter in model.parameters():
        parameter.mul_(0.01)
    found = find_post_head(model, ragged_batch())
    assert found is not None
    assert found.cap == 3.0


def test_tiles_are_made_in_the_autocast_of_the_forward_that_they_belong_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accelerate puts autocast around the model's forward, and nothing around the loss."""
    model = reference.llama()
    forward, seen = model.forward, []

    def with_autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **options)

    model.forward = with_autocast
    with_gradient = tiles._with_gradient

    def noting(output: torch.Tensor, *rest: Any) -> Any:
        seen.append(output.dtype)
        return with_gradient(output, *rest)

    monkeypatch.setattr(tiles, "_with_gradient", noting)
    batch = {"input_ids": torch.arange(40)[None], "labels": torch.arange(40)[None]}
    whole = supervised_loss(model, model, batch)
    plain_grad = gradients(model, whole)
    tiled = supervised_loss(model, model, batch, tiling=Tiling(PostHead(), 7))
    tiled_grad = gradients(model, tiled)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 6
    assert tiled.item() == pytest.approx(whole.item(), rel=1e-6)
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert 0 < (tiled_grad - plain_grad).norm() <= 5e-3 * plain_grad.norm()


class OwnHead(nn.Linear):
    """A head with a forward of its own."""


def heads() -> dict[str, Any]:
    """Models whose head is not F.linear of its own dense weights alone."""
    plain, hooked, other = (reference.llama() for _ in range(3))
    adapters = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    add_hook_to_module(hooked.lm_head, ModelHook())
    size = other.lm_head.in_features, other.lm_head.out_features
    other.lm_head = OwnHead(*size, bias=False)
    found = {"adapted": get_peft_model(plain, adapters), "hooked": hooked, "of a class": other}
    return {name: model.double() for name, model in found.items()}


def test_other_heads_are_left_to_autograd_and_get_the_same_gradients() -> None:
    batch = ragged_batch()
    for name, model in heads().items():
        assert not tiles.is_plain(loss.head_of(model)), name
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        plain = supervised_loss(model, inner, batch)
        plain_grad = gradients(model, plain)
        tiled = supervised_loss(model, inner, batch, tiling=Tiling(PostHead(), 7))
        assert tiled.item() == pytest.approx(plain.item(), rel=1e-12), name
        apart = (gradients(model, tiled) - plain_grad).norm()
        assert apart <= 1e-10 * plain_grad.norm(), name
    assert tiles.is_plain(reference.llama().lm_head)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen: str) -> None:
    model = model_of("Qwen3").double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") == (frozen == "body"))
    batch = ragged_batch()
    plain_grad = gradients(model, supervised_loss(model, model, batch))
    tiled = supervised_loss(model, model, batch, tiling=Tiling(PostHead(), 7))
    assert (gradients(model, tiled) - plain_grad).norm() <= 1e-10 * plain_grad.norm()
    assert (model.lm_head.weight.grad is None) == (frozen == "head")


def test_gradients_that_were_given_are_not_given_again() -> None:
    model = reference.llama()
    tiled = supervised_loss(model, model, ragged_batch(), tiling=Tiling(PostHead(), 7))
    tiled.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        tiled.backward()


def test_a_weight_in_half_precision_gets_a_gradient_that_is_rounded_once_behind_its_factor() -> (
    None
):
    """A factor of 2^20 over 3 is more than fp16 has."""
    torch.manual_seed(0)
    states, target = torch.randn(21, 16).half(), torch.randint(64, (21,))
    found = []
    for dtype in (torch.float16, torch.float32):
        head = nn.Linear(16, 64, bias=False).to(dtype)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, 64 * 16).view(64, 16))
        total, _ = tiles.summed_in_tiles(
            (1e-3 * states).to(dtype), head, target, None, Tiling(PostHead(), 7)
        )
        (total * (2**20 / 3)).backward()
        found.append(head.weight.grad.float())
    assert found[0].isfinite().all()
    assert found[1].abs().max() > 0
    assert (found[0] - found[1]).norm() <= 2e-3 * found[1].norm()
