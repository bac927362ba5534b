"""N32: a row that is rendered once has the ids and labels that it has by marks of its own."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import pytest

from tests.trust import formats, test_masks
from trainer.data import shapes
from trainer.data.encode import RowEncoder
from trainer.data.rows import BadRowError, Example
from trainer.models.tiny import load_tiny_tokenizer

OWN = [f"own/{family.name}" for family in test_masks.oracle.FAMILIES]
SHIPPED = [f"trl/{name}" for name in formats.NAMES]
FEW = [*OWN, "trl/qwen3", "trl/llama3_1", "trl/gemma4", "trl/gptoss", "trl/deepseekv3", "trl/lfm2"]
LENGTHS = [("keep_start", 2048), ("keep_start", 40), ("keep_end", 40), ("drop", 60), ("error", 60)]
WORDS = (
    *("a", "twelve eggs", "user", "assistant:", "42", "\N{SNOWMAN} é 中文", "x\ny", "a\n\nb"),
    *("/no_think", "<b>", "</b> <|x|>", "[INST", "{'a': 1}", "\u00a0z", "e\u0301"),
    *("<tool_call>", "system", "."),
)  # fmt: skip


@cache
def encoders_of(name: str, truncation: str, length: int, thinking: bool) -> tuple[Any, Any]:
    """Two encoders with one template: as it is, and with every row rendered by marks of its own."""
    kind, _, rest = name.partition("/")
    tokenizer = (
        test_masks.BY_NAME[rest].tokenizer() if kind == "own" else formats.tokenizer_with(rest)
    )
    options = {"truncation": truncation, "train_on_thinking": thinking}
    one, other = (RowEncoder(tokenizer, length, **options) for _ in range(2))
    other.shapes._sought = None
    return one, other


def words(draw: random.Random) -> str:
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))
    if draw.random() < 0.1:
        text = f"{draw.choice(['', ' ', chr(10)])}{text}{draw.choice(['', ' ', chr(10)])}"
    return text


def conversation(draw: random.Random) -> list[Any]:
    """A row as files have them, most of them plain, some of them anything."""
    odd = draw.random() < 0.3
    row: list[Any] = []
    if draw.random() < 0.3:
        row.append({"role": "system", "content": words(draw)})
    if odd and draw.random() < 0.2:
        row.append({"role": "assistant", "content": words(draw), "weight": 0.0})
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4, 6))):
        row.append({"role": "user", "content": words(draw)})
        answer: dict[str, Any] = {"role": "assistant", "content": words(draw)}
        if draw.random() < 0.1:
            answer["reasoning_content"] = words(draw)
        if draw.random() < 0.1:
            answer["weight"] = draw.choice((0.0, 0.5, 2.0))
        if odd and draw.random() < 0.2:
            answer["content"] = f"<think>\n{words(draw)}\n</think>\n\n{answer['content']}"
        if odd and draw.random() < 0.2:
            row += [{**answer, "tool_calls": [formats.WEATHER]}, formats.result("7", "weather")]
        row.append(answer)
        if odd and draw.random() < 0.2:
            row.append({"role": "tool", "content": words(draw)})
            row.append({"role": "assistant", "content": words(draw)})
    if draw.random() < 0.1:
        row[0] = {**row[0], "tools": formats.TOOLS}
    return row


def outcome(result: Example | BadRowError) -> Any:
    if isinstance(result, BadRowError):
        return type(result), str(result), result.reason
    return dataclasses.replace(result, is_by_shape=False), result.golden_answer


def compare(names: list[str], count: int, seed: int) -> float:
    """Encode random rows both ways; the share of usable ones that went by their shape."""
    draw = random.Random(seed)
    usable = by_shape = 0
    for number in range(0, count, 20):
        name = names[(number // 20) % len(names)]
        truncation, length = draw.choice((LENGTHS[0], draw.choice(LENGTHS)))
        one, other = encoders_of(name, truncation, length, draw.random() < 0.8)
        rows = [conversation(draw) for _ in range(20)]
        for row, fast, full in zip(rows, one.encode_all(rows), other.encode_all(rows), strict=True):
            assert outcome(fast) == outcome(full), (name, row)
            usable += isinstance(fast, Example)
            by_shape += isinstance(fast, Example) and fast.is_by_shape
    return by_shape / usable


def test_n32_random_rows_are_the_same_both_ways() -> None:
    assert compare(FEW, 400, seed=1) > 0.5


@pytest.mark.long
def test_n32_ten_thousand_random_rows_are_the_same_both_ways() -> None:
    assert compare([*OWN, *SHIPPED], 10_000, seed=2) > 0.5


def is_killed(seed: int = 1) -> bool:
    encoders_of.cache_clear()
    try:
        return compare(FEW, 400, seed) <= 0.5
    except AssertionError:
        return True
    finally:
        encoders_of.cache_clear()


def test_mutant_n32_the_text_not_compared_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Anything(str):
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    original = shapes.Shape.fill

    def unseen(self: Any, row: Any) -> Any:
        found = original(self, row)
        return found and (Anything(found[0]), *found[1:])

    monkeypatch.setattr(shapes.Shape, "fill", unseen)
    assert is_killed()


def test_mutant_n32_a_mark_one_character_late_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = shapes.Shape.fill

    def late(self: Any, row: Any) -> Any:
        found = original(self, row)
        return found and (
            found[0],
            {k: [v + 1 for v in places] for k, places in found[1].items()},
            found[2],
        )

    monkeypatch.setattr(shapes.Shape, "fill", late)
    assert is_killed()  # no row goes by its shape: the first of each is rendered both ways
    monkeypatch.setattr(shapes, "_is_same", lambda one, other: True)
    assert is_killed()


def test_mutant_n32_space_left_out_of_prompts_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = shapes.Shape.fill
    monkeypatch.setattr(
        shapes.Shape, "fill", lambda self, row: (f := original(self, row)) and (*f[:2], {})
    )
    assert is_killed()


SECRET = """\
{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if '/no_think' in messages[-1]['content'] %}{{ '<|quiet|>' }}{% endif -%}
{%- endif -%}
"""


def secret_outcome() -> Any:
    """A row whose words change its prompt, and not its text."""
    tokenizer = load_tiny_tokenizer()
    tokenizer.chat_template = SECRET
    rows = [
        [{"role": "user", "content": f"go {more}"}, {"role": "assistant", "content": "went"}]
        for more in ("on", "/no_think")
    ]
    return [outcome(one) for one in RowEncoder(tokenizer, 99).encode_all(rows)]  # type: ignore[arg-type]


def test_words_that_a_template_looks_for_are_looked_for_in_rows_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, wrong = secret_outcome()
    assert isinstance(right[0], Example)
    assert "not a prefix of the whole row" in wrong[1]
    monkeypatch.setattr(shapes.Sought, "is_plain", lambda self, row: True)
    assert isinstance(secret_outcome()[1][0], Example), "the check above proves nothing"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(family.name, marks=() if number % 4 == 0 else pytest.mark.long)
        for number, family in enumerate(test_masks.oracle.FAMILIES)
    ],
)
def test_n9_holds_for_rows_that_went_by_their_shape(name: str) -> None:
    *_, example = test_masks.encoded(name, "many")
    assert example.is_by_shape
    test_masks.check_mask(name, "many")
