"""N9, N10, N13: what is trained is what the assistant says and its end of turn, nothing else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data import encode, spans
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, Example


def _load_oracle() -> Any:
    path = Path(__file__).with_name("oracle.py")
    spec = importlib.util.spec_from_file_location("trust_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trust_oracle"] = module
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()
BY_NAME = {family.name: family for family in oracle.FAMILIES}
CASES = [
    (family.name, shape)
    for family in oracle.FAMILIES
    for shape in oracle.SHAPES
    if shape != "tools" or family.takes_tools
]


def encoded(name: str, shape: str) -> tuple[Any, Any, list[Any], Example]:
    family = BY_NAME[name]
    tokenizer = family.tokenizer()
    row = oracle.SHAPES[shape]
    return family, tokenizer, row, RowEncoder(tokenizer, 2048).encode(row)


def check_mask(name: str, shape: str) -> None:
    """Trained ids are those that the oracle finds in the rendered text."""
    family, tokenizer, row, example = encoded(name, shape)
    expected = oracle.expected_trained(family, tokenizer, row)
    trained = [label if label != IGNORE_INDEX else None for label in example.labels]
    assert trained == expected, (
        tokenizer.decode([i for i in trained if i is not None]),
        tokenizer.decode([i for i in expected if i is not None]),
    )


def check_prompt(name: str, shape: str) -> None:
    """The prompt that a preview continues is the beginning of the row, with one BOS at most."""
    _, tokenizer, row, example = encoded(name, shape)
    first = next(index for index, turn in enumerate(row) if turn["role"] == "assistant")
    prompt = tokenizer.apply_chat_template(
        row[:first], add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    assert example.prompt_ids == example.input_ids[: len(example.prompt_ids)]
    assert prompt[: len(example.prompt_ids)] == example.prompt_ids
    if tokenizer.bos_token_id is not None and not name.startswith(("llama2", "zephyr", "vicuna")):
        assert example.input_ids[:2].count(tokenizer.bos_token_id) == 1


def check_characters(name: str, shape: str) -> None:
    """Every word of the messages is in the row's text or listed as stripped."""
    _, tokenizer, row, example = encoded(name, shape)
    text = tokenizer.decode(example.input_ids) + "\n".join(example.stripped)
    for turn in row:
        for word in turn["content"].split():
            assert word in text, f"{word!r} is neither in the row nor reported"


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_n9_the_answer_and_its_stop_are_trained_and_nothing_else(name: str, shape: str) -> None:
    check_mask(name, shape)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_n10_the_prompt_is_the_beginning_of_the_row_with_one_bos(name: str, shape: str) -> None:
    check_prompt(name, shape)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_n13_every_word_is_in_the_row_or_reported(name: str, shape: str) -> None:
    check_characters(name, shape)


def is_killed(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def test_mutant_n9_header_included_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = spans.SpanFinder.find

    def wider(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        return spans.Spans([(b - 1, e) for b, e in found.ranges], found.stripped)

    monkeypatch.setattr(spans.SpanFinder, "find", wider)
    for name in ("chatml", "llama3", "vicuna"):
        assert is_killed(lambda name=name: check_mask(name, "one"))  # type: ignore[misc]


def test_mutant_n9_last_turn_only_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = spans.SpanFinder.find

    def last(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        return spans.Spans(found.ranges[-1:], found.stripped)

    monkeypatch.setattr(spans.SpanFinder, "find", last)
    assert is_killed(lambda: check_mask("chatml", "many"))


def test_mutant_n9_stop_left_out_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = spans.SpanFinder.find

    def shorter(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        return spans.Spans([(b, e - 1) for b, e in found.ranges], found.stripped)

    monkeypatch.setattr(spans.SpanFinder, "find", shorter)
    for name in ("chatml", "gemma", "zephyr"):
        assert is_killed(lambda name=name: check_mask(name, "one"))  # type: ignore[misc]


def test_mutant_n10_special_tokens_added_to_a_rendered_row_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = encode.RowEncoder._example

    def twice(self: Any, row: Any, ids: list[int], found: Any) -> Any:
        moved = [(b + 1, e + 1) for b, e in found.ranges]
        return original(
            self, row, [self.tokenizer.bos_token_id, *ids], spans.Spans(moved, found.stripped)
        )

    monkeypatch.setattr(encode.RowEncoder, "_example", twice)
    assert is_killed(lambda: check_prompt("llama3", "one"))


def test_mutant_n13_stripped_thought_not_reported_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = spans.SpanFinder.find

    def silent(self: Any, *args: Any) -> Any:
        return spans.Spans(original(self, *args).ranges, ())

    monkeypatch.setattr(spans.SpanFinder, "find", silent)
    assert is_killed(lambda: check_characters("deepseek", "think"))
