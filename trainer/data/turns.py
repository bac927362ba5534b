"""Lists of turns -> messages, checked, and rendered under a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.data.content import (
    CONTENT_KEYS,
    THOUGHT_KEYS,
    as_json_text,
    check_text,
    is_parts,
    split_parts,
    take_text,
    take_thought,
)
from trainer.data.rows import (
    TURN_FLAGS,
    BadRowError,
    RowNotes,
    is_given,
    speaks_of_training,
    turn_weight,
)
from trainer.data.template import ChatTemplate, TurnMarks, has_marks, marked, without_marks
from trainer.data.tools import (
    call_of_function,
    calls_from_value,
    check_calls,
    with_arguments,
)
from trainer.profiles import Message

KNOWN_ROLES = ("system", "user", "assistant", "tool")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Who may speak, under any of the names that files use -> the role."""

CALL_ROLES = ("function_call", "tool_call")
"""Turns of these are an assistant's calls, written as JSON."""

TURN_KEYS = frozenset(
    {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call"}
    | {*THOUGHT_KEYS}
)
"""Keys of a turn that are used, beside the flags (`flags.TURN_FLAGS`)."""


def from_turns(turns: list[Any], name: str, notes: RowNotes) -> list[Message]:
    """Turns with `role` and `content`, or `from` and `value`.

    Args:
        name: the row's key that holds them.
        notes: told of keys that are not used and of numbers taken as text.
    Raises:
        BadRowError: a turn is none, or has a key that would have to have an effect.
    """
    return [_message(turn, f"{name}[{n}]", name, notes) for n, turn in enumerate(turns)]


def _message(turn: Any, where: str, name: str, notes: RowNotes) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(
            f"{where} is a {type(turn).__name__}; it must be an object with role and content",
            "broken messages",
        )
    _check_keys(turn, where, name, notes)
    speaker = _speaker(turn, where)
    message = Message(role=ROLES[speaker], content="")
    if speaker in CALL_ROLES:
        value, key = _content(turn, where)
        message["tool_calls"] = calls_from_value(value, f"{where}.{key}")
    else:
        _fill(message, turn, where, notes)
    for key in ("name", "tool_call_id"):
        if is_given(turn.get(key)):
            message[key] = take_text(turn, key, notes, f"{where}.")  # type: ignore[literal-required]
    weight = turn_weight(turn, message["role"], where)
    if weight is not None:
        message["weight"] = weight
    return message


def _check_keys(turn: dict[str, Any], where: str, name: str, notes: RowNotes) -> None:
    """Refuse keys that would have to have an effect, and count those that have none."""
    for key, value in turn.items():
        if key in TURN_KEYS or key in TURN_FLAGS or not is_given(value):
            continue
        # Harmony's final channel is what everybody else's answers are.
        if key in CONTENT_KEYS and (key, value) != ("channel", "final"):
            raise BadRowError(
                f"{where} has {key!r}, content that cannot be trained on here and would be lost; "
                "take it out, or put it into the turn's text",
                f"turn with {key}",
            )
        if speaks_of_training(key):
            raise BadRowError(
                f"{where} has {key!r}, which seems to say what is trained; known flags: "
                f"{', '.join(sorted(TURN_FLAGS))}. Rename it, or take it out",
                "unknown flag",
            )
        notes.note_unused(f"{name}[].{key}")


def _speaker(turn: dict[str, Any], where: str) -> str:
    key = "role" if is_given(turn.get("role")) or "from" not in turn else "from"
    if key not in turn:
        raise BadRowError(
            f"{where} has neither 'role' nor 'from'; found keys {sorted(turn)}", "no role"
        )
    speaker = turn[key]
    if not isinstance(speaker, str):
        raise BadRowError(
            f"{where}: {key!r} is {type(speaker).__name__}; it must be str", "role of wrong type"
        )
    if speaker.strip().lower() not in ROLES:
        raise BadRowError(
            f"{where} has {key} {speaker!r}; known: {', '.join(ROLES)}", "unknown role"
        )
    return speaker.strip().lower()


def _content(turn: dict[str, Any], where: str) -> tuple[Any, str]:
    """What a turn says, and the key that it stands under."""
    said = {key: turn[key] for key in ("content", "value") if turn.get(key) is not None}
    if len(said) == 2 and said["content"] != said["value"]:
        raise BadRowError(f"{where} has a 'content' and another 'value'", "two contents")
    key = next(iter(said), "value" if "from" in turn and "role" not in turn else "content")
    return said.get(key), key


def _fill(message: Message, turn: dict[str, Any], where: str, notes: RowNotes) -> None:
    """Set words, thought and calls of a message."""
    value, key = _content(turn, where)
    thought = take_thought(turn, f"{where}.", notes)
    calls = _calls(turn, message["role"], where)
    if message["role"] == "tool" and isinstance(value, dict | list) and not is_parts(value):
        message["content"] = as_json_text(value)
        notes.num_as_text += 1
    elif isinstance(value, list):
        message["content"], inner = split_parts(value, f"{where}.{key}", notes)
        if thought and inner and thought != inner:
            raise BadRowError(f"{where} has two thoughts that differ", "two thoughts")
        thought = thought or inner
    # An assistant that only calls tools says nothing, which is often written as null.
    elif not (calls and value is None):
        message["content"] = take_text(turn, key, notes, f"{where}.")
    if thought.strip():
        if message["role"] != "assistant":
            raise BadRowError(
                f"{where} ({message['role']}) has a thought; only the assistant thinks",
                "thought of another",
            )
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls


def _calls(turn: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """Calls of an assistant turn, from `tool_calls` or from the older `function_call`."""
    calls = []
    if is_given(turn.get("tool_calls")):
        calls = check_calls(turn["tool_calls"], role, where)
    if is_given(turn.get("function_call")):
        old = call_of_function(turn["function_call"], role, where)
        if calls and [call["function"] for call in calls] != [old["function"]]:
            raise BadRowError(
                f"{where} has 'tool_calls' and another 'function_call'; keep one of them",
                "two calls",
            )
        calls = calls or [old]
    return calls


def joined_calls(messages: list[Message], turns: list[Any]) -> list[Message]:
    """Calls that files write as turns of their own, one after the other, are one turn.

    Args:
        turns: what the messages were made of, one for one.
    """
    joined: list[Message] = []
    was_call = False
    for message, turn in zip(messages, turns, strict=True):
        is_call = str(turn.get("role") or turn.get("from")).strip().lower() in CALL_ROLES
        if is_call and was_call and joined[-1].get("weight") == message.get("weight"):
            joined[-1]["tool_calls"] = [*joined[-1]["tool_calls"], *message["tool_calls"]]
        else:
            joined.append(message)
        was_call = is_call
    return joined


def num_openings(messages: list[Message]) -> int:
    """Assistant turns before the first user turn: they answer nothing."""
    roles = [turn["role"] for turn in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return roles[:first].count("assistant")


def leave_openings(messages: list[Message]) -> list[Message]:
    """Greetings before the first user turn are read and not trained: no prompt asks for them.

    Raises:
        BadRowError: a flag asks to train one.
    """
    opened = num_openings(messages)
    for turn in [turn for turn in messages if turn["role"] == "assistant"][:opened]:
        if turn.get("weight"):
            raise BadRowError(
                "an assistant turn before the first user turn asks to be trained, and no prompt "
                "asks for it; set its flag to false, or put a user turn before it",
                "flag on an opening turn",
            )
        turn["weight"] = 0.0
    return messages


def check_messages(messages: list[Message]) -> list[Message]:
    """Refuse conversations that cannot be trained on.

    Raises:
        BadRowError: unknown role, no user turn, no assistant turn behind it that is trained, an
            empty one, or text that no tokenizer takes.
    """
    for position, turn in enumerate(messages):
        if turn["role"] not in KNOWN_ROLES:
            raise BadRowError(
                f"messages[{position}] has role {turn['role']!r}; known: {', '.join(KNOWN_ROLES)}",
                "unknown role",
            )
        check_text(turn["content"], f"turn {position}")
        check_text(turn.get("reasoning_content", ""), f"turn {position}")
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise BadRowError(
            f"row has no assistant turn, so nothing to train; its roles: {roles}",
            "no assistant turn",
        )
    answers = [turn for turn in messages if turn["role"] == "assistant"][num_openings(messages) :]
    if not answers:
        raise BadRowError(
            f"row has no user turn that an assistant turn answers; its roles: {roles}",
            "no user turn first",
        )
    if not any(turn.get("weight", 1.0) for turn in answers):
        raise BadRowError(
            "the row's flags leave none of its assistant turns to train; take the row out, or "
            "train one of them",
            "nothing to train by its flags",
        )
    if any(
        not turn["content"].strip() and not turn.get("tool_calls") and turn.get("weight", 1.0)
        for turn in answers
    ):
        raise BadRowError("an assistant turn is empty, so nothing to train", "empty assistant turn")
    return messages


# ---- a row under a chat template: its text, the same with marks, and the prompts of its answers


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
