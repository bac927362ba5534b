"""A prompt goes to one side with all its answers, and what is shown as held out is held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data import preparer
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.profiles import get_profile

Rows = list[dict[str, Any]]


def several_answers(prompts: int, answers: int) -> Rows:
    return [
        {"question": f"question {n}?", "answer": f"answer {n} style {style}"}
        for n in range(prompts)
        for style in range(answers)
    ]


def conversations(prompts: int) -> Rows:
    """Rows with a system turn, one prompt and several ways on."""
    return [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"question {n}?"},
                {"role": "assistant", "content": f"a{way}"},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "no"},
            ]
        }
        for n in range(prompts)
        for way in range(3)
    ]


def spaced(prompts: int) -> Rows:
    """The same prompts in two spellings, of which the profile or the template makes one."""
    rows = [{"question": f"question {n}?", "answer": "a"} for n in range(prompts)]
    return rows + [{"question": f" question  {n}? ", "answer": "b"} for n in range(prompts)]


@pytest.fixture
def prepare(tokenizer: Any, write_rows: Callable[..., Path]) -> Callable[..., RunData]:
    def run(rows: Rows, **section: Any) -> RunData:
        system = section.pop("system_prompt", None)
        count = section.pop("num_preview", 50)
        seed = section.pop("seed", 1)
        path = write_rows(rows, "rows.jsonl")
        return prepare_data(
            DataSection(
                dataset_path=str(path), **{"cache": False, "validation_split": 0.1, **section}
            ),
            profile=get_profile("plain"),
            encoder=RowEncoder(tokenizer, 128),
            system_prompt=system,
            is_prompt_configured=False,
            seed=seed,
            num_preview=count,
        )

    return run


def prompts_of(part: Any, tokenizer: Any) -> set[str]:
    """The prompts of a side: what stands before the first trained token, spacing apart."""
    found = set()
    for index in range(len(part)):
        ids, labels = (part[index][key].tolist() for key in ("input_ids", "labels"))
        first = next(place for place, label in enumerate(labels) if label != -100)
        found.add("".join(tokenizer.decode(ids[:first]).split()))
    return found


FILES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "five answers each": (several_answers(20, 5), {}),
    "two answers each, and the same share": (several_answers(50, 2), {"validation_split": 0.3}),
    "conversations with one beginning": (conversations(30), {}),
    "two spellings of a prompt": (spaced(40), {}),
    "the run's system turn, in the row or not": (
        [
            *({"question": f"q{n}", "answer": "a", "system": "Be terse."} for n in range(40)),
            *({"question": f"q{n}", "answer": "b"} for n in range(40)),
        ],
        {"system_prompt": "Be terse.", "format": "alpaca"},
    ),
}


def check_sides(prepare: Callable[..., RunData], tokenizer: Any, case: str) -> None:
    """No prompt is on both sides, and every prompt that is called held out is held out."""
    rows, section = FILES[case]
    if section.get("format") == "alpaca":
        names = {"question": "instruction", "answer": "output"}
        rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    data = prepare(rows, **section)
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == len(rows)
    held, trained = (prompts_of(part, tokenizer) for part in (data.validation, data.train))
    assert not held & trained
    wanted = section.get("validation_split", 0.1) * len(rows)
    assert abs(len(data.validation) - wanted) <= wanted / 4
    assert all(prompt.held_out for prompt in data.preview_prompts)
    assert len(data.preview_prompts) == len(held)
    assert data.card.num_leaked == 0


@pytest.mark.parametrize("case", FILES)
def test_rows_with_one_prompt_stand_on_one_side(
    prepare: Callable[..., RunData], tokenizer: Any, case: str
) -> None:
    check_sides(prepare, tokenizer, case)


def test_mutant_split_by_answers_is_killed(
    prepare: Callable[..., RunData], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = preparer.Preparer._keys
    monkeypatch.setattr(preparer.Preparer, "_keys", lambda self, row: (keys(self, row)[0],) * 2)
    for case in FILES:
        with pytest.raises(AssertionError):
            check_sides(prepare, tokenizer, case)


def popular(others: int) -> Rows:
    rows = [{"question": "write a poem", "answer": f"poem {n}"} for n in range(95)]
    return rows + [{"question": f"q{n}", "answer": "a"} for n in range(others)]


def test_a_prompt_that_most_rows_share_is_split_by_answers_and_named(
    prepare: Callable[..., RunData],
) -> None:
    data = prepare(popular(5))
    assert len(data.validation) == 10
    assert data.card.shared_prompts == ((95, "write a poem"),)
    lines = dict(card_lines(data.card))
    assert lines["shared"].startswith("95 rows have the same prompt, 'write a poem'")
    flags = {prompt.prompt: prompt.held_out for prompt in data.preview_prompts}
    assert flags.pop("write a poem") is False
    assert all(flags.values())
    assert data.card.num_leaked == 10 - len(flags)
    assert "'write a poem'" in lines["leak"]


def test_prompts_that_are_nowhere_trained_are_shown_first(prepare: Callable[..., RunData]) -> None:
    data = prepare(popular(200))
    shown = [prompt.held_out for prompt in data.preview_prompts]
    assert shown == sorted(shown, reverse=True)
    assert shown[0]
    assert [p.held_out for p in prepare(popular(200), num_preview=3).preview_prompts] == [True] * 3


def test_prompts_of_a_validation_file_that_are_trained_too_are_named_and_not_called_held_out(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    own = [{"question": "question 1?", "answer": "another"}, {"question": "new", "answer": "x"}]
    data = prepare(several_answers(20, 2), validation_path=str(write_rows(own, "val.jsonl")))
    assert {p.prompt: p.held_out for p in data.preview_prompts} == {
        "question 1?": False,
        "new": True,
    }
    assert data.card.num_leaked == 1
    assert data.card.leaked_prompts == ("question 1?",)
    assert "'question 1?'" in dict(card_lines(data.card))["leak"]


def test_answers_added_to_a_held_out_prompt_are_held_out(prepare: Callable[..., RunData]) -> None:
    rows = several_answers(40, 2)
    before = {prompt.prompt for prompt in prepare(rows).preview_prompts}
    more = [{"question": f"question {n}?", "answer": "one more"} for n in range(40)]
    after = {prompt.prompt for prompt in prepare([*more, *rows]).preview_prompts}
    assert before == after


def test_rows_added_hardly_change_who_is_held_out(prepare: Callable[..., RunData]) -> None:
    before = {p.prompt for p in prepare(several_answers(60, 1)).preview_prompts}
    after = {p.prompt for p in prepare(several_answers(70, 1)).preview_prompts}
    assert len(before) == 6
    assert len(before - after) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_one_row_again_and_again_is_trained_and_never_takes_the_whole_share(
    prepare: Callable[..., RunData], seed: int
) -> None:
    rows = [{"question": "same", "answer": "same"}] * 60 + several_answers(60, 1)
    data = prepare(rows, seed=seed)
    assert len(data.validation) == 12
    assert "same" not in {prompt.prompt for prompt in data.preview_prompts}


def test_texts_are_parted_by_their_own_content(prepare: Callable[..., RunData]) -> None:
    rows = [{"text": f"the same beginning of every text {n} {n}"} for n in range(60)]
    data = prepare([*rows, *rows])
    assert len(data.validation) == 12
    assert all(prompt.held_out for prompt in data.preview_prompts)
    assert data.card.shared_prompts == ()
