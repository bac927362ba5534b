"""How a chat template wants turns to be spelled, found once by rendering small conversations.

Templates disagree on three things: content is text or a list of parts, the arguments of a call are
an object or JSON text, and a thought is a key of its turn, a stretch of its content, or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from trainer.data.arguments import ArgumentsForm
from trainer.errors import TemplateError
from trainer.models.chat_template import in_parts, takes_parts
from trainer.profiles import Message

Render = Callable[[list[Message]], str]
"""The text of turns, which are handed to the template as they are."""
USER, SAYS, RESULT, THOUGHT = "quay zebra?", "juniper flax.", "oboe nine.", "vixen amber."
CALLED, ARGUMENTS = "probe_quartz", {"gnome": "wharf"}


@dataclass(frozen=True)
class Dialect:
    """What a template takes."""

    takes_parts: bool = False
    """Content is a list of {"type": "text", "text": ...}."""
    arguments: ArgumentsForm | None = None
    """How the arguments of calls are given; None: it writes them in neither form."""
    thought: Literal["key", "content"] | None = None
    """Where a thought is given: as the key `reasoning_content`, or between <think> and </think>
    before what is said; None: it writes none."""

    def spelled(self, turns: list[Message]) -> list[Message]:
        """The turns as the template takes them; their calls must have been spelled before."""
        return [self._turn(turn) for turn in turns]

    def _turn(self, turn: Message) -> Message:
        copy: dict[str, Any] = {key: part for key, part in turn.items() if key != "weight"}
        thought = copy.get("reasoning_content")
        if thought is not None and self.thought != "key":
            del copy["reasoning_content"]
            if self.thought == "content":
                said = f"\n\n{turn['content']}" if turn["content"] else ""
                copy["content"] = f"<think>\n{thought.strip()}\n</think>{said}"
        if self.takes_parts:
            [copy] = in_parts([copy])
        return cast(Message, copy)


def find_dialect(tokenizer: Any, render: Render) -> Dialect:
    """Find what a tokenizer's template takes.

    Args:
        tokenizer: with the template.
        render: renders turns by it.
    """
    is_parts = takes_parts(tokenizer)

    def spelled(turns: list[Message]) -> str:
        return render(Dialect(is_parts, thought="key").spelled(turns))

    form = _arguments(spelled)
    return Dialect(is_parts, form, _thought(spelled, form, tokenizer.chat_template))


def question(content: str = USER) -> Message:
    """A user's turn."""
    return Message(role="user", content=content)


def answer(content: str = SAYS, **more: Any) -> Message:
    """An assistant's turn."""
    return Message(role="assistant", content=content, **more)


def call_turn(form: ArgumentsForm | None, **more: Any) -> Message:
    """An assistant's turn that calls a function."""
    arguments = json.dumps(ARGUMENTS) if form == "text" else ARGUMENTS
    function = {"name": CALLED, "arguments": arguments}
    return answer(
        "", tool_calls=[{"id": CALL_ID, "type": "function", "function": function}], **more
    )


def result_turn() -> Message:
    """What the function called answers."""
    return Message(role="tool", content=RESULT, name=CALLED, tool_call_id=CALL_ID)


CALL_ID = "call00001"  # nine letters and digits: some templates refuse others


def _arguments(render: Render) -> ArgumentsForm | None:
    """The form in which the arguments stand once, decoded."""
    forms: tuple[ArgumentsForm, ...] = ("object", "text")
    for form in forms:
        try:
            text = render([question(), call_turn(form), result_turn(), answer()])
        except TemplateError:
            continue
        [(name, value)] = ARGUMENTS.items()
        is_once = text.count(name) == text.count(value) == 1
        if form == "text" and is_once and json.dumps(ARGUMENTS) in text:
            return form
        # An object put into text by Python is no JSON: such a template wants text.
        if form == "object" and is_once and repr(ARGUMENTS) not in text:
            return form
    return None


def _thought(
    render: Render, form: ArgumentsForm | None, source: str
) -> Literal["key", "content"] | None:
    """Where a thought must be given to stand in an answer, or at least in a call."""
    turns = [answer(reasoning_content=THOUGHT), call_turn(form, reasoning_content=THOUGHT)]
    if any(_count(render, [question(), turn]) == 1 for turn in turns):
        return "key"
    # A template that speaks of thoughts and drops them is not to be led round that.
    if "</think>" in source or not re.search("reasoning|think", source):
        inside = Dialect(thought="content").spelled([question(), turns[0]])
        if _count(render, inside) == 1:
            return "content"
    return None


def _count(render: Render, turns: list[Message]) -> int:
    """How often a template writes the thought of turns; 0 where it refuses them."""
    try:
        return render(turns).count(THOUGHT)
    except TemplateError:
        return 0
