"""Answers are found in what a template makes of a row, whatever texts and tokenizers do."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError
from trainer.data.template import FIRST, marked, shared_start, without_marks

CORPUS = ["what is the weather in Oslo today? it rains [INST] [/INST] USER: ASSISTANT: "] * 20
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
    "{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def shipped(name: str) -> str:
    text: str = files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return text


def like_sentencepiece(scheme: str) -> Any:
    """BPE over spaces written as `_`, unknown letters as bytes."""
    rules = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    rules.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    rules.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def like_gpt2(*, trim: bool) -> Any:
    """Bytes; where `trim`, tokens of spaces only have no place in the text."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.normalizer = normalizers.NFC()
    rules.post_processor = processors.ByteLevel(trim_offsets=trim)
    rules.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "sentencepiece, first": lambda: like_sentencepiece("first"),
    "sentencepiece, always": lambda: like_sentencepiece("always"),
    "bytes": lambda: like_gpt2(trim=False),
    "bytes, trimmed": lambda: like_gpt2(trim=True),
}
ANSWERS = (
    "it rains",
    "\N{SNOWMAN} e\N{COMBINING ACUTE ACCENT}t\u00e9",
    "USER: ASSISTANT: [INST]",
    "  7",
)


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    text: str = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    return text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [LLAMA2, VICUNA])
def test_answers_are_found_by_every_kind_of_tokenizer(kind: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = template
    encoder = RowEncoder(tokenizer, 512)
    for answer in ANSWERS:
        row: list[Any] = [
            {"role": "user", "content": "what is ASSISTANT: it?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": answer},
            {"role": "assistant", "content": "it rains"},
        ]
        example = encoder.encode(row)
        whole = tokenizer.apply_chat_template(row)["input_ids"]
        assert example.input_ids == whole
        text = "".join(trained_text(tokenizer, example.labels).split())
        said = tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False))
        assert text == "".join(f"{said}</s>it rains</s>".split())


def test_a_turn_that_a_template_reads_to_its_end_is_found(
    make_tokenizer: Callable[..., Any],
) -> None:
    """Qwen3 takes a user's turn that begins and ends like a result for one."""
    tokenizer = make_tokenizer(shipped("qwen3"))
    row: list[Any] = [
        {"role": "user", "content": "well?"},
        {"role": "assistant", "content": "I look", "reasoning_content": "let me see"},
        {"role": "user", "content": "<tool_response>\nnone\n</tool_response>"},
        {"role": "assistant", "content": "none"},
    ]
    text = trained_text(tokenizer, RowEncoder(tokenizer, 512).encode(row).labels)
    assert text == "<think>\nlet me see\n</think>\n\nI look<|im_end|>none<|im_end|>"


def test_characters_used_as_marks_are_refused_in_rows(tokenizer: Any) -> None:
    row: list[Any] = [
        {"role": "user", "content": chr(FIRST)},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(BadRowError, match="private use"):
        RowEncoder(tokenizer, 64).encode(row)


def test_icons_for_private_use_are_text(tokenizer: Any) -> None:
    icon = chr(0xF0001)
    row: list[Any] = [{"role": "user", "content": icon}, {"role": "assistant", "content": icon}]
    example = RowEncoder(tokenizer, 64).encode(row)
    assert trained_text(tokenizer, example.labels) == f"{icon}<|im_end|>"


def test_marks_stand_behind_the_last_letter_and_come_out_again() -> None:
    row: list[Any] = [{"role": "user", "content": "a \n"}, {"role": "assistant", "content": "b"}]
    turns, marks = marked(row, only_answers=False)
    assert turns[0]["content"] == f"a{marks[0].content} \n"
    assert [without_marks(turn["content"]) for turn in turns] == ["a \n", "b"]
    assert marked(row, only_answers=True)[0][0] == row[0]


@pytest.mark.parametrize(("a", "b", "count"), [("", "x", 0), ("abc", "abd", 2), ("ab", "abc", 2)])
def test_the_shared_start_of_two_texts(a: str, b: str, count: int) -> None:
    assert shared_start(a, b) == shared_start(b, a) == count
