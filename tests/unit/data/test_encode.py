"""Exactly the assistant's tokens and their end of turn are trained."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError, Example
from trainer.errors import TemplateError

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in pairs]


def trained_text(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def test_labels_of_a_hand_written_example(tokenizer: Any) -> None:
    example = RowEncoder(tokenizer, 64).encode(turns((SYSTEM, "a"), (USER, "b"), (ASSISTANT, "c")))
    text = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(text, add_special_tokens=False)
    letter, stop, newline = (
        tokenizer.encode(part, add_special_tokens=False)[0] for part in ("c", "<|im_end|>", "\n")
    )
    assert example.input_ids == [*prompt, letter, stop, newline]
    assert example.labels == [IGNORE_INDEX] * len(prompt) + [letter, stop] + [IGNORE_INDEX]


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer: Any) -> None:
    row = turns((USER, "one"), (ASSISTANT, "two"), (USER, "three"), (ASSISTANT, "four five"))
    example = RowEncoder(tokenizer, 128).encode(row)
    assert trained_text(tokenizer, example) == "two<|im_end|>four five<|im_end|>"


def test_preview_prompt_ids_are_the_prefix_of_the_training_ids(tokenizer: Any) -> None:
    row = turns((SYSTEM, "s"), (USER, "what is two?"), (ASSISTANT, "the fox"))
    example = RowEncoder(tokenizer, 128).encode(row)
    rendered = tokenizer.apply_chat_template(row[:2], add_generation_prompt=True)["input_ids"]
    assert example.prompt_ids == example.input_ids[: len(rendered)] == rendered


@pytest.fixture
def qwen3_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Qwen3's public chat template, which has no generation markers, as TRL ships it."""
    return make_tokenizer((files("trl") / "chat_templates" / "qwen3.jinja").read_text())


def test_an_empty_thought_that_the_template_inserts_counts_as_prompt(qwen3_tokenizer: Any) -> None:
    example = RowEncoder(qwen3_tokenizer, 128).encode(turns((USER, "hi"), (ASSISTANT, "the fox")))
    assert trained_text(qwen3_tokenizer, example) == "the fox<|im_end|>"
    assert qwen3_tokenizer.decode(example.prompt_ids).endswith("<think>\n\n</think>\n\n")


def test_the_ids_are_those_of_the_models_own_template_not_of_the_mask(qwen3_tokenizer: Any) -> None:
    # The training template thinks before every answer, the model's own one before the last only.
    row = turns((USER, "hi"), (ASSISTANT, "the fox"), (USER, "and?"), (ASSISTANT, "the dog"))
    example = RowEncoder(qwen3_tokenizer, 256).encode(row)
    assert example.input_ids == qwen3_tokenizer.apply_chat_template(row)["input_ids"]
    assert trained_text(qwen3_tokenizer, example) == "the fox<|im_end|>the dog<|im_end|>"


def test_a_stop_token_outside_the_markers_is_trained_too(
    make_tokenizer: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    example = RowEncoder(tokenizer, 64).encode(turns((USER, "a"), (ASSISTANT, "b")))
    assert trained_text(tokenizer, example) == "b<|im_end|>"
    assert example.ends_with_stop


def test_end_of_turn_is_known_when_end_of_text_is_another_token(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    encoder = RowEncoder(tokenizer, 64)
    assert encoder.template.stop_ids == {0, 2}
    assert encoder.encode(turns((USER, "a"), (ASSISTANT, "b"))).ends_with_stop


def test_truncation_is_reported_and_keeps_the_start(tokenizer: Any) -> None:
    row = turns((USER, "a"), (ASSISTANT, "b " * 50))
    full = RowEncoder(tokenizer, 512).encode(row)
    cut = RowEncoder(tokenizer, 32).encode(row)
    assert not full.is_truncated
    assert cut.is_truncated
    assert cut.input_ids == full.input_ids[:32]


def test_a_row_whose_answer_is_cut_away_is_refused(tokenizer: Any) -> None:
    with pytest.raises(BadRowError, match="max_length is 16"):
        RowEncoder(tokenizer, 16).encode(turns((USER, "b " * 50), (ASSISTANT, "c")))


def test_control_tokens_in_the_data_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadRowError, match="control token"):
        RowEncoder(tokenizer, 64).encode(turns((USER, "a<|im_end|>"), (ASSISTANT, "b")))


def test_a_template_that_asks_for_no_answer_is_an_error(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(TemplateError, match="generation"):
        RowEncoder(tokenizer, 64)


def test_a_tokenizer_without_a_template_is_an_error(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        RowEncoder(make_tokenizer(None), 64)


def test_one_row_that_the_template_refuses_does_not_spoil_its_neighbours(
    make_tokenizer: Callable[..., Any], tokenizer: Any
) -> None:
    check = "{% if 'fox' in m.content %}{{ raise_exception('no foxes') }}{% endif %}"
    loop = "{%- for message in messages -%}"
    template = tokenizer.chat_template.replace(loop, loop + check.replace("m.", "message."))
    rows = [turns((USER, word), (ASSISTANT, "b")) for word in ("dog", "fox", "cat")]
    results = RowEncoder(make_tokenizer(template), 64).encode_all(rows)
    assert [isinstance(result, BadRowError) for result in results] == [False, True, False]
    assert "no foxes" in str(results[1])


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row_with_call(city: str) -> list[Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "drizzle", "name": "weather"},
        {"role": "assistant", "content": "a drizzle"},
    ]


def test_tool_calls_are_trained_and_results_are_not(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(CALLS)
    example = RowEncoder(tokenizer, 256).encode(row_with_call("Oslo"))
    text = trained_text(tokenizer, example)
    assert text == 'CALL weather {"city": "Oslo"}<|im_end|>a drizzle<|im_end|>'


def test_a_template_that_drops_tool_calls_is_an_error_of_the_row(tokenizer: Any) -> None:
    with pytest.raises(BadRowError, match="calls 'weather', which"):
        RowEncoder(tokenizer, 256).encode(row_with_call("Oslo"))


def test_control_tokens_in_tool_calls_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(BadRowError, match="control token"):
        RowEncoder(make_tokenizer(CALLS), 256).encode(row_with_call("<|im_end|>"))


def test_a_rows_tools_reach_the_template_and_are_not_trained(
    make_tokenizer: Callable[..., Any],
) -> None:
    """By the template that TRL ships for Qwen3, beside a row without tools."""
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    weather = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    plain = row_with_call("Oslo")
    row = [{**plain[0], "tools": [weather]}, *plain[1:]]
    [with_tools, without] = RowEncoder(tokenizer, 2048).encode_all([row, plain])
    assert isinstance(with_tools, Example)
    assert isinstance(without, Example)
    text = tokenizer.decode(with_tools.input_ids)
    assert '"name": "weather", "parameters": {}' in text.replace("\n", "")
    assert '"parameters"' not in tokenizer.decode(without.input_ids)
    assert trained_text(tokenizer, with_tools) == trained_text(tokenizer, without)
    assert tokenizer.decode(with_tools.prompt_ids).startswith("<|im_start|>system\n# Tools")


def test_a_template_that_leaves_a_rows_tools_out_is_an_error_of_the_row(tokenizer: Any) -> None:
    row: list[Any] = turns((USER, "rain?"), (ASSISTANT, "yes"))
    row[0]["tools"] = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(BadRowError, match="defines the tools 'weather', which"):
        RowEncoder(tokenizer, 256).encode(row)
