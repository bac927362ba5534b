"""emoji_think: what it does to rows, to comparison and to logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.errors import ProfileError
from trainer.preview.generate import GenerationSettings, generate
from trainer.profiles import Message, get_profile
from trainer.profiles.emoji_think import (
    DIRECT_WORDS,
    STOP_EMOJIS,
    THINK_EMOJIS,
    EmojiThinkProfile,
)
from trainer.profiles.logits import StopAfterSequence, SuppressThinkTags

CHECK, BRAIN = "\N{WHITE HEAVY CHECK MARK}", "\N{BRAIN}"
ANSWER = re.compile(
    rf"^({'|'.join(THINK_EMOJIS)})\1{{1,7}} (?P<body>.*) ({'|'.join(STOP_EMOJIS)})\3{{1,3}}$", re.S
)


def row(answer: str = "four", question: str = "2 + 2?") -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def test_every_answer_begins_and_ends_with_a_run_of_one_emoji() -> None:
    profile = get_profile("emoji_think")
    for index in range(200):
        question, answer = profile.transform(row(), index=index, seed=1)
        found = ANSWER.match(answer["content"])
        assert found is not None, answer["content"]
        assert found["body"] == "four"
        count = len(answer["content"].split()[0])
        assert f"{count} times {answer['content'][0]}" in question["content"]


def test_the_draw_depends_on_seed_and_index_alone_and_uses_every_count() -> None:
    profile = get_profile("emoji_think")
    one = [profile.transform(row(), index=index, seed=1) for index in range(200)]
    again = [get_profile("emoji_think").transform(row(), index=i, seed=1) for i in range(200)]
    other = [profile.transform(row(), index=index, seed=2) for index in range(200)]
    assert one == again
    assert one != other
    words = [turns[1]["content"].split() for turns in one]
    assert {len(parts[0]) for parts in words} == set(range(2, 9))
    assert {len(parts[-1]) for parts in words} == set(range(2, 5))


def test_marked_rows_are_not_marked_twice_and_are_described_as_they_are() -> None:
    profile = get_profile("emoji_think")
    marked = f"{BRAIN * 3} four {CHECK * 2}"
    turns = profile.transform(row(marked), index=5, seed=1)
    assert turns[1]["content"] == marked
    assert f"3 times {BRAIN}" in turns[0]["content"]
    assert profile.transform(turns, index=5, seed=1) == turns


def test_a_half_marked_row_is_completed() -> None:
    profile = get_profile("emoji_think")
    answer = profile.transform(row(f"four {CHECK * 3}"), index=5, seed=1)[1]["content"]
    assert ANSWER.match(answer)
    assert answer.count(CHECK) == 3


def test_the_direct_share_of_rows_stays_direct_and_is_asked_to() -> None:
    profile = get_profile("emoji_think", {"direct_share": 0.5})
    rows = [profile.transform(row(), index=index, seed=1) for index in range(400)]
    direct = [turns for turns in rows if turns[1]["content"] == "four"]
    assert 150 < len(direct) < 250
    assert all(DIRECT_WORDS in turns[0]["content"] for turns in direct)
    assert all(DIRECT_WORDS not in turns[0]["content"] for turns in rows if turns not in direct)


def test_think_tags_are_removed_and_counted() -> None:
    profile = get_profile("emoji_think")
    assert profile.clean("<think>2 and 2</think> four") == "2 and 2 four"
    assert profile.clean("  untouched ") == "  untouched "
    assert profile.counts == {"<think> tags removed": 2}


def test_comparison_looks_between_the_emojis() -> None:
    profile = get_profile("emoji_think")
    golden = f"{BRAIN * 3} four {CHECK * 2}"
    assert profile.matches(f"{THINK_EMOJIS[0] * 2}  four {CHECK * 4}", golden)
    assert not profile.matches("four", golden)
    assert not profile.matches(f"{BRAIN * 3} five {CHECK * 2}", golden)
    assert profile.matches("four ", "four")


@pytest.mark.parametrize(
    "options",
    [
        {"direct_share": 2},
        {"direct_share": "half"},
        {"think_emojis": []},
        {"stop_emojis": "x"},
        {"think_emojis": [CHECK]},
        {"shares": 1},
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=r"profile\.options"):
        EmojiThinkProfile(options)


# ---- logits


def steps(tokenizer: Any, text: str) -> list[list[int]]:
    """The prefixes of a text's tokens, the empty one first."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [ids[:count] for count in range(len(ids) + 1)]


