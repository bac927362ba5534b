"""Rows of plain text: every token trained, end-of-text behind, no template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import DataSection
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder, prompt_border
from trainer.data.rows import IGNORE_INDEX, TEXT_ROLE, BadRowError
from trainer.errors import ConfigError, DataError
from trainer.profiles import Message, get_profile

FOX = "the quick brown fox jumps over the lazy dog"


def row(text: str) -> list[Message]:
    return [Message(role=TEXT_ROLE, content=text)]


def prepared(path: Path, tokenizer: Any, profile: str = "plain", **options: Any) -> RunData:
    section = {"validation_split": 0.0, "cache": False, **options.pop("data", {})}
    return prepare_data(
        DataSection(dataset_path=str(path), **section),
        profile=get_profile(profile),
        encoder=RowEncoder(tokenizer, options.pop("max_length", 128)),
        system_prompt=options.get("system_prompt"),
        is_prompt_configured="system_prompt" in options,
        seed=1,
        num_preview=2,
    )


def test_every_token_but_the_first_is_trained_and_end_of_text_stands_behind(
    tokenizer: Any,
) -> None:
    example = RowEncoder(tokenizer, 128).encode(row(FOX))
    expected = [*tokenizer(FOX, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert example.input_ids == expected
    assert example.labels == [IGNORE_INDEX, *expected[1:]]
    assert example.ends_with_stop


def test_a_tokenizer_that_writes_bos_and_eos_itself_writes_them_once(
    make_tokenizer: Callable[..., Any],
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    specials = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=specials
    )
    ids = RowEncoder(tokenizer, 128).encode(row(FOX)).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert [ids.count(index) for _, index in specials] == [1, 1]
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text", [FOX, "a b", "one", "\u4f60\u597d\u4e16\u754c" * 9, "\U0001f600" * 5]
)
def test_the_prompt_is_a_beginning_of_the_row_and_the_golden_answer_its_rest(
    tokenizer: Any, text: str
) -> None:
    example = RowEncoder(tokenizer, 256).encode(row(text))
    assert example.prompt + example.golden_answer == text
    assert len(example.prompt) <= max(len(text) / 2 + 1, 2)
    assert tokenizer.decode(example.prompt_ids) == example.prompt
    assert 1 <= example.prompt_length < len(example.input_ids)


def test_the_prompt_ends_between_words_and_is_bounded(tokenizer: Any) -> None:
    assert RowEncoder(tokenizer, 128).encode(row(FOX)).prompt.strip() == "the quick brown fox"
    long = RowEncoder(tokenizer, 2048).encode(row(f"{FOX} " * 40))
    assert 200 < len(long.prompt) <= 300


def test_borders_do_not_fall_into_a_character() -> None:
    # Two characters of three tokens each, as byte-level tokenizers make them.
    offsets = [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2)]
    assert prompt_border("\u4f60\u597d", offsets) == (3, 1)


@pytest.mark.parametrize(
    ("how", "kept"), [("keep_start", slice(0, 16)), ("keep_end", slice(-16, None))]
)
def test_a_long_text_is_cut_like_any_row(tokenizer: Any, how: str, kept: slice) -> None:
    text = f"{FOX} " * 9
    whole = RowEncoder(tokenizer, 512).encode(row(text))
    example = RowEncoder(tokenizer, 16, truncation=how).encode(row(text))
    assert example.input_ids == whole.input_ids[kept]
    assert example.num_removed == len(whole.input_ids) - 16
    assert example.prompt_ids == example.input_ids[: example.prompt_length]
    assert tokenizer.decode(example.prompt_ids) == example.prompt
    for refused in ("drop", "error"):
        with pytest.raises(BadRowError):
            RowEncoder(tokenizer, 16, truncation=refused).encode(row(text))


def test_rows_with_the_key_text_are_found_and_said_on_the_card(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    path = write_rows([{"text": FOX, "id": 1}, {"text": "the dog"}])
    card = prepared(path, tokenizer).card
    assert card.format == "text"
    assert card.template == "every token of plain text and its end-of-text token"
    assert card.num_trained_tokens == card.num_tokens - 2
    assert prepared(path, tokenizer, data={"format": "text"}).card.format == "text"


def test_text_and_turns_may_stand_in_two_files(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    one = write_rows([{"text": FOX}])
    two = write_rows([{"question": "q", "answer": "a"}], "two.jsonl")
    data = prepared(Path(f"{one},{two}"), tokenizer)
    assert data.card.format == "text, question_answer"
    assert (
        "generation markers of the model's own chat template; every token of plain text"
        in data.card.template
    )
    assert data.train[0]["labels"][1:].min() >= 0
    assert data.train[1]["labels"].min() == IGNORE_INDEX


BAD = {
    "empty": ('{"text": "  "}', "the text is empty"),
    "type": ('{"text": 3}', "'text' is int; it must be str"),
    "none": ('{"text": null}', "'text' is NoneType"),
    "NUL": (r'{"text": "a\u0000b"}', "NUL"),
    "surrogate": (r'{"text": "\ud800"}', "surrogate"),
    "control": ('{"text": "a <|im_end|> b"}', "control token"),
    "turns": ('{"question": "q", "answer": "a"}', "of format 'question_answer'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_text_is_named_with_its_line(
    write_rows: Callable[..., Path], tokenizer: Any, case: str
) -> None:
    line, reason = BAD[case]
    path = write_rows([{"text": FOX}, line])
    with pytest.raises(DataError, match=reason) as caught:
        prepared(path, tokenizer)
    assert f"{path}:2: " in str(caught.value)


def test_options_for_turns_are_refused(write_rows: Callable[..., Path], tokenizer: Any) -> None:
    path = write_rows([{"text": FOX}])
    with pytest.raises(ConfigError, match="or is plain text, which has none"):
        prepared(path, tokenizer, system_prompt="Be brief.")
    with pytest.raises(
        ConfigError, match=r"'regime3' rewrites turns, and in .* 1 row is plain text"
    ):
        prepared(path, tokenizer, profile="regime3")


def test_without_an_end_of_text_token_the_row_is_refused(tokenizer: Any) -> None:
    encoder = RowEncoder(tokenizer, 64)
    encoder.tokenizer.eos_token, before = None, encoder.tokenizer.eos_token
    try:
        with pytest.raises(BadRowError, match="no end-of-text token"):
            encoder.encode(row(FOX))
    finally:
        encoder.tokenizer.eos_token = before
