"""N9 and N10 over TRL's templates and conversations of agents: trained exactly, or truly refused.

What is right is said by `formats.py`, which shares no code with the program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.trust import formats
from trainer.data import rendered, spans, template
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError, Example
from trainer.data.tools import Dialect
from trainer.data.turns import assistant_turns

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


@cache
def encoder_of(name: str) -> RowEncoder:
    return RowEncoder(formats.tokenizer_with(name), 4096)


def encoded(name: str, shape: str, form: str = "object") -> Example | str:
    """The example, or the words of the refusal."""
    [found] = encoder_of(name).encode_all([formats.spelled(formats.SHAPES[shape], form)])
    return str(found) if isinstance(found, BadRowError) else found


def trained_text(tokenizer: Any, example: Example) -> str:
    text: str = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    return text


def check_shape(name: str, shape: str) -> None:
    """Trained ids are those that the family's format says, and the prompt is their beginning."""
    encoder, example = encoder_of(name), encoded(name, shape)
    assert isinstance(example, Example), example
    if shape == "two in a row" and name in formats.IN_A_ROW:
        assert trained_text(encoder.tokenizer, example) == formats.IN_A_ROW[name]
        return
    form = "text" if name.startswith("deepseek") else "object"
    expected = formats.expected_trained(
        encoder.tokenizer,
        name,
        formats.spelled(formats.SHAPES[shape], form),
        thinking=shape in formats.THINKING,
    )
    trained = [label if label != IGNORE_INDEX else None for label in example.labels]
    assert trained == expected, trained_text(encoder.tokenizer, example)
    first = next(index for index, token in enumerate(expected) if token is not None)
    assert example.prompt_ids == example.input_ids[:first]


@pytest.mark.parametrize("name", formats.NAMES)
def test_n9_an_agents_turns_are_trained_exactly_or_refused_for_a_true_reason(name: str) -> None:
    for shape in formats.SHAPES:
        refusal = formats.refusal_of(name, shape)
        if refusal is None:
            check_shape(name, shape)
        else:
            with pytest.raises(BadRowError, match=refusal):
                encoder_of(name).encode(formats.SHAPES[shape])


def test_no_shipped_template_is_refused_as_a_whole() -> None:
    for name in formats.NAMES:
        assert isinstance(encoded(name, "many"), Example), name


def refusals_in_the_docs() -> list[list[str]]:
    """Rows of the table of refusals in docs/data.md, each its three cells."""
    text = DOCS.read_text(encoding="utf-8").split("## Chat templates\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]


def test_the_docs_list_what_is_refused_with_the_templates_own_lines() -> None:
    listed = set()
    for names, _, line in refusals_in_the_docs():
        for name in re.findall("`([^`]+)`", names):
            listed.add(name)
            for quoted in re.findall("`([^`]+)`", line):
                source = formats.source_of(name).replace("'", '"')
                assert (quoted.replace("'", '"') in source) != ("none of its lines" in line), name
    assert listed == {
        name
        for name in formats.NAMES
        if any(formats.refusal_of(name, shape) for shape in formats.SHAPES)
    }


def check_spellings(name: str, shape: str) -> None:
    """Arguments as an object and as JSON text become the same tokens, of which none is escaped."""
    as_object, as_text = encoded(name, shape), encoded(name, shape, "text")
    assert as_object == as_text
    if isinstance(as_object, Example):
        text = encoder_of(name).tokenizer.decode(as_object.input_ids)
        assert text.count("Oslo") == (2 if "Oslo?" in text else 1)
        assert '\\"' not in text
        assert "'city':" not in text


@pytest.mark.parametrize("name", formats.NAMES)
def test_both_spellings_of_arguments_become_the_same_tokens(name: str) -> None:
    for shape in ("agent", "parallel", "words", "ends with a call"):
        check_spellings(name, shape)


def test_templates_whose_prompt_opens_a_thought_take_rows_without_one() -> None:
    for name in ("deepseek_r1_distill", "deepseekv3"):
        encoder, example = encoder_of(name), encoded(name, "many")
        assert isinstance(example, Example)
        assert example.is_opened
        assert encoder.template.opening == "<think>\n"
        prompt = encoder.tokenizer.decode(example.prompt_ids)
        assert prompt.endswith(f"hi<{formats.BAR}Assistant{formats.BAR}>")
        assert example.golden_ids[-1] in encoder.template.stop_ids


def test_a_token_inside_an_answer_does_not_stop_generation() -> None:
    """gpt-oss ends a thought and an earlier answer with <|end|>, which no preview may stop at."""
    encoder = encoder_of("gptoss")
    names = encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.template.stop_ids))
    assert set(names) == {"<|return|>", "<|call|>", "</s>"}


