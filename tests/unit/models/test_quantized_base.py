"""A base in 4 bit: its size, its gradients, its tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.training_sections import LoraSection, ModelSection
from trainer.models import is_quantization_state
from trainer.models.adapters import add_lora
from trainer.models.load import load_model
from trainer.models.quantized import quantized_layers
from trainer.preview.neutral import as_received
from trainer.publish.identity import base_tensors, canonical_tensors

pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).reshape(2, 12) % 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def quantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(ModelSection(model_path=str(folder)), dtype=dtype, quantize=True)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = add_lora(quantized(folder, dtype), LoraSection(r=4), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_a_pass_without_gradients_leaves_those_of_training_as_they_were(folder: Path) -> None:
    model = adapted(folder)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_linear_weights_take_0_516_bytes_each(folder: Path) -> None:
    model = quantized(folder)
    state = canonical_tensors(model)
    names = [f"{name}.weight" for name, _ in quantized_layers(model)]
    assert len(names) == 2 * 7
    count = sum(layer.in_features * layer.out_features for _, layer in quantized_layers(model))
    # A map of 16 numbers and one of 256 a matrix, and a short text, do not grow with it.
    held = sum(
        state[key].numel() * state[key].element_size()
        for name in names
        for key in (name, f"{name}.absmax", f"{name}.nested_absmax")
    )
    assert held / count == pytest.approx(0.516, rel=0.01)


def test_the_base_travels_with_what_says_how_it_is_quantized(folder: Path) -> None:
    names = set(base_tensors(adapted(folder)))
    assert names == set(canonical_tensors(quantized(folder)))
    assert sum(map(is_quantization_state, names)) == 5 * 2 * 7


def test_the_canary_computes_the_quantized_layers_in_fp32_and_puts_their_dtype_back(
    folder: Path,
) -> None:
    model, wide = adapted(folder, torch.bfloat16), adapted(folder, torch.bfloat16)
    for parameter in wide.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for _, layer in quantized_layers(wide):
        layer.compute_dtype = torch.float32
    with torch.no_grad(), as_received(model.eval(), lambda tensor: tensor.dtype):
        found = model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        wanted = wide.eval()(input_ids=IDS, use_cache=False).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {torch.bfloat16}
