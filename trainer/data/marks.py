"""Marks in the texts of a row, so that they can be found again once a template rendered them.

A mark is one character that no row holds, put behind a text. What the template makes of marked
turns, less the marks, must be what it makes of the turns themselves; where that holds, the marks
say where each text ends, whatever the template wrote round it and in which order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count

from trainer.profiles import Message

FIRST, LAST = 0x108000, 0x10FFFD
"""The last characters of Unicode, for private use: no font and hardly any data knows them."""
MARK = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


@dataclass(frozen=True)
class TurnMarks:
    """The marks of one turn; None where the turn has no such text."""

    content: str | None
    thought: str | None
    calls: tuple[str, ...]
    """Behind the name of each function called."""

    @property
    def last(self) -> list[str]:
        """The marks behind what a turn says or calls; its thought comes before both."""
        return [*([self.content] if self.content else []), *self.calls]


def has_marks(text: str) -> bool:
    """Whether a text holds characters that are used as marks."""
    return MARK.search(text) is not None


def without_marks(text: str) -> str:
    """The text less its marks."""
    return MARK.sub("", text)


def marked(row: list[Message], *, only_answers: bool) -> tuple[list[Message], list[TurnMarks]]:
    """A copy of the row with a mark behind each text, and the marks turn by turn.

    Args:
        row: the turns.
        only_answers: leave the other turns as they are, for templates that look at their ends.
    """
    numbers = count(FIRST)
    turns, marks = [], []
    for turn in row:
        is_answer = turn["role"] == "assistant"
        found = TurnMarks(None, None, ())
        if is_answer or not only_answers:
            calls = tuple(chr(next(numbers)) for _ in turn.get("tool_calls", []))
            found = TurnMarks(
                content=chr(next(numbers)) if turn["content"].strip() else None,
                thought=chr(next(numbers)) if turn.get("reasoning_content", "").strip() else None,
                calls=calls,
            )
        turns.append(_with_marks(turn, found))
        marks.append(found)
    return turns, marks


def _with_marks(turn: Message, marks: TurnMarks) -> Message:
    copy = turn.copy()
    if marks.content:
        copy["content"] = _behind(turn["content"], marks.content)
    if marks.thought:
        copy["reasoning_content"] = _behind(turn["reasoning_content"], marks.thought)
    if marks.calls:
        copy["tool_calls"] = [
            {**call, "function": {**call["function"], "name": call["function"]["name"] + mark}}
            for call, mark in zip(turn["tool_calls"], marks.calls, strict=True)
        ]
    return copy


def _behind(text: str, mark: str) -> str:
    """The mark behind the last character that is no space: templates strip what follows it."""
    core = text.rstrip()
    return core + mark + text[len(core) :]


def shared_start(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared far faster than characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
