"""emoji_think: framed once, asked for in words, stopped row by row however tokens are split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.errors import ProfileError
from trainer.preview.generate import GenerationSettings, generate
from trainer.profiles import get_profile
from trainer.profiles.emoji_think import StopPush, ThinkPenalty, vocabulary_texts

THINK, STOP = "\N{THINKING FACE}", "\N{OCTAGONAL SIGN}"
ONE_EACH = {"think_emoji": [THINK], "stop_emoji": [STOP]}


def row(answer: str = "four") -> list[Any]:
    return [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]


def test_answers_are_framed_as_the_user_turn_asks() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    profile, seen = get_profile("emoji_think", ONE_EACH), set()
    for index in range(100):
        asked, answer = (t["content"] for t in profile.transform(row(), index=index, seed=1))
        num_think, num_stop = answer.count(THINK), answer.count(STOP)
        assert answer == f"{THINK * num_think} four {STOP * num_stop}"
        assert f"with {words[num_think]} thinking face" in asked
        assert f"with {words[num_stop]} octagonal sign" in asked
        seen.add((num_think, num_stop))
    assert {num_think for num_think, _ in seen} == set(range(2, 9))
    assert {num_stop for _, num_stop in seen} == {2, 3, 4}


def test_a_row_depends_on_seed_and_index_only_and_is_not_framed_twice() -> None:
    one, two = get_profile("emoji_think"), get_profile("emoji_think")
    two.transform(row("other"), index=5, seed=3)
    first = one.transform(row(), index=7, seed=3)
    assert first == two.transform(row(), index=7, seed=3)
    assert one.transform(first, index=8, seed=3) == first
    assert one.report() == {"answers framed already": 1}


def test_half_of_the_rows_are_left_direct_and_counted() -> None:
    profile = get_profile("emoji_think", {"direct_share": 0.5})
    rows = [profile.transform(row(), index=i, seed=0) for i in range(400)]
    direct = sum(turns == row() for turns in rows)
    assert 160 < direct < 240
    assert profile.report() == {"rows left direct": direct}


def test_think_tags_are_removed_and_counted() -> None:
    kept = get_profile("emoji_think", {"direct_share": 1})
    dropped = get_profile("emoji_think", {"direct_share": 1, "drop_thoughts": True})
    text = "<think>\nhm</think> four"
    assert kept.transform(row(text), index=0, seed=0)[1]["content"] == "hm four"
    assert dropped.transform(row(text), index=0, seed=0)[1]["content"] == "four"
    assert kept.report()["think tags removed"] == dropped.report()["think tags removed"] == 2


def test_what_stands_between_the_markers_is_compared() -> None:
    profile = get_profile("emoji_think", ONE_EACH)
    golden = f"{THINK * 3} four {STOP * 2}"
    assert profile.matches(f"{THINK * 2} four {STOP * 4}", golden)
    assert not profile.matches(f"{THINK * 2} five {STOP * 4}", golden)
    assert not profile.matches("four", golden)
    assert profile.matches("four", "four")


@pytest.mark.parametrize(
    "options",
    [{"direct_share": 2}, {"think_range": [3, 2]}, {"stop_emoji": []}, {"stop_emoji": [THINK]}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=r"profile.options"):
        get_profile("emoji_think", options)


def test_a_think_tag_is_pushed_down_however_it_is_split_and_less_with_time(tokenizer: Any) -> None:
    texts = vocabulary_texts(tokenizer)
    penalty = ThinkPenalty(tokenizer, texts, penalty=8.0, num_tokens=10)
    ids = torch.tensor([tokenizer.encode("user")])
    penalty(ids, torch.zeros(1, len(texts)))
    begun = tokenizer.encode("<think")
    for token in begun:
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        scores = penalty(ids, torch.zeros(1, len(texts)))
    last = tokenizer.encode(">")[0]
    assert scores[0, last] == pytest.approx(-8.0 * (1 - len(begun) / 10))
    assert scores[0, tokenizer.encode("a")[0]] == 0


class Script:
    """Overrides the model: each row writes the tokens that belong to its prompt's last one."""

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        self.scripts, self.position = scripts, -1

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.position += 1
        scores = torch.full_like(scores, -9.0)
        for line, first in enumerate(input_ids[:, -1 - self.position].tolist()):
            script = self.scripts[first]
            scores[line, script[min(self.position, len(script) - 1)]] = 0.0
        return scores


