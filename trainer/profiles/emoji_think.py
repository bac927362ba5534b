"""Profile `emoji_think`: an answer thinks in emojis, speaks, and says by emojis that it is done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import ProfileError
from trainer.profiles.base import DataProfile, Message

THINK_EMOJIS = ("\N{THINKING FACE}", "\N{BRAIN}", "\N{THOUGHT BALLOON}", "\N{CRYSTAL BALL}")
STOP_EMOJIS = (
    "\N{WHITE HEAVY CHECK MARK}",
    "\N{CHEQUERED FLAG}",
    "\N{OCTAGONAL SIGN}",
    "\N{NO ENTRY}",
)
THINK_COUNT = (2, 8)
STOP_COUNT = (2, 4)
THINK_TAG = re.compile(r"</?think>")
DIRECT_WORDS = "Answer directly, without emojis."


@dataclass(frozen=True)
class Pattern:
    """How one answer is wrapped."""

    think: str
    think_count: int
    stop: str
    stop_count: int

    @property
    def instruction(self) -> str:
        """The pattern in words, for the user's turn."""
        return (
            f"Begin with {self.think_count} times {self.think} to think, then answer, and end with "
            f"{self.stop_count} times {self.stop}."
        )


class EmojiThinkProfile(DataProfile):
    """Wraps answers in 2-8 of one thinking emoji and 2-4 of one stop emoji, drawn per row."""

    name = "emoji_think"
    known_options = frozenset({"direct_share", "think_emojis", "stop_emojis"})

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        """Take the options.

        Args:
            options: `direct_share` (0 to 1, default 0): share of rows that are left without
                emojis and asked to be; `think_emojis` and `stop_emojis`: lists to draw from.
        Raises:
            ProfileError: an unknown option or a wrong value.
        """
        super().__init__(options)
        self.direct_share = _share(self.options.get("direct_share", 0.0))
        self.think_emojis = _emojis("think_emojis", self.options.get("think_emojis", THINK_EMOJIS))
        self.stop_emojis = _emojis("stop_emojis", self.options.get("stop_emojis", STOP_EMOJIS))
        shared = set(self.think_emojis) & set(self.stop_emojis)
        if shared:
            raise ProfileError(
                f"profile.options: {', '.join(sorted(shared))} stands in think_emojis and in "
                "stop_emojis; an emoji cannot both begin and end an answer."
            )

    def clean(self, text: str) -> str:
        """Remove `<think>` and `</think>`, and count them; what stands between them stays."""
        cleaned, count = THINK_TAG.subn("", text)
        if count:
            self.counts["<think> tags removed"] += count
        return cleaned.strip() if count else text

    def transform(self, messages: list[Message], *, index: int, seed: int) -> list[Message]:
        """Wrap every answer, and say so in the turn it answers; the draw is (seed, index)'s."""
        drawn = self._draw(index, seed)
        turns = list(messages)
        for position, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            pattern = self.pattern_of(turn["content"], drawn)
            words = DIRECT_WORDS if pattern is None else pattern.instruction
            if pattern is not None:
                turns[position] = _with_content(turn, self.wrap(turn["content"], pattern))
            self._instruct(turns, position, words)
        return turns

    def matches(self, answer: str, golden: str) -> bool:
        """Compare what stands between the emojis; wrapped against direct does not match."""
        said, meant = self.unwrap(answer), self.unwrap(golden)
        is_same_kind = (said == answer.strip()) == (meant == golden.strip())
        return is_same_kind and said.split() == meant.split()

    def logits_processors(
        self, tokenizer: Any, *, stop_ids: frozenset[int] = frozenset()
    ) -> list[Any]:
        """Push down `<think>`, and everything but the end once the stop emojis are written."""
        # torch takes seconds to load, and configs and error paths need none.
        from trainer.profiles.logits import StopAfterSequence, SuppressThinkTags

        least, most = STOP_COUNT
        stops = StopAfterSequence(
            tokenizer, self.stop_emojis, least=least, most=most, stop_ids=stop_ids
        )
        return [SuppressThinkTags(tokenizer), stops]

    # ---- parts

    def _draw(self, index: int, seed: int) -> Pattern | None:
        """The pattern of a row; None for a direct one."""
        digest = hashlib.sha256(f"emoji_think:{seed}:{index}".encode()).digest()
        share, think, think_count, stop, stop_count = (
            int.from_bytes(digest[4 * i : 4 * i + 4], "big") / 2**32 for i in range(5)
        )
        if share < self.direct_share:
            return None
        return Pattern(
            think=_pick(self.think_emojis, think),
            think_count=_pick(range(THINK_COUNT[0], THINK_COUNT[1] + 1), think_count),
            stop=_pick(self.stop_emojis, stop),
            stop_count=_pick(range(STOP_COUNT[0], STOP_COUNT[1] + 1), stop_count),
        )

    def pattern_of(self, answer: str, drawn: Pattern | None) -> Pattern | None:
        """The pattern that an answer has or gets: marks that are there already are kept."""
        think, stop = self._marks(answer)
        if drawn is None and not (think and stop):
            return None
        base = drawn or Pattern(self.think_emojis[0], 2, self.stop_emojis[0], 2)
        return Pattern(
            think=think[0] if think else base.think,
            think_count=think[1] if think else base.think_count,
            stop=stop[0] if stop else base.stop,
            stop_count=stop[1] if stop else base.stop_count,
        )

    def _marks(self, answer: str) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
        """(emoji, count) at the start and at the end, where there are at least two of one."""
        text = answer.strip()
        return (
            _run(rf"^({_any(self.think_emojis)})\1+", text),
            _run(rf"({_any(self.stop_emojis)})\1+$", text),
        )

    def wrap(self, answer: str, pattern: Pattern) -> str:
        """The answer between its emojis; a side that is marked already stays as it is."""
        text = answer.strip()
        think, stop = self._marks(text)
        head = "" if think else pattern.think * pattern.think_count + " "
        tail = "" if stop else " " + pattern.stop * pattern.stop_count
        return f"{head}{text}{tail}"

    def unwrap(self, answer: str) -> str:
        """What stands between the emojis; an answer without both kinds comes back whole."""
        text = answer.strip()
        think, stop = self._marks(text)
        if not (think and stop):
            return text
        return text[len(think[0]) * think[1] : -len(stop[0]) * stop[1]].strip()

    def _instruct(self, turns: list[Message], answer: int, words: str) -> None:
        """Put the instruction under the nearest user turn before an answer, once."""
        asked = [i for i in range(answer) if turns[i]["role"] == "user"]
        if not asked:
            return
        turn = turns[asked[-1]]
        if words not in turn["content"]:
            turns[asked[-1]] = _with_content(turn, f"{turn['content']}\n\n{words}")


def _with_content(turn: Message, content: str) -> Message:
    """The turn with another text; all else it brings stays."""
    changed = turn.copy()
    changed["content"] = content
    return changed


def _pick(choices: Sequence[Any], share: float) -> Any:
    return choices[int(share * len(choices))]


def _any(emojis: Sequence[str]) -> str:
    return "|".join(map(re.escape, emojis))


def _run(pattern: str, text: str) -> tuple[str, int] | None:
    found = re.search(pattern, text)
    return (found[1], len(found[0]) // len(found[1])) if found else None


def _share(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ProfileError(
            f"profile.options.direct_share={value!r} is no number from 0 to 1; give the share of "
            "rows that are left without emojis."
        )
    return float(value)


def _emojis(name: str, value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or not all(isinstance(one, str) and one.strip() for one in value):
        raise ProfileError(
            f"profile.options.{name}={value!r} must be a list of one or more emojis."
        )
    return tuple(value)
