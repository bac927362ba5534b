"""Rows of `text` that hold the template's own markers are read back into turns, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trust.oracle import FAMILIES
from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rendered import TemplateReader
from trainer.errors import ConfigError, DataError
from trainer.profiles import get_profile

TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
ONE = TURNS.format("the quick", "brown fox")


def prepared(path: Path, tokenizer: Any, *, profile: str = "plain", **data: Any) -> RunData:
    return prepare_data(
        DataSection(dataset_path=str(path), **{"validation_split": 0, "cache": False, **data}),
        profile=get_profile(profile),
        encoder=RowEncoder(tokenizer, 256),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=2,
    )


def trained(data: RunData, index: int = 0) -> str:
    labels = data.train[index]["labels"]
    text: str = data.encoder.tokenizer.decode(labels[labels >= 0])
    return text


SPELLINGS = {
    "as the template writes it": ONE,
    "without the last line end": ONE.rstrip(),
    "without the last stop": ONE.rstrip().removesuffix("<|im_end|>"),
    "with an end-of-text behind it": f"{ONE}<|endoftext|>\n",
    "with other white space": ONE.replace("<|im_end|>\n", "<|im_end|>"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_text_with_the_templates_markers_is_trained_as_its_conversation(
    write_rows: Callable[..., Path], tokenizer: Any, case: str
) -> None:
    data = prepared(write_rows([{"text": SPELLINGS[case]}]), tokenizer)
    assert trained(data) == "brown fox<|im_end|>"
    assert data.train_texts == (("the quick", "brown fox"),)
    assert data.card.num_rendered == 1
    assert dict(card_lines(data.card))["rendered text"].startswith("1 text ")


def test_turns_from_text_are_turns_in_every_way(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    path = write_rows(
        [{"text": ONE + TURNS.format("jumps", "over"), "weight": 0.5}, {"text": "fox"}]
    )
    data = prepared(path, tokenizer)
    assert trained(data) == "brown fox<|im_end|>over<|im_end|>"
    assert data.card.num_weighted_turns == 2
    assert trained(data, 1).endswith("<|im_end|>")  # plain text stays plain text
    with pytest.raises(ConfigError, match="1 row is plain text"):
        prepared(path, tokenizer, profile="regime3")
    wrapped = prepared(write_rows([{"text": ONE}]), tokenizer, profile="regime3")
    assert trained(wrapped) == "<<ANS_START>> brown fox <<ANS_END>><|im_end|>"


BAD = {
    "a marker in words": "the fox <|im_end|> jumps",
    "words before the first turn": f"Intro {ONE}",
    "an unknown speaker": ONE.replace("user", "robot"),
    "a marker left over": ONE.replace("brown", "<|im_start|> brown"),
    "no answer": ONE.partition("brown")[0],
    "a user alone": ONE.partition("<|im_start|>assistant")[0],
}


@pytest.mark.parametrize("case", BAD)
def test_text_that_cannot_be_read_back_is_a_bad_row(
    write_rows: Callable[..., Path], tokenizer: Any, case: str
) -> None:
    path = write_rows([{"text": ONE}, {"text": BAD[case]}])
    with pytest.raises(DataError, match=r"control token|no assistant turn|is empty") as caught:
        prepared(path, tokenizer)
    assert f"{path}:2: " in str(caught.value)


def test_tokens_are_trained_where_the_option_says_so(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    path = write_rows([{"text": ONE}, {"text": "fox <|im_end|> dog"}])
    data = prepared(path, tokenizer, text_markers="tokens")
    ids = tokenizer(ONE.rstrip())["input_ids"]
    assert data.train[0]["input_ids"].tolist() == ids  # its own stop is the end of the text
    assert data.train[0]["labels"].tolist()[1:] == ids[1:]
    assert data.card.num_rendered == 0
    with pytest.raises(ConfigError, match="no row of format 'text' holds a control token"):
        prepared(write_rows([{"text": "fox"}]), tokenizer, text_markers="tokens")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("letters", ["ua", "sua", "uauaua"])
def test_each_family_is_read_back_as_it_was_written(family: Any, letters: str) -> None:
    tokenizer = family.tokenizer()
    encoder = RowEncoder(tokenizer, 512)
    names = {"s": "system", "u": "user", "a": "assistant"}
    row: list[Any] = [
        {"role": names[letter], "content": f"word {letter}{n}, 12"}
        for n, letter in enumerate(letters)
    ]
    text = tokenizer.apply_chat_template(row, tokenize=False, enable_thinking=False)
    found = encoder.encode(TemplateReader(encoder).read(text, "x"))
    wanted = encoder.encode(row)
    assert (found.input_ids, found.labels) == (wanted.input_ids, wanted.labels)
