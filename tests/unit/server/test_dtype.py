"""`--dtype`: weights are held and answered in it, and their proof stays as sharp as in fp32."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import ConfigError
from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer
from trainer.preview.neutral import as_received, golden_logprobs
from trainer.publish.identity import NOISE_FP32, Canary, adapter_tensors, canonical_tensors
from trainer.publish.wire import AdapterConfig, PreviewsRequest
from trainer.server import held_model, inference
from trainer.server.held_model import HeldModel, _with_adapter
from trainer.server.inference import Engine
from trainer.server.token_watch import TokenWatch

ID, BASE = "a" * 64, "b" * 64
PROMPT, GOLDEN = list(range(5, 25)), list(range(40, 56))
ADAPTER = AdapterConfig.model_validate(
    {"r": 4, "alpha": 8.0, "target_modules": ["model.layers.0.mlp.gate_proj"]}
)


def hold(dtype: str = "auto") -> HeldModel:
    return HeldModel("tiny", "cpu", wait_for_weights=False, dtype=dtype)


def trained() -> Any:
    """A model as far from uniform answers as a trained one."""
    model = build_tiny_model(seed=7, vocab_size=len(load_tiny_tokenizer()), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def file_of(model: Any, path: Path, dtype: torch.dtype) -> str:
    tensors = canonical_tensors(model)
    save_file({name: value.detach().to(dtype) for name, value in tensors.items()}, path)
    return str(path)


def previews(held: HeldModel, weights_id: str) -> Any:
    prompt = {"prompt": "?", "prompt_token_ids": PROMPT, "golden_token_ids": GOLDEN}
    asked = {"run": "run", "step": 1, "weights_id": weights_id, "prompts": [prompt], "canary": 0}
    watch = TokenWatch(ctypes.c_int64(0), held.tokenizer, lambda sample, text: None)
    request = PreviewsRequest.model_validate({**asked, "max_new_tokens": 2})
    return Engine(held, watch).previews(request)


def is_verified(model: Any, found: Any) -> bool:
    with as_received(model, lambda _: torch.bfloat16):
        mine = golden_logprobs(model, PROMPT, GOLDEN)
    canary = Canary((0,), len(GOLDEN), NOISE_FP32, lambda: mine)
    return canary.disagreement(float(mine.sum()), found.canary_logprob) is None


@pytest.mark.parametrize(
    ("sent", "device_has", "held_in"),
    [("bf16", "bf16", "bf16"), ("bf16", "fp32", "fp32"), ("fp32", "bf16", "fp32")],
)
def test_auto_is_bf16_for_bf16_weights_where_the_device_computes_in_it(
    sent: str, device_has: str, held_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_model, "computes_in_bf16", lambda device: device_has == "bf16")
    held, model = hold(), trained()
    held.load_weights(file_of(model, tmp_path / "x", held_model.DTYPES[sent]), ID)
    wanted = held_model.DTYPES[held_in]
    assert held.dtype_name == held_in
    assert {value.dtype for value in canonical_tensors(held.base).values()} == {wanted}
    kept = {buffer.dtype for buffer in held.base.buffers() if buffer.is_floating_point()}
    assert kept <= {torch.float32}, "rotations are computed in fp32"
    for name, value in canonical_tensors(held.base).items():
        rounded = canonical_tensors(model)[name].to(held_model.DTYPES[sent])
        assert torch.equal(value.float(), rounded.float())


def test_a_server_goes_back_to_its_own_weights_and_their_dtype(tmp_path: Path) -> None:
    held = hold()
    own = held.original_id
    before = {name: value.clone() for name, value in canonical_tensors(held.base).items()}
    held.load_weights(file_of(trained(), tmp_path / "x", torch.bfloat16), ID)
    assert own is not None
    held.load_weights(None, own)
    assert held.dtype_name == "fp32"
    for name, value in canonical_tensors(held.base).items():
        assert torch.equal(value, before[name])


def test_going_back_loads_no_second_model_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold()
    held.load_weights(file_of(trained(), tmp_path / "x", torch.float32), ID)
    held.device = torch.device("meta")  # stands for a GPU: nothing may be made there
    devices: list[Any] = []
    load, place = held_model.load_model, held_model.place
    monkeypatch.setattr(
        held_model, "load_model", lambda *a, **k: (devices.append(k["device"]), load(*a, **k))[1]
    )
    monkeypatch.setattr(
        held_model, "place", lambda model, device: (devices.append(device), place(model, device))[1]
    )
    assert held.original_id is not None
    held.load_weights(None, held.original_id)
    assert devices == [torch.device("cpu")]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_bf16_answers_have_a_canary_that_agrees_with_the_trainers_in_fp32(
    kind: str, tmp_path: Path
) -> None:
    held, model = hold("bf16"), trained()
    held.load_weights(file_of(model, tmp_path / "x", torch.bfloat16), BASE)
    weights_id = BASE
    if kind == "adapter":
        model, weights_id = _with_adapter(model, ADAPTER).eval(), ID
        torch.manual_seed(3)
        with torch.no_grad():
            for value in adapter_tensors(model).values():
                value.copy_(torch.randn_like(value))
        sent = {n: value.detach().bfloat16() for n, value in adapter_tensors(model).items()}
        save_file(sent, tmp_path / "adapter")
        held.load_weights(str(tmp_path / "adapter"), ID, adapter=ADAPTER, base_id=BASE)
    seen: list[torch.dtype] = []
    gate = held.base.model.layers[1].mlp.gate_proj
    gate.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    found = previews(held, weights_id)
    assert seen[0] == torch.bfloat16, "the answers"
    assert seen[-1] == torch.float32, "the canary"
    assert is_verified(model, found)
    assert held.base.dtype == torch.bfloat16, "nothing is left of the canary"


def test_a_canary_beside_bf16_answers_tells_one_step_apart(tmp_path: Path) -> None:
    held, model = hold("bf16"), trained()
    held.load_weights(file_of(model, tmp_path / "x", torch.bfloat16), ID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.tensor([PROMPT + GOLDEN])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not is_verified(model, previews(held, ID))


def test_mutant_canary_in_the_dtype_of_the_answers_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, model = hold("bf16"), trained()
    held.load_weights(file_of(model, tmp_path / "x", torch.bfloat16), ID)
    monkeypatch.setattr(inference, "as_received", lambda *_: contextlib.nullcontext())
    assert not is_verified(model, previews(held, ID))


def test_bf16_where_the_gpu_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_model, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(held_model, "computes_in_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match="--dtype bf16: Tesla T4 has no bf16 arithmetic"):
        hold("bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_one_model_in_bf16_and_its_canary_agrees_with_a_cpu(tmp_path: Path) -> None:
    model = trained()
    held = HeldModel("tiny", "cuda", wait_for_weights=False, dtype="bf16")
    size = sum(value.numel() * 2 for value in canonical_tensors(held.base).values())
    path = file_of(model, tmp_path / "x", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held.load_weights(path, ID)
    assert held.original_id is not None
    held.load_weights(None, held.original_id)
    held.load_weights(path, ID)
    assert torch.cuda.max_memory_allocated() - before < size // 2, "no second model"
    assert {value.device.type for value in canonical_tensors(held.base).values()} == {"cuda"}
    assert is_verified(model, previews(held, ID))
