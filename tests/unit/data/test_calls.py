"""Arguments of calls, as an object or as JSON text, reach the template in the form it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.collected import collected
from trainer.data.encode import RowEncoder
from trainer.data.row_files import raw_rows, to_rows
from trainer.data.rows import IGNORE_INDEX, BadRowError, RowErrors
from trainer.data.tools import missing_arguments, parsed_arguments

ARGUMENTS = {
    "stadt": 'Köln \N{SNOWMAN} "alt" it\'s\n2',
    "a": {"z": [1, 1.0, 100000.0, -0.5, True, None], "empty": {}, "none": []},
    "big": 12345678901234567890,
    "blank": "",
}


def shipped(name: str) -> str:
    text: str = files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return text


def row_with(arguments: Any) -> list[Any]:
    call = {"type": "function", "function": {"name": "suche", "arguments": arguments}}
    return [
        {"role": "user", "content": "wo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    text: str = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    return text


SPELLINGS = (
    ARGUMENTS,
    json.dumps(ARGUMENTS),
    json.dumps(ARGUMENTS, ensure_ascii=False, indent=1),
    json.dumps(ARGUMENTS, separators=(",", ":")).replace("100000.0", "1e5"),
)


def check_kept(make_tokenizer: Callable[..., Any], name: str) -> None:
    """What is trained is the call with these very arguments, members in their order."""
    tokenizer = make_tokenizer(shipped(name))
    encoder = RowEncoder(tokenizer, 4096)
    for spelling in SPELLINGS:
        text = trained_text(tokenizer, encoder.encode(row_with(spelling)).labels)
        found = json.loads(text[text.index('{"stadt"') :].partition("}\n</tool_call>")[0])
        assert list(found.items()) == list(ARGUMENTS.items())
        assert json.dumps(found) == json.dumps(ARGUMENTS)  # 1 and 1.0 are equal, not the same


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_nothing_of_the_arguments_is_lost_or_changed(
    make_tokenizer: Callable[..., Any], name: str
) -> None:
    check_kept(make_tokenizer, name)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_template_that_takes_text_is_given_the_same_text(
    make_tokenizer: Callable[..., Any], spelling: Any
) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ':' + c.function.arguments }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    labels = RowEncoder(tokenizer, 4096).encode(row_with(spelling)).labels
    said = trained_text(tokenizer, labels)
    assert said == f"suche:{json.dumps(ARGUMENTS, ensure_ascii=False)}<|im_end|>"


@pytest.mark.parametrize("nothing", [None, "", " \n", "{}", {}])
def test_no_arguments_are_an_empty_object(make_tokenizer: Callable[..., Any], nothing: Any) -> None:
    tokenizer = make_tokenizer(shipped("qwen2_5"))
    labels = RowEncoder(tokenizer, 512).encode(row_with(nothing)).labels
    assert '{"name": "suche", "arguments": {}}' in trained_text(tokenizer, labels)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ('{"a": 1', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a": 1e999}', "too large a number"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[1, 2]", "a JSON list"),
        ('"Oslo"', "a JSON str"),
        (["Oslo"], "a JSON list"),
        (7, "a JSON int"),
    ],
)
def test_arguments_that_are_none_are_a_bad_row_that_names_the_field(
    tokenizer: Any, arguments: Any, why: str
) -> None:
    with pytest.raises(BadRowError, match=why) as error:
        RowEncoder(tokenizer, 512).encode(row_with(arguments))
    assert "turn 1 (assistant), tool_calls[0].function.arguments" in str(error.value)


def test_a_template_that_writes_arguments_in_no_form_is_named_with_the_field(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(BadRowError, match=r"tool_calls\[0\]\.function\.arguments: the model's"):
        RowEncoder(tokenizer, 512).encode(row_with({"city": "Oslo"}))


@pytest.mark.parametrize("as_text", [False, True])
def test_a_function_call_of_sharegpt_is_spelled_alike(
    make_tokenizer: Callable[..., Any], write_rows: Callable[..., Path], as_text: bool
) -> None:
    arguments = {"city": "Oslo", "n": 1.0}
    value = {"name": "suche", "arguments": json.dumps(arguments) if as_text else arguments}
    turns = [
        {"from": "human", "value": "wo?"},
        {"from": "function_call", "value": json.dumps(value)},
    ]
    path = write_rows([{"conversations": turns}])
    [row], _ = collected(to_rows(raw_rows(path), str(path), "auto", RowErrors("strict"), None))
    tokenizer = make_tokenizer(shipped("qwen2_5"))
    text = trained_text(tokenizer, RowEncoder(tokenizer, 512).encode(row.messages).labels)
    assert '"arguments": {"city": "Oslo", "n": 1.0}}' in text


def test_a_call_and_its_result_are_told_apart_where_they_say_the_same(
    make_tokenizer: Callable[..., Any],
) -> None:
    """The result repeats the call's own text, name and all."""
    tokenizer = make_tokenizer(shipped("qwen3"))
    call = '<tool_call>\n{"name": "suche", "arguments": {"a": "b"}}\n</tool_call>'
    row = [
        *row_with({"a": "b"}),
        {"role": "tool", "content": call, "name": "suche"},
        {"role": "assistant", "content": call},
        {"role": "user", "content": call},
        {"role": "assistant", "content": "suche"},
    ]
    text = trained_text(tokenizer, RowEncoder(tokenizer, 4096).encode(row).labels)
    assert text == f"{call}<|im_end|>{call}<|im_end|>suche<|im_end|>"


def check_missing() -> None:
    said = 'f(stadt="K\\u00f6ln")'
    assert missing_arguments({"stadt": "Köln"}, said) == []
    assert missing_arguments('{"stadt": {"x": ["Bonn"]}}', said) == ["x", "Bonn"]
    assert parsed_arguments('{"b": 1, "a": 2}', "here") == {"b": 1, "a": 2}


def test_arguments_that_a_turn_does_not_say_are_found() -> None:
    check_missing()
