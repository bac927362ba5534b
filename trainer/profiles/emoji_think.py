"""Profile `emoji_think`: answers framed by thinking emoji and stop emoji, as the user asked."""

from __future__ import annotations

import random
import re
import unicodedata
from typing import Any

from trainer.errors import ProfileError
from trainer.profiles.logits import StopPush, ThinkPenalty, vocabulary_texts
from trainer.profiles.profile import DataProfile, Message

THINK_TAG = re.compile(r"</?think>")

THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

DEFAULTS: dict[str, Any] = {
    "think_emoji": ["\N{THINKING FACE}", "\N{BRAIN}", "\N{ELECTRIC LIGHT BULB}"],
    "stop_emoji": ["\N{OCTAGONAL SIGN}", "\N{CHEQUERED FLAG}", "\N{WHITE HEAVY CHECK MARK}"],
    "think_range": [2, 8],
    "stop_range": [2, 4],
    "direct_share": 0.0,
    "drop_thoughts": False,
    "think_penalty": 20.0,
    "think_penalty_tokens": 64,
    "stop_force": 4.0,
}


class EmojiThinkProfile(DataProfile):
    """Frames every answer of a row with emoji drawn from (seed, index), and asks for them.

    `<think>` tags of answers are removed and counted; what stands between them stays unless
    option `drop_thoughts` is set. Answers that are framed already stay as they are.
    """

    name = "emoji_think"
    known_options = frozenset(DEFAULTS)

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        """Check the options and start the counts at zero."""
        super().__init__(options)
        self.values = {**DEFAULTS, **self.options}
        _check(self.values)
        self.drops_thoughts = self.values["drop_thoughts"]
        self.counts = {
            "think tags removed": 0,
            "thoughts dropped": 0,
            "rows left direct": 0,
            "answers framed already": 0,
            "answers that are thoughts only (kept)": 0,
        }
        think, stop = (_alternatives(self.values[key]) for key in ("think_emoji", "stop_emoji"))
        least_think, least_stop = self.values["think_range"][0], self.values["stop_range"][0]
        self._frame = re.compile(
            rf"\s*(?P<think>{think})(?P=think){{{least_think - 1},}}(?P<body>.*?)"
            rf"(?P<stop>{stop})(?P=stop){{{least_stop - 1},}}\s*",
            re.DOTALL,
        )
        self._loose = re.compile(rf"^(?:\s|{think})+|(?:\s|{stop})+$")
        self._vocabulary: tuple[Any, list[str]] | None = None

    def transform(self, messages: list[Message], *, index: int, seed: int) -> list[Message]:
        """Frame the answers and put the instructions behind the user's last words before each."""
        rng = random.Random(f"{seed}:{index}")
        is_direct = rng.random() < self.values["direct_share"]
        think, stop = rng.choice(self.values["think_emoji"]), rng.choice(self.values["stop_emoji"])
        num_think = rng.randint(*self.values["think_range"])
        num_stop = rng.randint(*self.values["stop_range"])
        self.counts["rows left direct"] += is_direct
        turns = [turn.copy() for turn in messages]
        asked: Message | None = None
        for turn in turns:
            if self.drops_thoughts and turn.pop("reasoning_content", ""):
                self.counts["thoughts dropped"] += 1
            if turn["role"] == "user":
                asked = turn
            if turn["role"] != "assistant" or turn.get("tool_calls"):
                continue
            turn["content"] = self._without_tags(turn["content"])
            if self._frame.fullmatch(turn["content"]):
                self.counts["answers framed already"] += 1
            elif not is_direct:
                body = self._loose.sub("", turn["content"])
                turn["content"] = f"{think * num_think} {body} {stop * num_stop}"
                if asked is not None:
                    asked["content"] += _instructions(think, num_think, stop, num_stop)
                    asked = None  # a second answer to the same turn needs no second request
        return turns

    def _without_tags(self, text: str) -> str:
        self.counts["think tags removed"] += len(THINK_TAG.findall(text))
        if self.values["drop_thoughts"]:
            rest = THOUGHT.sub("", text)
            if THINK_TAG.sub("", rest).strip():
                text = rest
            else:  # without its thoughts the answer would be empty
                self.counts["answers that are thoughts only (kept)"] += 1
        return THINK_TAG.sub("", text).strip() if THINK_TAG.search(text) else text

    def report(self) -> dict[str, int]:
        """What `transform` did so far, zeros left out."""
        return {name: count for name, count in self.counts.items() if count}

    def matches(self, answer: str, golden: str) -> bool:
        """Compare what stands between the markers; direct rows are compared as they are."""
        meant = self._frame.fullmatch(golden)
        if meant is None:
            return super().matches(answer, golden)
        said = self._frame.fullmatch(answer)
        return said is not None and super().matches(said["body"], meant["body"])

    def logits_processors(
        self, tokenizer: Any, *, stop_ids: frozenset[int] = frozenset()
    ) -> list[Any]:
        """Push down `<think>` tags, and everything but the end behind the stop emoji."""
        if self._vocabulary is None or self._vocabulary[0] is not tokenizer:
            self._vocabulary = (tokenizer, vocabulary_texts(tokenizer))
        values = self.values
        ends = stop_ids | frozenset({tokenizer.eos_token_id} - {None})
        return [
            ThinkPenalty(
                tokenizer,
                self._vocabulary[1],
                penalty=values["think_penalty"],
                num_tokens=values["think_penalty_tokens"],
            ),
            StopPush(
                tokenizer,
                values["stop_emoji"],
                ends,
                run_range=values["stop_range"],
                force=values["stop_force"],
            ),
        ]


