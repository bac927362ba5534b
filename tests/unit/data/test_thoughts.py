"""Thoughts go where the template puts them, are trained or not, and are never lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError
from trainer.errors import ConfigError, DataError
from trainer.profiles import get_profile


def shipped(name: str) -> str:
    text: str = files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return text


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    text: str = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    return text


THINKS: list[Any] = [
    {"role": "user", "content": "a sum"},
    {"role": "assistant", "content": "twelve", "reasoning_content": "five and seven"},
]
THINKS_INSIDE: list[Any] = [
    THINKS[0],
    {"role": "assistant", "content": "<think>\nfive and seven\n</think>\n\ntwelve"},
]


@pytest.fixture
def prepare(write_rows: Callable[..., Path]) -> Callable[..., Any]:
    def prepared(tokenizer: Any, rows: list[Any], *, trained: bool = True) -> Any:
        path = write_rows([{"messages": row} for row in rows])
        return prepare_data(
            DataSection(
                dataset_path=str(path), validation_split=0, cache=False, train_on_thinking=trained
            ),
            profile=get_profile("plain"),
            encoder=RowEncoder(tokenizer, 512, train_on_thinking=trained),
            system_prompt=None,
            is_prompt_configured=False,
            seed=1,
            num_preview=1,
        )

    return prepared


def lines_of(data: Any) -> dict[str, str]:
    return dict(card_lines(data.card))


def test_a_template_without_a_place_for_thoughts_has_them_in_the_answer(
    tokenizer: Any, prepare: Callable[..., Any]
) -> None:
    encoder = RowEncoder(tokenizer, 512)
    assert encoder.encode(THINKS).input_ids == encoder.encode(THINKS_INSIDE).input_ids
    words = lines_of(prepare(tokenizer, [THINKS]))["thoughts"]
    assert words.startswith("1 answer has one: trained; written as <think>...</think>")


@pytest.mark.parametrize("row", [THINKS, THINKS_INSIDE])
@pytest.mark.parametrize("name", [None, "qwen3", "qwen3_5_think"])
def test_an_untrained_thought_is_read_and_belongs_to_the_prompt(
    make_tokenizer: Callable[..., Any], prepare: Callable[..., Any], row: Any, name: str | None
) -> None:
    tokenizer = make_tokenizer(shipped(name)) if name else make_tokenizer()
    whole, cut = (RowEncoder(tokenizer, 512, train_on_thinking=is_on) for is_on in (True, False))
    assert whole.encode(row).input_ids == cut.encode(row).input_ids
    assert "five and seven" in trained_text(tokenizer, whole.encode(row).labels)
    assert trained_text(tokenizer, cut.encode(row).labels) == "twelve<|im_end|>"
    assert tokenizer.decode(cut.encode(row).prompt_ids).endswith("five and seven\n</think>\n\n")
    assert "context only, no loss" in lines_of(prepare(tokenizer, [row], trained=False))["thoughts"]


def test_leaving_thoughts_untrained_where_there_are_none_is_an_error(
    tokenizer: Any, prepare: Callable[..., Any]
) -> None:
    row = [THINKS[0], {"role": "assistant", "content": "twelve"}]
    with pytest.raises(ConfigError, match=r"data\.train_on_thinking=false, but no row"):
        prepare(tokenizer, [row], trained=False)


def test_a_thought_that_the_template_would_lose_is_a_bad_row(
    make_tokenizer: Callable[..., Any], prepare: Callable[..., Any]
) -> None:
    with pytest.raises(DataError, match="has a thought, which the model's chat template does not"):
        prepare(make_tokenizer(shipped("deepseekv3")), [THINKS])


def test_thoughts_of_earlier_turns_are_named_on_the_card(
    make_tokenizer: Callable[..., Any], prepare: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(shipped("qwen3"))
    later = [{**THINKS[1], "content": "done", "reasoning_content": "a last thought"}]
    lines = lines_of(prepare(tokenizer, [[*THINKS, THINKS[0], *later]]))
    assert "leaves out text of 1 row, such as 'five and seven'" in lines["stripped"]
    assert lines["thoughts"] == "1 answer has one: trained"


def test_the_card_says_what_a_server_will_add_to_the_prompt(
    make_tokenizer: Callable[..., Any], prepare: Callable[..., Any]
) -> None:
    row = [THINKS[0], {"role": "assistant", "content": "twelve"}]
    tokenizer = make_tokenizer(shipped("deepseek_r1_distill"))
    data = prepare(tokenizer, [row, row])
    assert "ends prompts with '<think>\\n', which a server will add" in lines_of(data)["prompt"]
    assert "2 rows" in lines_of(data)["prompt"]
    [prompt] = data.preview_prompts
    [ids] = [data.train[0]["input_ids"].tolist()]
    assert list(prompt.prompt_token_ids) == ids[: len(prompt.prompt_token_ids)]
    assert "prompt" not in lines_of(prepare(make_tokenizer(shipped("qwen3")), [row]))


def test_a_control_token_in_a_thought_is_refused(tokenizer: Any) -> None:
    row = [THINKS[0], {**THINKS[1], "reasoning_content": "five <|im_end|>"}]
    with pytest.raises(BadRowError, match="control token"):
        RowEncoder(tokenizer, 512).encode(row)


def test_a_turn_of_two_marked_parts_is_one_answer(make_tokenizer: Callable[..., Any]) -> None:
    """Thought, words and call of one turn, and its neighbours, in one row."""
    tokenizer = make_tokenizer(shipped("qwen3"))
    function = {"name": "add", "arguments": {"a": 5}}
    row = [
        THINKS[0],
        {**THINKS[1], "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "12", "name": "add"},
        {"role": "assistant", "content": "so be it", "reasoning_content": "it says 12"},
    ]
    text = trained_text(tokenizer, RowEncoder(tokenizer, 512).encode(row).labels)
    assert text == (
        "<think>\nfive and seven\n</think>\n\ntwelve\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 5}}\n</tool_call><|im_end|>'
        "<think>\nit says 12\n</think>\n\nso be it<|im_end|>"
    )


def test_a_preview_of_a_template_that_takes_parts_begins_like_its_rows(
    make_tokenizer: Callable[..., Any],
) -> None:
    from tests.trust.reference import llama
    from trainer.preview.local import LocalPreviewBackend

    tokenizer = make_tokenizer(shipped("smolvlm"))
    example = RowEncoder(tokenizer, 512).encode([THINKS[0], {**THINKS[1], "content": "x"}])
    backend = LocalPreviewBackend(model=llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    assert backend.render("a sum") == example.prompt_ids
    assert "a sum" in tokenizer.decode(example.prompt_ids)
