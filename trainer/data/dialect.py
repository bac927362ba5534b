"""How a chat template wants turns to be spelled, found once by rendering small conversations.

Templates disagree on three things: content is text or a list of parts, the arguments of a call are
an object or JSON text, and a thought is a key of its turn, a stretch of its content, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.data.arguments import ArgumentsForm
from trainer.errors import TemplateError
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
    """Where a thought is given; None: it writes none."""

    def spelled(self, turns: list[Message]) -> list[Message]:
        """The turns as the template takes them; their calls must have been spelled before."""
        return [self._turn(turn) for turn in turns]

    def _turn(self, turn: Message) -> Message:
        copy: dict[str, Any] = {key: part for key, part in turn.items() if key != "weight"}
        thought = copy.get("reasoning_content")
        if thought is not None and self.thought != "key":
            del copy["reasoning_content"]
            if self.thought == "content":
                copy["content"] = f"<think>\n{thought.strip()}\n</think>\n\n{turn['content']}"
        if self.takes_parts:
            copy["content"] = [{"type": "text", "text": copy["content"]}]
        return Message(**copy)  # type: ignore[typeddict-item]


def find_dialect(render: Render, source: str) -> Dialect:
    """Find what a template takes.

    Args:
        render: renders turns by it.
        source: its own text.
    Raises:
        TemplateError: it renders a question and an answer in no form; its words are in the message.
    """
    takes_parts = _takes_parts(render)

    def spelled(turns: list[Message]) -> str:
        return render(Dialect(takes_parts, thought="key").spelled(turns))

    return Dialect(takes_parts, _arguments(spelled), _thought(spelled, source))


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


def _takes_parts(render: Render) -> bool:
    row = [question(), answer()]
    try:
        text = render(row)
        if USER in text and SAYS in text:
            return False
        error = None
    except TemplateError as refusal:
        error = refusal
    try:
        text = render(Dialect(takes_parts=True).spelled(row))
        if USER in text and SAYS in text:
            return True
    except TemplateError:
        pass  # the refusal of plain text says more
    if error is not None:
        raise error
    return False


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


def _thought(render: Render, source: str) -> Literal["key", "content"] | None:
    """Where a thought must be given to stand in the last turn."""
    row = [question(), answer(reasoning_content=THOUGHT)]
    if render(row).count(THOUGHT) == 1:
        return "key"
    # Markers in the content are the family's own way only where its template knows them.
    if "</think>" in source:
        inside = Dialect(thought="content").spelled(row)
        if render(inside).count(THOUGHT) == 1:
            return "content"
    return None
