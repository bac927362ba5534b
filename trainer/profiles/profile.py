"""DataProfile: how one kind of data is cleaned, rewritten, prompted, stopped and compared.

A profile is a class with a few small methods; `plain` and `regime3` are the smallest examples.
Nothing here knows about files, tokenizers' internals or training.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, NotRequired, TypedDict

from trainer.errors import ProfileError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Functions that an assistant turn calls, as {"type": "function", "function": {...}}."""
    tools: NotRequired[list[dict[str, Any]]]
    """Definitions of functions that may be called, on a row's first turn."""
    name: NotRequired[str]
    """Of the function whose result a tool turn brings."""
    tool_call_id: NotRequired[str]
    """Of the call that a tool turn answers."""
    reasoning_content: NotRequired[str]
    """What an assistant turn thinks before it says `content`; where it stands is the chat
    template's choice."""
    weight: NotRequired[float]
    """How much each token of an assistant turn counts in the loss, >= 0; absent means 1, and 0
    that the turn is read but not trained."""
    input_ids: NotRequired[list[int]]
    """Of a row of tokens (`data.format` tokens), which no profile gets to see."""
    labels: NotRequired[list[int]]
    """The same, with -100 where nothing is trained."""


class DataProfile:
    """The interface, and what `plain` does: nothing to the rows, exact comparison.

    Subclasses set `name`, `system_prompt_template` and `stop_strings`, list the options that
    they read in `known_options`, and override the methods they need.
    """

    name: str = "plain"
    known_options: frozenset[str] = frozenset()
    system_prompt_template: str | None = None
    stop_strings: tuple[str, ...] = ()
    drops_thoughts: bool = False
    """`transform` leaves out `reasoning_content` on purpose."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        """Check the names of `options`, which are `profile.options` of the config.

        Raises:
            ProfileError: an option that this profile does not have.
        """
        self.options = dict(options or {})
        unknown = sorted(set(self.options) - self.known_options)
        if unknown:
            known = ", ".join(sorted(self.known_options)) or "none"
            raise ProfileError(
                f"profile.options has {', '.join(map(repr, unknown))}, which profile "
                f"{self.name!r} does not know; its options: {known}."
            )

    def system_prompt(self, *, date: dt.date) -> str | None:
        """The system turn of rows that bring none; `{date}` in the template becomes the date."""
        return fill_date(self.system_prompt_template, date=date)

    def clean(self, text: str) -> str:
        """Clean the text of one turn; runs before `transform`, on every role."""
        return text

    def transform(self, messages: list[Message], *, index: int, seed: int) -> list[Message]:
        """Rewrite one row. Must depend on its arguments only, so that every start gives the same.

        Args:
            messages: the cleaned turns, without the system turn that the run adds.
            index: position of the row in its file, from 0.
            seed: `environment.seed`.
        """
        return messages

    def report(self) -> dict[str, int]:
        """What `transform` did to the rows so far, as counts for the data card."""
        return {}

    def logits_processors(
        self, tokenizer: Any, *, stop_ids: frozenset[int] = frozenset()
    ) -> list[Any]:
        """Fresh, batch-safe processors for one generation (state per row, none shared).

        Args:
            tokenizer: of the model that generates.
            stop_ids: tokens that end an answer.
        """
        return []

    def frame(self, answer: str) -> list[tuple[int, int]]:
        """Where a golden answer has what only frames it, such as markers.

        Returns:
            (start, end) in characters of `answer`.
        """
        return []

    def matches(self, answer: str, golden: str) -> bool:
        """Whether a generated answer says what the golden one says; spacing at the ends and
        between words does not count."""
        return answer.split() == golden.split()


def fill_date(template: str | None, *, date: dt.date) -> str | None:
    """Replace `{date}` by the ISO date; other braces stay as they are."""
    return None if template is None else template.replace("{date}", date.isoformat())


# ---- profile `plain`: rows as they are, no system prompt of its own, exact comparison


class PlainProfile(DataProfile):
    """The default: what is in the file is what is trained."""

    name = "plain"


# ---- profile `regime3`: short symbolic answers between `<<ANS_START>>` and `<<ANS_END>>`


ANS_START = "<<ANS_START>>"

ANS_END = "<<ANS_END>>"


class Regime3Profile(DataProfile):
    """Wraps every assistant turn in the markers and compares what stands between them."""

    name = "regime3"
    system_prompt_template = (
        "Write the answer in canonical form, (op arg1 arg2) = result, between "
        f"{ANS_START} and {ANS_END}. Write nothing else."
    )
    stop_strings = (ANS_END,)

    def transform(self, messages: list[Message], *, index: int, seed: int) -> list[Message]:
        """Wrap the assistant's words; marked turns stay, half-marked ones are completed."""
        turns = [turn.copy() for turn in messages]
        for turn in turns:
            if turn["role"] == "assistant" and not turn.get("tool_calls"):
                turn["content"] = wrap_answer(turn["content"])
        return turns

    def frame(self, answer: str) -> list[tuple[int, int]]:
        """The markers."""
        found = re.finditer(f"{re.escape(ANS_START)}|{re.escape(ANS_END)}", answer)
        return [marker.span() for marker in found]

    def matches(self, answer: str, golden: str) -> bool:
        """Compare what stands between the markers; an answer without both markers is wrong."""
        said = between_markers(answer)
        meant = between_markers(wrap_answer(golden))
        return said is not None and meant is not None and said.split() == meant.split()


def wrap_answer(text: str) -> str:
    """Put `text` between the markers; a marker that is there already is kept, not doubled."""
    body = text.strip()
    if ANS_START not in body:
        body = f"{ANS_START} {body}"
    if ANS_END not in body.split(ANS_START, 1)[1]:
        # An end marker in front of the start marker closes nothing, so it does not count.
        body = f"{body} {ANS_END}"
    return body


def between_markers(text: str) -> str | None:
    """What stands between the first start marker and the next end marker; None without both."""
    _, start, rest = text.partition(ANS_START)
    inner, end, _ = rest.partition(ANS_END)
    return inner.strip() if start and end else None
