"""The data card says what is not trained, what counts differently and what is not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.card_text import MAX_KEYS_SHOWN, card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import DataError
from trainer.profiles import DataProfile, get_profile

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture
def prepare(write_rows: Callable[..., Path], tokenizer: Any) -> Callable[..., RunData]:
    def run(rows: list[Any], *, profile: DataProfile | None = None, **options: Any) -> RunData:
        return prepare_data(
            DataSection(
                dataset_path=str(write_rows(rows)),
                **{"validation_split": 0, "cache": False, **options},
            ),
            profile=profile or get_profile("plain"),
            encoder=RowEncoder(options.pop("tokenizer", tokenizer), 256),
            system_prompt="be brief",
            is_prompt_configured=False,
            seed=1,
            num_preview=3,
        )

    return run


ROWS: list[Any] = [
    {"messages": [U, {**A, "train": False}, U, {**A, "id": 1}], "source": "x"},
    {"messages": [U, {**A, "weight": 0.5}, U, A], "source": "y", "lang": "en"},
    {"messages": [{**A, "content": "hello"}, U, {**A, "content": 7}]},
]


def test_the_card_counts_untrained_turns_weights_greetings_numbers_and_unused_keys(
    prepare: Callable[..., RunData],
) -> None:
    card = prepare(ROWS).card
    assert (card.num_untrained_turns, card.num_weighted_turns, card.num_openings) == (2, 1, 1)
    assert (card.num_as_text, card.num_rendered) == (1, 0)
    assert card.unused_keys == {"source": 2, "lang": 1, "messages[].id": 1}
    lines = dict(card_lines(card))
    assert lines["untrained"] == "2 assistant turns are context only, no loss"
    assert lines["loss weights"].startswith("1 turn or text has")
    assert lines["openings"].startswith("1 row begins with an assistant turn")
    assert lines["unused keys"] == "source (2), lang (1), messages[].id (1)"
    assert lines["as text"].startswith("1 numbers, booleans or JSON values")


def test_many_odd_keys_make_one_line_that_fits(prepare: Callable[..., RunData]) -> None:
    odd = {f"key{n:03}": 1 for n in range(50)} | {"a\x1b[31m\nb": 2, "k" * 500: 3}
    line = dict(card_lines(prepare([{"question": "q", "answer": "a", **odd}]).card))["unused keys"]
    assert line.endswith(f" and {len(odd) - MAX_KEYS_SHOWN} more")
    assert line.isprintable()
    assert len(line) < 2000


def test_rows_without_any_of_it_have_none_of_these_lines(prepare: Callable[..., RunData]) -> None:
    labels = {label for label, _ in card_lines(prepare([{"messages": [U, A]}]).card)}
    odd = {"untrained", "loss weights", "openings", "rendered text", "as text", "unused keys"}
    assert not labels & odd


def test_rows_that_differ_in_flags_only_are_no_duplicates(prepare: Callable[..., RunData]) -> None:
    plain = {"messages": [U, A, U, A]}
    flagged = {"messages": [U, A, U, {**A, "loss": False}]}
    on = {"messages": [U, {**A, "loss": True}, {**U, "loss": 0}, A]}
    assert prepare([plain, flagged]).card.num_duplicates == 0
    assert prepare([plain, on]).card.num_duplicates == 1


def test_previews_ask_for_a_trained_answer(prepare: Callable[..., RunData]) -> None:
    data = prepare(ROWS[:1])
    [prompt] = data.preview_prompts
    text = data.encoder.tokenizer.decode(prompt.prompt_token_ids)
    assert text.count("<|im_start|>assistant") == 2
    assert data.encoder.tokenizer.decode(prompt.golden_token_ids) == "a<|im_end|>"


class Copying(DataProfile):
    """Changes the turns, and keeps what else they bring."""

    def transform(self, messages: list[Any], *, index: int, seed: int) -> list[Any]:
        return [{**turn, "content": turn["content"].upper()} for turn in messages]


class Forgetful(DataProfile):
    """Makes new turns of the words alone."""

    def transform(self, messages: list[Any], *, index: int, seed: int) -> list[Any]:
        return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def test_weights_survive_a_profile_or_the_row_is_refused(prepare: Callable[..., RunData]) -> None:
    data = prepare(ROWS, profile=Copying())
    assert data.card.num_untrained_turns == 2
    labels = data.train[0]["labels"]
    assert data.encoder.tokenizer.decode(labels[labels >= 0]) == "A<|im_end|>"
    prepare([{"messages": [U, A]}], profile=Forgetful())
    with pytest.raises(DataError, match="flags that say which turns are trained were lost"):
        prepare(ROWS[:1], profile=Forgetful())


def test_rows_that_differ_in_flags_or_begin_with_greetings_are_held_out_by_their_question(
    prepare: Callable[..., RunData],
) -> None:
    rows: list[Any] = []
    for n in range(20):
        ask = {"role": "user", "content": f"q{n}"}
        rows += [
            {"messages": [ask, A, U, A]},
            {"messages": [ask, {**A, "train": False}, U, A]},
            {"messages": [{**A, "content": f"hello {n % 3}"}, ask, A]},
        ]
    data = prepare(rows, validation_split=0.25)
    sides = [data.train, data.validation]
    texts = [
        {data.encoder.tokenizer.decode(side[i]["input_ids"]) for i in range(len(side))}
        for side in sides
        if side is not None
    ]
    asked = [{f"q{n}" for n in range(20) for text in side if f"\nq{n}<" in text} for side in texts]
    assert data.card.num_validation_rows == 15
    assert len(asked[0] | asked[1]) == 20
    flagged = [
        {q for q in asked[k] for t in texts[k] if f"\n{q}<" in t and "hello" not in t}
        for k in (0, 1)
    ]
    assert not flagged[0] & flagged[1]