@pytest.fixture
def stopped(tokenizer: Any, make_model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that lets prompts write their scripts, with the push behind the stop emoji."""
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    more = tokenizer.encode("more " * 20)
    scripts = {
        a: tokenizer.encode(f"x{STOP * 2}") + more,
        b: tokenizer.encode(f"much longer text{STOP * 2}") + more,
    }
    model = make_model(vocab_size=len(tokenizer)).eval()
    settings = GenerationSettings(
        max_new_tokens=60, temperature=0.0, seed=0, stop_ids=frozenset({tokenizer.eos_token_id})
    )

    def run(prompts: list[str], push: type[StopPush] = StopPush) -> list[Any]:
        ends = frozenset({tokenizer.eos_token_id})
        processors = [Script(scripts), push(tokenizer, (STOP,), ends, run_range=(2, 4), force=4.0)]
        ids = [
            tokenizer.encode("user")[:1] * n + [tokenizer.encode(p)[0]]
            for n, p in enumerate(prompts)
        ]
        found = generate(model, tokenizer, ids, settings, processors)
        return [dataclasses.astuple(one) for one in found]

    return run


def check_rows_stop_alone(run: Callable[..., Any], push: type[StopPush]) -> None:
    """The claim: in one batch every row ends where it ends alone, behind its own stop."""
    both = run(["a", "b"], push)
    assert all(is_stopped for _, _, is_stopped in both), "a row did not stop"
    assert len(both[0][0]) != len(both[1][0]), "the rows must stop at different steps"
    assert both == [run(["a"], push)[0], run(["b"], push)[0]]


def test_rows_stop_at_their_own_steps_as_one_by_one(stopped: Callable[..., Any]) -> None:
    check_rows_stop_alone(stopped, StopPush)


class SharedState(StopPush):
    """The mutant: one row's stop counts for all rows."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        out = super().__call__(input_ids, scores)
        self.steps_since_stop = [max(self.steps_since_stop)] * len(self.steps_since_stop)
        return out


def test_mutant_emoji_state_shared_by_rows_is_killed(stopped: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_rows_stop_alone(stopped, SharedState)


def test_a_new_generation_starts_without_stopped_rows(tokenizer: Any) -> None:
    push = StopPush(tokenizer, (STOP,), frozenset({2}), run_range=(2, 4), force=4.0)
    ids = torch.tensor([tokenizer.encode("user")])
    for token in tokenizer.encode(STOP * 2):
        push(ids, torch.zeros(1, 303))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert push(ids, torch.zeros(1, 303))[0, 2] == 4.0
    assert push(ids + 1, torch.zeros(1, 303)).abs().max() == 0


def test_a_run_that_still_grows_starts_the_force_anew(tokenizer: Any) -> None:
    push = StopPush(tokenizer, (STOP,), frozenset({2}), run_range=(2, 4), force=4.0)
    ids = torch.tensor([tokenizer.encode("user")])
    levels = {}
    for count, token in enumerate(tokenizer.encode(STOP * 5 + "ab"), start=1):
        push(ids, torch.zeros(1, 303)) if count == 1 else None
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        levels[count] = float(push(ids, torch.zeros(1, 303))[0, 2])
    per_stop = len(tokenizer.encode(STOP))
    whole = [levels[per_stop * runs] for runs in (1, 2, 3, 4)]
    assert whole == [0.0, 4.0, 4.0, 4.0]
    after = [levels[count] for count in sorted(levels) if count > 4 * per_stop]
    assert after == sorted(after)
    assert after[-1] > after[0] > 4.0
