"""Rows of plain text: every token trained, end-of-text behind, no template."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.plain_text import prompt_border
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


# ---- data.truncation=split


def windows_of(tokenizer: Any, text: str, max_length: int) -> list[Any]:
    example = RowEncoder(tokenizer, max_length, truncation="split").encode(row(text))
    return [example, *example.rest]


@pytest.mark.parametrize("max_length", [8, 9, 64])
@pytest.mark.parametrize("count", [*range(1, 30), 63, 64, 65, 127, 128, 500])
def test_windows_of_a_text_lose_no_token_and_train_each_once(
    tokenizer: Any, count: int, max_length: int
) -> None:
    text = " ".join(f"{n}" for n in range(count))
    [whole] = windows_of(tokenizer, text, 10_000)
    windows = windows_of(tokenizer, text, max_length)
    assert all(len(one.input_ids) <= max_length for one in windows)
    ids = [*windows[0].input_ids, *(i for one in windows[1:] for i in one.input_ids[1:])]
    assert ids == whole.input_ids
    trained = [label for one in windows for label in one.labels if label != IGNORE_INDEX]
    assert trained == [label for label in whole.labels if label != IGNORE_INDEX]
    for before, after in pairwise(windows):
        assert len(before.input_ids) == max_length
        assert after.input_ids[0] == before.input_ids[-1]
    assert all(one.labels[0] == IGNORE_INDEX for one in windows)
    assert not any(one.is_truncated or one.num_removed for one in windows)


def test_a_preview_of_a_window_continues_its_own_beginning(tokenizer: Any) -> None:
    text = " ".join(f"{FOX} {n}" for n in range(20))
    for window in windows_of(tokenizer, text, 32):
        assert window.prompt in text
        assert window.prompt.strip() == tokenizer.decode(window.prompt_ids).strip()
        assert 1 <= window.prompt_length < len(window.input_ids)
        assert window.golden_answer.strip() in text


def texts(write_rows: Callable[..., Path], count: int = 40) -> Path:
    rows = [{"text": " ".join(f"{FOX} {n}" for _ in range(n % 7 + 1))} for n in range(count)]
    return write_rows([*rows, rows[3]])


def test_all_windows_of_a_text_are_on_one_side_and_rows_are_counted(
    tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"truncation": "split", "validation_split": 0.2, "cache": False}
    path = texts(write_rows)

    def data_of(max_length: int) -> RunData:
        encoder = RowEncoder(tokenizer, max_length, truncation="split")
        section = DataSection(dataset_path=str(path), **options)
        return prepare_data(section, encoder=encoder, seed=1, num_preview=50)

    split, whole = data_of(24), data_of(4096)
    assert (whole.card.num_split, whole.card.num_windows) == (0, 0)
    names = ("num_rows", "num_train_rows", "num_validation_rows", "num_duplicates")
    for name in (*names, "num_trained_tokens", "num_cut_tokens", "num_truncated"):
        assert getattr(split.card, name) == getattr(whole.card, name), name
    assert split.card.num_duplicates == 1
    assert len(split.train) > len(whole.train)
    assert split.validation is not None
    assert whole.validation is not None

    def documents(dataset: Any) -> list[list[int]]:
        """Windows end to end, cut where a text has ended."""
        found: list[list[int]] = [[]]
        for index in range(len(dataset)):
            ids = dataset[index]["input_ids"].tolist()
            found[-1] += ids[1:] if found[-1] else ids
            if ids[-1] == tokenizer.eos_token_id:
                found.append([])
        assert not found.pop()
        return found

    assert documents(split.validation) == documents(whole.validation)
    assert documents(split.train) == documents(whole.train)
    assert [one.prompt_id for one in split.preview_prompts] == [
        one.prompt_id for one in whole.preview_prompts
    ]
    told = dict(card_lines(split.card))["too long"]
    assert told.startswith(f"{split.card.num_split} texts cut into {split.card.num_windows}")
    sizes = [len(windows_of(tokenizer, one["text"], 24)) for one in map(json.loads, path.open())]
    assert split.card.num_windows == sum(size for size in sizes if size > 1)
    assert split.card.num_split == sum(size > 1 for size in sizes)


def test_a_weight_takes_whole_texts(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    path = texts(write_rows)
    encoder = RowEncoder(tokenizer, 24, truncation="split")
    section = {"truncation": "split", "validation_split": 0.0, "cache": False}
    for weight, ends in ((0.5, 20), (1.5, 61)):
        options = DataSection(dataset_path=str(path), weights=(weight,), **section)
        data = prepare_data(options, encoder=encoder, seed=1)
        rows = [data.train[index]["input_ids"].tolist() for index in range(len(data.train))]
        assert sum(ids[-1] == tokenizer.eos_token_id for ids in rows) == ends
        assert data.card.num_train_rows == ends


def test_split_refuses_conversations_that_it_would_part(
    tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    encoder = RowEncoder(tokenizer, 24, truncation="split")
    options: dict[str, Any] = {"truncation": "split", "validation_split": 0.0, "cache": False}
    talk = write_rows(
        [{"question": f"{n}?", "answer": FOX * (n // 2 + 1)} for n in range(4)], "t.jsonl"
    )
    with pytest.raises(ConfigError, match=r"truncation=split cuts plain text, and every row of"):
        prepare_data(DataSection(dataset_path=str(talk), **options), encoder=encoder)
    both = DataSection(dataset_path=f"{talk},{texts(write_rows)}", **options)
    with pytest.raises(DataError, match=r"split cuts plain text only, .*raise max_length") as told:
        prepare_data(both, encoder=encoder)
    assert "data.truncation=drop" in str(told.value)
