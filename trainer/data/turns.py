"""Lists of turns in the spellings that people bring -> messages, checked."""

from __future__ import annotations

import json
import math
from typing import Any

from trainer.data.rows import BadRowError, RowNotes
from trainer.data.tools import call_of_function, calls_from_value, check_calls
from trainer.data.turn_flags import TURN_FLAGS, is_given, speaks_of_training, turn_weight
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

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold what it thinks."""

PLAIN_KEYS = {"role", "content"}

TURN_KEYS = frozenset(
    {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call"}
    | {*THOUGHT_KEYS}
)
"""Keys of a turn that are used, beside the flags (`turn_flags.TURN_FLAGS`)."""

CONTENT_KEYS = frozenset(
    {"tool_plan", "image", "images", "audio", "audios", "video", "videos", "recipient", "channel"}
)
"""Keys of a turn with content that the model would miss: bad rows where they hold anything."""

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are words -> the key that holds them."""

THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


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
    if turn.keys() == PLAIN_KEYS and turn["role"] in KNOWN_ROLES and type(turn["content"]) is str:
        return Message(role=turn["role"], content=turn["content"])  # most turns are no more
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
                f"{where} has {key!r}, content that is not supported and would be lost; "
                "remove it, or put it into the turn's text",
                f"turn with {key}",
            )
        if speaks_of_training(key):
            raise BadRowError(
                f"{where} has {key!r}, which seems to say what is trained; known flags: "
                f"{', '.join(sorted(TURN_FLAGS))}. Rename or remove it",
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


# ---- texts: as they are, as lists of parts, as numbers; thoughts beside them


def take(row: dict[str, Any], key: str, kind: type) -> Any:
    """The value under `key`, which must be there and of this type.

    Raises:
        BadRowError: it is not.
    """
    if key not in row:
        raise BadRowError(f"row has no {key!r}; found keys {sorted(row)}", f"no {key}")
    value = row[key]
    if not isinstance(value, kind):
        raise BadRowError(
            f"{key!r} is {type(value).__name__}; it must be {kind.__name__}", f"{key} of wrong type"
        )
    return value


def take_text(row: dict[str, Any], key: str, notes: RowNotes, where: str = "") -> str:
    """The text under `key`: as it is, the texts of a list of parts, or a number as JSON text.

    Raises:
        BadRowError: it is none of these, or a part is no text.
    """
    value = row.get(key)
    if isinstance(value, int | float):  # bool is an int
        notes.num_as_text += 1
        return _number_text(value, f"{where}{key}")
    if value and is_parts(value):
        words, thoughts = split_parts(value, f"{where}{key}", notes)
        if not thoughts:
            return words
    text: str = take(row, key, str)
    return text


def is_parts(value: Any) -> bool:
    """Whether a value is a list of content parts; a tool's result may be any JSON."""
    return isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    )


def split_parts(parts: list[Any], where: str, notes: RowNotes) -> tuple[str, str]:
    """The words and the thoughts of a list of content parts, each joined as they follow.

    Args:
        notes: told of keys of parts that are not used.
    Raises:
        BadRowError: a part is no text; it is named with its kind.
    """
    found: dict[bool, str] = {True: "", False: ""}
    for position, part in enumerate(parts):
        if isinstance(part, str) and len(parts) == 1:
            return part, ""
        at = f"{where}[{position}]"
        if not isinstance(part, dict):  # several texts may be alternatives, so they are not joined
            raise BadRowError(
                f"{at} is {type(part).__name__}; a part of a content is an object such as "
                '{"type": "text", "text": "..."}',
                "broken part",
            )
        kind = part.get("type") or ("text" if "text" in part else None)
        is_thought = kind in THOUGHT_PARTS
        key = {**TEXT_PARTS, **THOUGHT_PARTS}.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise BadRowError(
                f"{at} is a part of type {kind!r}; only parts of text can be trained on, such as "
                '{"type": "text", "text": "..."}',
                f"part of type {str(kind)[:40]}",
            )
        _check_part(part, key, at, notes)
        value = part.get(key)
        if is_thought and isinstance(value, list):
            value = "".join(split_parts(value, f"{at}.{key}", notes))
        if not isinstance(value, str):
            raise BadRowError(
                f"{at}.{key} is {type(value).__name__}; it must be str", "broken part"
            )
        found[is_thought] += value
    return found[False], found[True]