def _instructions(think: str, num_think: int, stop: str, num_stop: int) -> str:
    return (
        f"\n\nBegin your answer with {_count(num_think)} {_emoji_name(think)} emoji ({think}) "
        f"and end it with {_count(num_stop)} {_emoji_name(stop)} emoji ({stop})."
    )


def _count(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


def _emoji_name(emoji: str) -> str:
    return " ".join(unicodedata.name(part, "").lower() for part in emoji).strip()


def _alternatives(emoji: list[str]) -> str:
    return "(?:" + "|".join(re.escape(one) for one in sorted(emoji, key=len, reverse=True)) + ")"


def _check(values: dict[str, Any]) -> None:
    """Refuse option values that could not work.

    Raises:
        ProfileError: names the option and what it takes.
    """
    for key in ("think_emoji", "stop_emoji"):
        emoji = values[key]
        if not (isinstance(emoji, list) and emoji and all(isinstance(e, str) and e for e in emoji)):
            raise ProfileError(f"profile.options.{key}={emoji!r} must be a list of emoji.")
    if set(values["think_emoji"]) & set(values["stop_emoji"]):
        raise ProfileError(
            "profile.options: think_emoji and stop_emoji share an emoji; a thought would stop it."
        )
    for key in ("think_range", "stop_range"):
        pair = values[key]
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        if not (is_pair and 1 <= pair[0] <= pair[1]):
            raise ProfileError(f"profile.options.{key}={pair!r} must be [least, most], from 1 up.")
    for key, most in (("direct_share", 1.0), ("think_penalty", None), ("stop_force", None)):
        number = values[key]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not (is_number and number >= 0 and (most is None or number <= most)):
            rule = "between 0 and 1" if most else "a number, 0 or more"
            raise ProfileError(f"profile.options.{key}={number!r} must be {rule}.")
    if type(values["think_penalty_tokens"]) is not int or values["think_penalty_tokens"] < 1:
        raise ProfileError("profile.options.think_penalty_tokens must be a whole number, from 1.")
    if not isinstance(values["drop_thoughts"], bool):
        raise ProfileError("profile.options.drop_thoughts must be true or false.")
