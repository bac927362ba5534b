"""The built-in model and tokenizer: deterministic, small, exact on any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer, tiny_config

TOKENIZER = load_tiny_tokenizer()
TURNS = [
    {"role": "system", "content": "Answer in canonical form."},
    {"role": "user", "content": "max of 42 and 17?"},
    {"role": "assistant", "content": "<<ANS_START>> (max 42 17) = 42 <<ANS_END>>"},
]


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return build_tiny_model(seed=seed, vocab_size=len(TOKENIZER), dtype=dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_model_has_about_0_83_million_parameters_tied() -> None:
    model = build()
    assert 820_000 < sum(p.numel() for p in model.parameters()) < 840_000
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(build(seed=7))
    torch.manual_seed(2)
    torch.rand(3)
    assert_same(first, weights(build(seed=7)))
    other = build(seed=8).lm_head.weight
    assert not torch.equal(first["lm_head.weight"], other)


def test_building_leaves_the_global_random_state_untouched() -> None:
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    build(seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert repr(numpy_before) == repr(np.random.get_state(legacy=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gets_the_same_draw(dtype: torch.dtype) -> None:
    model, reference = build(dtype=dtype), build()
    assert model.dtype == dtype == model.config.dtype
    assert_same(weights(model), weights(reference.to(dtype)))


def test_config_and_generation_config_stop_and_pad_as_the_tokenizer_does() -> None:
    model = build()
    for config in (tiny_config(), model.config, model.generation_config):
        assert TOKENIZER.convert_ids_to_tokens(config.eos_token_id) == "<|im_end|>"
        assert TOKENIZER.convert_ids_to_tokens(config.pad_token_id) == "<|endoftext|>"
        assert config.bos_token_id is None
    assert tiny_config().vocab_size == len(TOKENIZER)
    assert tiny_config().architectures == ["Qwen3ForCausalLM"]


@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", [" a .b , 's n't  \n\t ", "<<ANS_START>> 1<|im_end|>x <<ANS_END>>"]
)
def test_spaces_punctuation_and_added_tokens_come_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_all_256_bytes_have_a_token() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= TOKENIZER.get_vocab().keys()


def test_digits_stand_apart_and_the_answer_markers_are_one_token_each() -> None:
    pieces = TOKENIZER.tokenize("<<ANS_START>>1042<<ANS_END>>")
    assert pieces == ["<<ANS_START>>", "1", "0", "4", "2", "<<ANS_END>>"]


def test_the_answer_markers_survive_skipping_of_special_tokens() -> None:
    ids = TOKENIZER.encode("<|im_start|><<ANS_START>> 4 <<ANS_END>><|im_end|><|endoftext|>")
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert text == "<<ANS_START>> 4 <<ANS_END>>"


def test_the_mask_covers_the_answer_and_its_stop_and_nothing_else() -> None:
    row = TOKENIZER.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    pairs = list(zip(row["input_ids"], row["assistant_masks"], strict=True))
    assert TOKENIZER.decode([i for i, m in pairs if m]) == TURNS[2]["content"] + "<|im_end|>"
    assert TOKENIZER.decode(row["input_ids"]) == "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TURNS
    )


def test_the_generation_prompt_is_a_prefix_of_the_row() -> None:
    row = TOKENIZER.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    prompt = TOKENIZER.apply_chat_template(TURNS[:2], return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert row[: len(prompt)] == prompt
    assert TOKENIZER.decode(prompt).endswith("<|im_start|>assistant\n")


def test_a_saved_folder_loads_with_plain_transformers(tmp_path: Path) -> None:
    model = build(seed=5)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = TOKENIZER.apply_chat_template(TURNS, tokenize=False)
    assert loaded.apply_chat_template(TURNS, tokenize=False) == text
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(model))


def test_in_bf16_the_weights_are_bf16_and_positions_are_rotated_in_fp32() -> None:
    found = [
        build_tiny_model(seed=1, vocab_size=310, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert {value.dtype for value in found[1].parameters()} == {torch.bfloat16}
    for plain, rounded in zip(found[0].buffers(), found[1].buffers(), strict=True):
        assert torch.equal(plain, rounded)
        assert rounded.dtype == torch.float32
