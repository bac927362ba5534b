"""A row under a chat template: its text, the same with marks, and the prompts of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.arguments import with_arguments
from trainer.data.marks import TurnMarks, has_marks, marked, without_marks
from trainer.data.rows import BadRowError
from trainer.data.template import ChatTemplate
from trainer.profiles import Message


@dataclass(frozen=True)
class Rendered:
    """One row under the template."""

    row: list[Message]
    text: str
    with_marks: str
    """The same text with the marks of `marks` in it."""
    marks: list[TurnMarks]
    prompts: list[str]
    """For each assistant turn the marked turns before it, with the header that asks for it."""
    is_thinking: bool
    mask: list[int] | None
    """1 where the template's own generation markers are."""


def assistant_turns(row: list[Message]) -> list[int]:
    """Positions of the assistant's turns that answer something: those behind a user turn."""
    roles = [turn["role"] for turn in row]
    first = roles.index("user") if "user" in roles else 0
    return [index for index, role in enumerate(roles) if role == "assistant" and index > first]


def lost_thought(where: str) -> BadRowError:
    """The error of a row whose thought the template would lose."""
    return BadRowError(
        f"{where} has a thought, which the model's chat template does not write there; take it "
        "out, or give a template that writes it (model.chat_template)",
        "template without thoughts",
    )


def thinks(turn: Message) -> bool:
    """Whether a turn brings a thought, as a key or in its content."""
    return bool(turn.get("reasoning_content", "").strip()) or "</think>" in turn["content"]


def render_row(template: ChatTemplate, row: list[Message]) -> Rendered:
    """A row's text, the same with marks, and its prompts.

    Raises:
        BadRowError: the arguments of a call, or the row's thoughts, cannot be given to the
            template, or its text changes with the marks.
        TemplateError: the template refuses the row.
    """
    row = _spelled(template, row)
    last_user = max((n for n, turn in enumerate(row) if turn["role"] == "user"), default=0)
    is_thinking = any(thinks(t) for t in row[last_user:] if t["role"] == "assistant")
    text = template.text(row, thinking=is_thinking)
    if has_marks(text):
        raise BadRowError(
            "row holds characters above U+108000 (private use), which stand for no text; "
            "take them out of the data",
            "not text",
        )
    for only_answers in (False, True):
        turns, marks = marked(row, only_answers=only_answers)
        with_marks = template.text(turns, thinking=is_thinking)
        if without_marks(with_marks) == text:
            break
    else:
        raise BadRowError(
            "the model's chat template changes what it writes with the ends of the turns, so "
            "it cannot be proved which tokens the assistant writes",
            "template not provable",
        )
    prompts = [
        template.text(turns[:turn], ask=True, thinking=is_thinking) for turn in assistant_turns(row)
    ]
    mask = template.marker_mask(row, thinking=is_thinking)
    return Rendered(row, text, with_marks, marks, prompts, is_thinking, mask)


def _spelled(template: ChatTemplate, row: list[Message]) -> list[Message]:
    """The row with its calls as the template takes them."""
    dialect = template.dialect
    row = with_arguments(row, dialect.arguments)
    for position, turn in enumerate(row):
        if turn.get("reasoning_content", "").strip() and dialect.thought is None:
            raise lost_thought(f"turn {position} ({turn['role']})")
    return row