def test_thoughts_of_earlier_turns_that_the_template_drops_are_named() -> None:
    example = encoded("qwen3", "thoughts")
    assert isinstance(example, Example)
    assert example.stripped == ("five and seven",)
    assert example.num_thoughts == 1


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("qwen3", "sixteen<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|>sixteen<|return|>"),
        ("glm4moe", "sixteen"),
        ("qwen2_5", "sixteen<|im_end|>"),
        ("muse_glimmer", " to=user<|message|>sixteen<|eot|>"),
    ],
)
def test_thoughts_are_left_out_of_what_is_trained_where_the_user_says_so(
    name: str, left: str
) -> None:
    check_untrained_thoughts(name, left)


def check_untrained_thoughts(name: str, left: str) -> None:
    """The ids are the same, and what is trained of the last turn is what follows its thought."""
    tokenizer, row = formats.tokenizer_with(name), formats.THINKING["thoughts"]
    example = RowEncoder(tokenizer, 4096, train_on_thinking=False).encode(row)
    whole = encoded(name, "thoughts")
    assert isinstance(whole, Example)
    assert example.input_ids == whole.input_ids
    text = trained_text(tokenizer, example)
    assert text.endswith(left)
    assert "nine and seven" not in text
    assert "five and seven" not in text
    assert "think>" not in text.removeprefix("\n<think></think>\n")


def test_markers_of_plain_text_leave_no_token_of_a_call_untrained() -> None:
    for name in ("qwen3", "qwen3_5_think", "qwen3_8", "nemotron_3_nano"):
        check_plain_markers(name)


def check_plain_markers(name: str) -> None:
    tokenizer = formats.tokenizer_with(name, is_plain=True)
    encoder = RowEncoder(tokenizer, 4096)
    for shape in ("agent", "sequence", "words"):
        row = formats.SHAPES[shape]
        expected = formats.expected_trained(tokenizer, name, row)
        labels = encoder.encode(row).labels
        assert [i if i != IGNORE_INDEX else None for i in labels] == expected


def is_killed(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def test_mutant_n9_a_prompt_compared_by_letters_alone_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`<t` of `<tool_call>` is also the start of `<think>`, which the prompt goes on with."""
    check_plain_markers("qwen3")
    monkeypatch.setattr(spans, "_endings", lambda tail, own, other: [(tail, False)])
    check_plain_markers("qwen3")
    monkeypatch.setattr(spans, "_whole_markers", lambda a, b, length: length)
    assert is_killed(lambda: check_plain_markers("qwen3"))


def test_mutant_n9_a_turn_ended_by_its_first_end_token_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_shape("gptoss", "thought")
    monkeypatch.setattr(template.TurnMarks, "last", [])
    assert is_killed(lambda: check_shape("gptoss", "thought"))


def test_mutant_n9_an_opened_thought_taken_for_the_rows_own_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_shape("deepseekv3", "many")
    monkeypatch.setattr(spans, "_endings", lambda tail, own, other: [(tail, False)])
    assert is_killed(lambda: check_shape("deepseekv3", "many"))


def test_mutant_n9_turns_looked_for_by_the_prompts_length_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts hold what the row lost, so that they are longer than its own start."""
    check_shape("qwen3_5_think", "agent")

    def by_length(self: Any, nth: int) -> tuple[int, str]:
        turns = self.row[: assistant_turns(self.row)[nth]]
        plain = self.template.text(turns, ask=True, thinking=self.rendered.is_thinking)
        return max(len(plain) - 40, 0), plain[-40:]

    monkeypatch.setattr(spans._Search, "_anchor", by_length)
    assert is_killed(lambda: check_shape("qwen3_5_think", "agent"))


def test_mutant_arguments_always_as_text_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = template.find_dialect

    def as_text(*args: Any) -> Dialect:
        return dataclasses.replace(original(*args), arguments="text")

    monkeypatch.setattr(template, "find_dialect", as_text)
    encoder_of.cache_clear()
    assert is_killed(lambda: check_spellings("qwen2_5", "agent"))
    encoder_of.cache_clear()


def test_mutant_arguments_as_they_come_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_spellings("llama3_1", "agent")
    monkeypatch.setattr(rendered, "with_arguments", lambda row, form: row)
    assert is_killed(lambda: check_spellings("llama3_1", "agent"))


def test_mutant_thoughts_trained_against_the_option_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_untrained_thoughts("qwen3", "sixteen<|im_end|>")
    monkeypatch.setattr(spans._Search, "_thought", lambda self, turn, begin: None)
    assert is_killed(lambda: check_untrained_thoughts("qwen3", "sixteen<|im_end|>"))
