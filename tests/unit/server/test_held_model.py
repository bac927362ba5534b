"""Weights that cannot be loaded are refused while nothing has changed: the old ones answer on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer
from trainer.publish.identity import adapter_tensors, canonical_tensors, tensor_hash
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import AdapterConfig, ServerHashes
from trainer.server.held_model import HeldModel, UnanswerableError, _with_adapter
from trainer.server.problems import WeightsRefusedError
from trainer.server.weight_store import check_fit

GATE = "model.layers.0.mlp.gate_proj"
EMBEDDING = "model.embed_tokens"
ID = "a" * 64
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "use_rslora": True},
    "ranks": {"ranks": {GATE: 7}, "alphas": {GATE: 3.0}},
    "rows": {"trainable_tokens": {EMBEDDING: [300, 5]}},
}


@pytest.fixture
def held() -> HeldModel:
    return HeldModel("tiny", "cpu", wait_for_weights=False)


def adapter(targets: list[str], r: int = 4, **more: Any) -> AdapterConfig:
    values = {"r": r, "alpha": 8.0, "target_modules": targets, **more}
    return AdapterConfig.model_validate(values)


def state_of(held: HeldModel) -> tuple[Any, ...]:
    tensors = {name: tensor_hash(value) for name, value in canonical_tensors(held.model).items()}
    return held.weights_id, held.base_id, tensors


def adapter_file(path: Path, config: AdapterConfig) -> Path:
    """Adapters as a trainer writes them, from a model of its own."""
    model = build_tiny_model(seed=42, vocab_size=len(load_tiny_tokenizer()), dtype=torch.float32)
    torch.manual_seed(1)
    tensors = adapter_tensors(_with_adapter(model, config))
    save_file({name: torch.randn_like(value) for name, value in tensors.items()}, path)
    return path


def odd_file(path: Path, **shapes: tuple[int, ...]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        adapter([GATE]),
        adapter(["model.norm"]),
        adapter(["model.layers.0"]),
        adapter(["model.layers.0.input_layernorm"]),
        adapter(["nowhere"]),
        adapter([GATE], r=4096),
        adapter([GATE], modules_to_save=["nowhere"]),
        adapter(["model"]),
        adapter([GATE], trainable_tokens={EMBEDDING: [10**6]}),
        adapter([GATE], trainable_tokens={EMBEDDING: [5, 5]}),
        adapter([GATE], trainable_tokens={"model.norm": [5]}),
        adapter([GATE], trainable_tokens={"nowhere": [5]}),
        adapter([EMBEDDING], trainable_tokens={EMBEDDING: [5]}),
    ],
)
def test_an_adapter_that_is_none_of_this_model_is_refused_and_changes_nothing(
    held: HeldModel, tmp_path: Path, config: AdapterConfig
) -> None:
    before = state_of(held)
    path = odd_file(tmp_path / "x", x=(16,))
    with pytest.raises(UnanswerableError) as refused:
        held.load_weights(str(path), ID, adapter=config, base_id=held.base_id)
    assert refused.value.status == 422
    assert state_of(held) == before


def test_a_rank_that_the_file_does_not_have_allocates_nothing(
    held: HeldModel, tmp_path: Path
) -> None:
    import psutil

    held.load_weights(
        str(adapter_file(tmp_path / "a", adapter([GATE]))),
        ID,
        adapter=adapter([GATE]),
        base_id=held.base_id,
    )
    targets = [name for name, one in held.base.named_modules() if name.endswith("_proj")]
    before = psutil.Process().memory_info().rss
    path = odd_file(tmp_path / "x", x=(16,))
    wanted = adapter(sorted(targets), r=4096)
    for _ in range(3):
        with pytest.raises(UnanswerableError):
            held.load_weights(str(path), ID, adapter=wanted, base_id=held.base_id)
    assert psutil.Process().memory_info().rss - before < 20 << 20


@pytest.mark.parametrize("more", MORE)
def test_an_adapter_is_put_on_and_taken_off_again(
    held: HeldModel, tmp_path: Path, more: str
) -> None:
    before, base_id = state_of(held), held.base_id
    config = adapter([GATE, "model.layers.1.self_attn.q_proj"], **MORE[more])
    path = adapter_file(tmp_path / "a", config)
    held.load_weights(str(path), ID, adapter=config, base_id=base_id)
    assert held.weights_id == ID
    found = {name: tensor_hash(value) for name, value in adapter_tensors(held.model).items()}
    wanted = adapter_tensors(
        _with_adapter(
            build_tiny_model(seed=42, vocab_size=len(load_tiny_tokenizer()), dtype=torch.float32),
            config,
        )
    )
    assert set(found) == set(wanted)
    odd = odd_file(tmp_path / "x", x=(1,))
    with pytest.raises(UnanswerableError):
        held.load_weights(str(odd), "b" * 64, adapter=adapter(["lm_head"]), base_id=base_id)
    assert held.weights_id == ID, "the adapter that was there answers on"
    assert {n: tensor_hash(v) for n, v in adapter_tensors(held.model).items()} == found
    assert base_id is not None
    held.load_weights(None, base_id)
    assert state_of(held) == before


OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("dora", {"use_dora": False}, "lora_magnitude_vector.weight"),
    ("dora", {"r": 5}, "lora_A.weight"),
    ("ranks", {"ranks": {}}, f"{GATE}.lora_A.weight"),
    ("rows", {"trainable_tokens": {EMBEDDING: [300, 5, 6]}}, "trainable_tokens_delta"),
    ("rows", {"trainable_tokens": {}}, "trainable_tokens_delta"),
]


@pytest.mark.parametrize(("more", "changed", "bad"), OTHERWISE)
def test_an_offer_must_have_the_tensors_that_it_says(
    held: HeldModel, tmp_path: Path, more: str, changed: dict[str, Any], bad: str
) -> None:
    config = adapter([GATE], **MORE[more])
    path = adapter_file(tmp_path / "a", config)
    hashes = ServerHashes.model_validate(held.manifest.model_dump())
    check_fit(WeightFile(path, hashes, ID, config).manifest(), held.manifest)
    said = config.model_copy(update=changed)
    with pytest.raises(WeightsRefusedError) as refused:
        check_fit(WeightFile(path, hashes, ID, said).manifest(), held.manifest)
    assert any(bad in name for name in refused.value.bad)


@pytest.mark.parametrize("shapes", [{"x": (3,)}, {}])
def test_a_full_set_of_other_tensors_is_refused_and_changes_nothing(
    held: HeldModel, tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    before = state_of(held)
    tensors = {name: value.clone() for name, value in canonical_tensors(held.base).items()}
    if shapes:
        tensors[next(iter(tensors))] = torch.zeros(3)
    else:
        tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "x")
    with pytest.raises(UnanswerableError):
        held.load_weights(str(tmp_path / "x"), ID)
    (tmp_path / "y").write_bytes(b"no safetensors at all")
    with pytest.raises(UnanswerableError):
        held.load_weights(str(tmp_path / "y"), ID)
    assert state_of(held) == before
