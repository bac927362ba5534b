"""Profile `emoji_think`: answers framed by thinking emoji and stop emoji, as the user asked."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from trainer.errors import ProfileError
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

    def frame(self, answer: str) -> list[tuple[int, int]]:
        """The emoji around the answer's words; nothing in a direct row."""
        found = self._frame.fullmatch(answer)
        return [] if found is None else [(0, found.start("body")), (found.end("body"), len(answer))]

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
            raise ProfileError(
                f"profile.options.{key}={pair!r} must be [least, most], both 1 or more."
            )
    for key, most in (("direct_share", 1.0), ("think_penalty", None), ("stop_force", None)):
        number = values[key]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not (is_number and number >= 0 and (most is None or number <= most)):
            rule = "between 0 and 1" if most else "a number, 0 or more"
            raise ProfileError(f"profile.options.{key}={number!r} must be {rule}.")
    if type(values["think_penalty_tokens"]) is not int or values["think_penalty_tokens"] < 1:
        raise ProfileError(
            "profile.options.think_penalty_tokens must be a whole number, 1 or more."
        )
    if not isinstance(values["drop_thoughts"], bool):
        raise ProfileError("profile.options.drop_thoughts must be true or false.")


# ---- its logits processors: batch-safe, one state per row, reset by a new generation
#
# They look at the decoded text behind the prompt, never at the ids of an isolated string, so that
# it does not matter how the tokenizer splits a marker in its context. torch tensors are only
# handled, never made here, which keeps this package free of the import.


TAIL = 48
"""Tokens at the end of a row that are decoded: longer than any marker."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character that is not complete yet are decoded to."""

THINK_TAGS = ("<think>", "</think>")


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """The text of every token id, special tokens included."""
    ids = [[index] for index in range(len(tokenizer))]
    texts: list[str] = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    return texts


class RowProcessor:
    """What both processors share: where the answers begin, and their decoded ends."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.width = 0
        """Tokens of the padded prompt."""
        self._seen: Any = None

    def follow(self, input_ids: Any) -> list[str]:
        """Notice a new generation, and return the text at the end of each row's answer."""
        seen = self._seen
        is_next = (
            seen is not None
            and seen.shape == input_ids[:, :-1].shape
            and bool((seen == input_ids[:, :-1]).all())
        )
        if not is_next:
            self.width = input_ids.shape[1]
            self.reset(input_ids.shape[0])
        self._seen = input_ids.clone()
        tail = input_ids[:, max(self.width, input_ids.shape[1] - TAIL) :].tolist()
        texts: list[str] = self.tokenizer.batch_decode(tail, clean_up_tokenization_spaces=False)
        return texts

    def reset(self, num_rows: int) -> None:
        """Begin the state of a generation of `num_rows` rows."""


class ThinkPenalty(RowProcessor):
    """Lowers tokens that would complete a think tag; the penalty falls linearly to zero."""

    def __init__(
        self, tokenizer: Any, texts: list[str], *, penalty: float, num_tokens: int
    ) -> None:
        """Begin with the whole penalty.

        Args:
            texts: of all token ids.
            penalty: logits taken off at the first token.
            num_tokens: after which it is zero.
        """
        super().__init__(tokenizer)
        self.texts, self.penalty, self.num_tokens = texts, penalty, num_tokens
        self._whole = [i for i, text in enumerate(texts) if any(tag in text for tag in THINK_TAGS)]
        self._rests: dict[str, list[int]] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the changed scores, (B, V) as given."""
        tails = self.follow(input_ids)
        share = 1 - (input_ids.shape[1] - self.width) / self.num_tokens
        if share <= 0:
            return scores
        scores = scores.clone()
        for row, tail in enumerate(tails):
            ids = {*self._whole, *(i for rest in _rests(tail) for i in self._completing(rest))}
            scores[row, sorted(ids)] -= self.penalty * share
        return scores

    def _completing(self, rest: str) -> list[int]:
        if rest not in self._rests:
            self._rests[rest] = [i for i, text in enumerate(self.texts) if text.startswith(rest)]
        return self._rests[rest]


def _rests(tail: str) -> list[str]:
    """What is missing of think tags that the tail has begun."""
    return [
        tag[size:] for tag in THINK_TAGS for size in range(1, len(tag)) if tail.endswith(tag[:size])
    ]


class StopPush(RowProcessor):
    """Behind a run of one stop: lowers all tokens but the ends, and raises those, ever more.

    One more of the same stop, while the run may still grow, starts the force anew: an answer that
    was asked to end with four must not be cut after two.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        end_ids: frozenset[int],
        *,
        run_range: Sequence[int],
        force: float,
    ) -> None:
        """Begin without a stop.

        Args:
            stops: texts, a run of one of which says that the answer is over.
            end_ids: tokens that end an answer.
            run_range: how often the text stands in a run, at least and at most.
            force: logits of the first step behind a run.
        """
        super().__init__(tokenizer)
        self.end_ids, self.force = sorted(end_ids), force
        least, self.most = run_range
        choices = "|".join(map(re.escape, sorted(stops, key=len, reverse=True)))
        self._run = re.compile(rf"({choices})\1{{{least - 1},}}(?P<rest>.*)$", re.DOTALL)
        self.steps_since_stop: list[int] = []
        """One per row: 0 before its run, then counted up at each token."""
        self._lengths: list[int] = []

    def reset(self, num_rows: int) -> None:
        self.steps_since_stop, self._lengths = [0] * num_rows, [0] * num_rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the changed scores, (B, V) as given."""
        tails = self.follow(input_ids)
        scores = scores.clone()
        for row, tail in enumerate(tails):
            self._count(row, tail)
            steps = self.steps_since_stop[row]
            if steps:
                scores[row] -= self.force * steps
                scores[row, self.end_ids] += 2 * self.force * steps
        return scores

    def _count(self, row: int, tail: str) -> None:
        found = self._run.search(tail)
        length = (found.end(0) - found.start(0) - len(found["rest"])) if found else 0
        runs = length // len(found[1]) if found else 0
        if self._lengths[row] < runs <= self.most:
            self.steps_since_stop[row], self._lengths[row] = 1, runs
        elif self.steps_since_stop[row] and not (
            found and found["rest"] == UNFINISHED and runs < self.most
        ):
            self.steps_since_stop[row] += 1
