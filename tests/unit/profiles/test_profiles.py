"""Profiles: found by name, path or entry point; regime3 wraps, completes and compares."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from trainer.errors import ProfileError
from trainer.profiles import BUILT_IN, DataProfile, get_profile, known_profiles
from trainer.profiles.profile import wrap_answer

S, E = "<<ANS_START>>", "<<ANS_END>>"


class Shouting(DataProfile):
    """A profile that a user could have written."""

    name = "shouting"
    known_options = frozenset({"marks"})
    system_prompt_template = "Today is {date}. Answer {loudly}."

    def matches(self, answer: str, golden: str) -> bool:
        return answer.upper() == golden.upper()


def test_built_in_profiles_are_known() -> None:
    assert known_profiles()[:2] == ["plain", "regime3"]
    assert get_profile("plain").system_prompt(date=dt.date(2030, 1, 2)) is None


def test_a_profile_is_found_by_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "shouting_profile", sys.modules[__name__])
    profile = get_profile("shouting_profile:Shouting", {"marks": 3})
    assert profile.matches("ok", "OK")
    assert (
        profile.system_prompt(date=dt.date(2030, 1, 2)) == "Today is 2030-01-02. Answer {loudly}."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("regime4", "Did you mean 'regime3'"),
        ("nothing_like_it", "Known: plain, regime3"),
        ("no.such.module:Class", "cannot import"),
        ("json:loads", "must be a class"),
    ],
)
def test_an_unknown_profile_says_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        get_profile(name)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(ProfileError, match=r"profile.options has 'loud'"):
        get_profile("regime3", {"loud": True})


@pytest.mark.parametrize(
    "text", ["5", f"{S} 5", f"5 {E}", f"{S} 5 {E}", f"  {S} 5 {E}\n"], ids=repr
)
def test_answers_are_wrapped_once_and_half_marked_ones_completed(text: str) -> None:
    assert wrap_answer(text) == f"{S} 5 {E}"
    assert wrap_answer(wrap_answer(text)) == wrap_answer(text)


def test_regime3_wraps_the_assistant_only() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    wrapped = get_profile("regime3").transform(turns, index=0, seed=0)  # type: ignore[arg-type]
    assert [turn["content"] for turn in wrapped] == ["q", f"{S} a {E}"]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (f"{S} (max 1 2) = 2 {E}", True),
        (f"{S}(max 1 2)  = 2{E} and more", True),
        (f"{S} (max 1 2) = 1 {E}", False),
        ("(max 1 2) = 2", False),
        (f"{S} (max 1 2) = 2", False),
        ("", False),
    ],
)
def test_regime3_compares_what_stands_between_the_markers(answer: str, is_right: bool) -> None:
    profile = get_profile("regime3")
    assert profile.matches(answer, f"{S} (max 1 2) = 2 {E}") is is_right
    assert profile.matches(answer, "(max 1 2) = 2") is is_right


def test_the_docs_show_each_profiles_system_turn() -> None:
    text = (Path(__file__).parents[3] / "docs" / "profiles.md").read_text(encoding="utf-8")
    shown = [line.removeprefix("> ") for line in text.splitlines() if line.startswith("> ")]
    own = [cls.system_prompt_template for cls in BUILT_IN.values() if cls.system_prompt_template]
    assert shown == own
