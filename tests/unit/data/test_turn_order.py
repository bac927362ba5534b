"""Greetings and later system turns: used as the template takes them, and said where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.collected import collected
from tests.trust.oracle import FAMILIES
from tests.trust.test_shipped_templates import tokenizer_with
from trainer.data.encode import RowEncoder
from trainer.data.row_files import to_rows
from trainer.data.rows import IGNORE_INDEX, BadRowError, Example, RowErrors

GREETED: dict[str, Any] = {
    "conversations": [
        {"from": "gpt", "value": "hello traveller"},
        {"from": "human", "value": "where am I?"},
        {"from": "gpt", "value": "in the old mill"},
    ]
}


def encode(tokenizer: Any, row: dict[str, Any]) -> Example:
    errors = RowErrors("strict")
    [found], _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    return RowEncoder(tokenizer, 512).encode(found.messages)


def trained(tokenizer: Any, example: Example) -> str:
    text: str = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    return text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_greeting_is_never_trained_and_refuses_no_row(family: Any) -> None:
    tokenizer = family.tokenizer()
    example = encode(tokenizer, GREETED)
    said = trained(tokenizer, example)
    assert "in the old mill" in said
    assert "traveller" not in said
    is_read = "hello traveller" in tokenizer.decode(example.prompt_ids)
    assert is_read != ("hello traveller" in example.stripped)


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen2_5", "phi3"])
def test_a_greeting_is_left_out_only_where_the_template_refuses_it(name: str) -> None:
    tokenizer = tokenizer_with(name)
    example = encode(tokenizer, GREETED)
    assert ("hello traveller" in example.stripped) == (name == "gemma3")
    assert trained(tokenizer, example).startswith("in the old mill")


def late_system(role: str = "system") -> dict[str, Any]:
    talk = [("user", "one"), ("assistant", "two"), (role, "now rhyme"), ("user", "three")]
    turns = [{"role": name, "content": text} for name, text in [*talk, ("assistant", "four")]]
    return {"messages": turns}


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "phi3"])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_later_system_turn_is_read_where_the_template_writes_it(name: str, role: str) -> None:
    tokenizer = tokenizer_with(name)
    example = encode(tokenizer, late_system(role))
    assert "now rhyme" in tokenizer.decode(example.input_ids)
    assert "rhyme" not in trained(tokenizer, example)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "qwen3_5_nothink"])
def test_a_later_system_turn_that_the_template_refuses_or_loses_is_a_bad_row(name: str) -> None:
    with pytest.raises(BadRowError, match=r"refuses these turns|does not write there"):
        encode(tokenizer_with(name), late_system())


LOSES_LATE_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m['role'] != 'system' -%}"
    "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def test_a_template_that_drops_a_later_system_turn_makes_a_bad_row(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(LOSES_LATE_SYSTEM)
    with pytest.raises(BadRowError, match=r"messages\[2\] is a system turn, which the model's"):
        encode(tokenizer, late_system())
    first = late_system()["messages"]
    row = {"messages": [first[2], *first[:2], *first[3:]]}
    assert "now rhyme" in tokenizer.decode(encode(tokenizer, row).input_ids)