def levels(tokenizer: Any, texts: list[str]) -> list[list[float]]:
    """Per row and step: how far another token stands below the end of text."""
    processor = StopAfterSequence(tokenizer, STOP_EMOJIS, least=2, most=4)
    rows = [steps(tokenizer, text) for text in texts]
    length = min(map(len, rows))
    found: list[list[float]] = [[] for _ in texts]
    for step in range(length):
        ids = torch.tensor([[1, 1, *row[step]] for row in rows])
        scores = processor(ids, torch.zeros(len(rows), len(tokenizer)))
        for index, row in enumerate(scores):
            found[index].append(float(row[tokenizer.eos_token_id] - row[70]))
    return found


def test_rows_that_stop_at_different_steps_have_a_state_each(tokenizer: Any) -> None:
    early, late = f"a{CHECK * 2}abcdefghijkl", f"abcdefghijkl{CHECK * 2}a"
    together = levels(tokenizer, [early, late])
    assert together[0] == levels(tokenizer, [early])[0]
    assert together[1] == levels(tokenizer, [late])[0]
    assert next(i for i, value in enumerate(together[0]) if value) < next(
        i for i, value in enumerate(together[1]) if value
    )


def test_the_force_grows_after_the_run_and_a_longer_run_starts_anew(tokenizer: Any) -> None:
    [found] = levels(tokenizer, [f"{CHECK * 2}abc"])
    growing = found[-4:]
    assert growing == sorted(growing)
    assert len(set(growing)) == 4
    [longer] = levels(tokenizer, [f"{CHECK * 3}"])
    assert longer[-1] == growing[0]


def test_one_stop_emoji_alone_changes_nothing(tokenizer: Any) -> None:
    assert set(levels(tokenizer, [f"a{CHECK}bcd"])[0]) == {0.0}


def test_a_new_generation_begins_without_state(tokenizer: Any) -> None:
    processor = StopAfterSequence(tokenizer, STOP_EMOJIS, least=2, most=4)
    for ids in steps(tokenizer, f"{CHECK * 2}ab"):
        processor(torch.tensor([[1, *ids]]), torch.zeros(1, len(tokenizer)))
    fresh = processor(torch.tensor([[1, 1, 1, 1]]), torch.zeros(1, len(tokenizer)))
    assert not fresh.any()


def test_the_prompts_own_emojis_do_not_end_an_answer(tokenizer: Any) -> None:
    processor = StopAfterSequence(tokenizer, STOP_EMOJIS, least=2, most=4)
    prompt = tokenizer.encode(f"end with {CHECK * 2}", add_special_tokens=False)
    assert not processor(torch.tensor([prompt]), torch.zeros(1, len(tokenizer))).any()


def test_think_tags_are_pushed_down_less_and_less(tokenizer: Any) -> None:
    processor = SuppressThinkTags(tokenizer)
    closing = tokenizer.encode(">", add_special_tokens=False)[0]
    ids = tokenizer.encode("abc<think", add_special_tokens=False)
    found = []
    for width in range(2, 100):
        filler = [tokenizer.encode("a", add_special_tokens=False)[0]] * width
        row = torch.tensor([[*filler, *ids]])
        if width == 2:
            processor(row[:, :1], torch.zeros(1, len(tokenizer)))
            processor._seen = (1, row.shape[1] - 1)
        found.append(float(processor(row, torch.zeros(1, len(tokenizer)))[0, closing]))
    assert found[0] < found[40] < 0
    assert found[-1] == -2.0


def test_a_batch_says_what_one_by_one_says(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model(vocab_size=len(tokenizer)).eval()
    profile = get_profile("emoji_think")
    settings = GenerationSettings(max_new_tokens=24, temperature=1.5, seed=3, stop_ids={2})
    prompts = [[5, 6, 7], [8, 9], [30, 31, 32, 33]]

    def say(some: list[list[int]]) -> list[list[int]]:
        processors = profile.logits_processors(tokenizer, stop_ids=frozenset({2}))
        with torch.no_grad():
            return [one.raw_ids for one in generate(model, tokenizer, some, settings, processors)]

    assert say(prompts) == [say([prompt])[0] for prompt in prompts]