def _check_part(part: dict[str, Any], key: str, where: str, notes: RowNotes) -> None:
    """Refuse a part of text that brings other content, and count keys without an effect."""
    for other, value in part.items():
        if other in ("type", key) or not is_given(value):
            continue
        if other in CONTENT_KEYS:
            raise BadRowError(
                f"{where} has {other!r}, content that is not supported and would be lost",
                f"part with {other}",
            )
        notes.note_unused(f"content[].{other}")


def take_thought(turn: dict[str, Any], where: str, notes: RowNotes) -> str:
    """What a turn thinks, "" for nothing.

    Raises:
        BadRowError: it is no text, or is said twice and differently.
    """
    thoughts = {}
    for key in THOUGHT_KEYS:
        value = turn.get(key)
        if isinstance(value, list) and value:
            value = "".join(split_parts(value, f"{where}{key}", notes))
        if not is_given(value):
            continue
        if not isinstance(value, str):
            raise BadRowError(
                f"{where}{key} is {type(value).__name__}; a thought must be text", "broken thought"
            )
        if value.strip():
            thoughts[key] = value
    if len(set(thoughts.values())) > 1:
        raise BadRowError(
            f"{where}{' and '.join(thoughts)} differ; a turn has one thought", "two thoughts"
        )
    return next(iter(thoughts.values()), "")


def as_json_text(value: Any) -> str:
    """A value as JSON text in one line."""
    return json.dumps(value, ensure_ascii=False)


def _number_text(value: float, where: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(f"{where} is {value}, which is not a number", "not a number")
    return as_json_text(value)


# ---- what a conversation must have to be trained on


def num_openings(messages: list[Message]) -> int:
    """Assistant turns before the first user turn: they answer nothing."""
    count = 0
    for turn in messages:
        if turn["role"] == "user":
            break
        count += turn["role"] == "assistant"
    return count


def leave_openings(messages: list[Message]) -> list[Message]:
    """Greetings before the first user turn are read and not trained: no prompt asks for them.

    Raises:
        BadRowError: a flag asks to train one.
    """
    opened = num_openings(messages)
    if not opened:
        return messages
    for turn in [turn for turn in messages if turn["role"] == "assistant"][:opened]:
        if turn.get("weight"):
            raise BadRowError(
                "an assistant turn before the first user turn asks to be trained, and no prompt "
                "asks for it; set its flag to false, or put a user turn before it",
                "flag on an opening turn",
            )
        turn["weight"] = 0.0
    return messages


def assistant_turns(row: list[Message]) -> list[int]:
    """Positions of the assistant's turns that answer something: those behind a user turn."""
    first = 0
    for index, turn in enumerate(row):
        if turn["role"] == "user":
            first = index
            break
    return [n for n in range(first + 1, len(row)) if row[n]["role"] == "assistant"]


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
        for text in (turn["content"], turn.get("reasoning_content", "")):
            if not is_plain(text):
                check_text(text, f"turn {position}")
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


def is_plain(text: str) -> bool:
    """Whether a look tells that a text is one that `check_text` takes."""
    return text.isascii() and "\0" not in text


def check_text(text: str, where: str) -> None:
    """JSON can spell characters that are no text: half of a pair, and NUL.

    Raises:
        BadRowError: `where` holds one of them.
    """
    if "\0" in text:
        raise BadRowError(f"{where} contains a NUL character", "NUL in text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{where} contains an unpaired surrogate at character {error.start}, which is not text",
            "not text",
        ) from error
