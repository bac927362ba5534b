"""Runs whose weights are bf16 alone, and runs with 8-bit moments: resumed, published, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.integration.test_resume_exact import check_same_state, resumed
from trainer.core import TrainerEngine
from trainer.models.precision import keep_vectors_wide

MASTERS = {"masters": "bf16_stochastic", "fp_precision": "bf16"}
MODES = {
    "bf16 weights": MASTERS,
    "bf16 weights, 8 bit": {**MASTERS, "optimizer": "adamw_8bit"},
    "8 bit": {"optimizer": "adamw_8bit"},
}


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A model whose matrices are large enough for 8-bit moments, with dropout."""
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    make_model(vocab_size=len(tokenizer), attention_dropout=0.1, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=() if m == "bf16 weights, 8 bit" else pytest.mark.long) for m in MODES],
)
def test_n16_holds_for_each_mode_with_previews_and_evaluation_between(
    train: Callable[..., Any], mode: str
) -> None:
    hyper = {"max_steps": 7, "gradient_accumulation": 2, "warmup_steps": 3, **MODES[mode]}
    asked = {"inference_interval": 2, "preview_temperature": 0.8}
    straight, again = resumed(train, 3, hyperparams=hyper, monitoring=asked)
    check_same_state(straight.checkpoint_path, again.checkpoint_path)
    [kept] = straight.checkpoint_path.glob("*model.safetensors")
    [final] = straight.model_path.glob("*model.safetensors")
    weights, saved = load_file(kept), load_file(final)
    for name, value in weights.items():
        is_wide = "norm" in name or mode == "8 bit"
        assert value.dtype == (torch.float32 if is_wide else torch.bfloat16), name
        assert torch.equal(value.to(saved[name].dtype), saved[name])
    assert {one.dtype for one in saved.values()} == {
        torch.float32 if mode == "8 bit" else torch.bfloat16
    }
    AutoModelForCausalLM.from_pretrained(straight.checkpoint_path)  # a model by itself


@pytest.mark.slow
def test_a_sidecar_verifies_weights_that_are_kept_in_bf16(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    hyper = {**MASTERS, "optimizer": "adamw_8bit", "max_steps": 4}
    asked = {"preview_backend": "sidecar", "inference_interval": 2, "preview_drain_timeout": 120}
    result = train("sidecar", hyperparams=hyper, monitoring=asked)
    assert result.success, result.error_message
    lines = (tmp_path / "sidecar" / "previews.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if not row["is_superseded"]]
    assert {row["step"] for row in rows} >= {0, 4}
    assert {row["weights"] for row in rows} == {"verified"}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),
}


def family(name: str, vocab_size: int) -> Any:
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=512)
        )
    kind, more = FAMILIES[name]
    config = getattr(transformers, kind)(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.long), *FAMILIES])
def test_every_family_computes_with_bf16_matrices_and_fp32_norms(
    train: Callable[..., Any], tmp_path: Path, tokenizer: Any, name: str
) -> None:
    folder = tmp_path / name
    family(name, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hyper = {**MASTERS, "max_steps": 2}
    result = train(name, model_path=str(folder), hyperparams=hyper)
    assert result.success, result.error_message
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    losses = [one for one in map(json.loads, lines) if one["type"] == "StepDone"]
    assert len(losses) == 2


def test_only_norms_and_vectors_are_kept_wide(make_model: Callable[..., Any]) -> None:
    model = make_model().bfloat16()
    keep_vectors_wide(model)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if "norm" in name}
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied


def test_empty_precision_becomes_bf16_and_the_reason_says_what_is_kept(
    job: Callable[..., Any],
) -> None:
    hyper = {"masters": "bf16_stochastic", "fp_precision": None, "max_steps": 1}
    found = TrainerEngine().dry_run(job(hyperparams=hyper))
    assert found.precision.master_dtype == found.precision.load_dtype == torch.bfloat16
    assert "updates are rounded stochastically" in found.precision.reason
    memory = found.memory
    assert memory.weights == memory.gradients == 2 * memory.num_parameters
    assert memory.optimizer == 8 * memory.num_parameters
