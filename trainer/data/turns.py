"""Lists of turns -> messages, and what every conversation must be to be trained on."""

from __future__ import annotations

from typing import Any

from trainer.data.rows import BadRowError
from trainer.data.tools import calls_from_text
from trainer.data.tools import tool_names as tool_names
from trainer.profiles import Message

KNOWN_ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


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


def take_text(row: dict[str, Any], key: str) -> str:
    """The text under `key`."""
    text: str = take(row, key, str)
    return text


def from_turns(turns: list[Any], name: str) -> list[Message]:
    """Turns with `role` and `content`; `name` is the row's key that holds them."""
    messages = []
    for position, turn in enumerate(turns):
        where = f"{name}[{position}]"
        _check_turn(turn, where, TURN_KEYS, "role, content and tool_calls")
        calls = turn.get("tool_calls")
        # An assistant that only calls tools says nothing, which is often written as null.
        is_silent = bool(calls) and turn.get("content") is None
        content = "" if is_silent else take_text(turn, "content")
        message = Message(role=take_text(turn, "role"), content=content)
        if calls:
            message["tool_calls"] = _tool_calls(calls, message["role"], where)
        if turn.get("name") is not None:
            message["name"] = take_text(turn, "name")
        if turn.get("tool_call_id") is not None:
            message["tool_call_id"] = take_text(turn, "tool_call_id")
        messages.append(message)
    return messages


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Calls of an assistant turn, each {"function": {"name": ..., "arguments": ...}}."""
    is_list = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    if role != "assistant" or not is_list or not all(tool_names(calls)):
        raise BadRowError(
            f"{where} has tool_calls that are none; an assistant turn's are a list of "
            '{"type": "function", "function": {"name": "...", "arguments": {...}}}',
            "broken tool_calls",
        )
    found: list[dict[str, Any]] = calls
    return found


def from_sharegpt(turns: list[Any]) -> list[Message]:
    """Turns with `from` and `value`; `human` is the user, `gpt` the assistant.

    `function_call` is an assistant's turn that calls tools, `observation` what they answer.
    """
    messages = []
    for position, turn in enumerate(turns):
        where = f"conversations[{position}]"
        _check_turn(turn, where, {"from", "value"}, "from and value")
        speaker = take_text(turn, "from")
        if speaker not in SHAREGPT_ROLES:
            raise BadRowError(
                f"{where} is from {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}", "unknown role"
            )
        text = take_text(turn, "value")
        message = Message(role=SHAREGPT_ROLES[speaker], content=text)
        if speaker == "function_call":
            calls = calls_from_text(text, f"{where}.value")
            message = Message(role="assistant", content="", tool_calls=calls)
        messages.append(message)
    return messages


def _check_turn(turn: Any, where: str, known: set[str], words: str) -> None:
    """Refuse turns that are no objects, and keys that would have to have an effect."""
    if not isinstance(turn, dict):
        raise BadRowError(
            f"{where} is a {type(turn).__name__}; it must be an object with {words}",
            "broken messages",
        )
    # `weight: 0` means "do not train this turn", so that it is no empty value; 1 changes nothing.
    extra = sorted(
        key
        for key, value in turn.items()
        if key not in known and (value != 1 and value is not None if key == "weight" else value)
    )
    if extra:
        raise BadRowError(
            f"{where} has {extra}, which this version cannot train on; it takes {words}",
            "unsupported turn",
        )


def check_messages(messages: list[Message]) -> list[Message]:
    """Refuse conversations that cannot be trained on.

    Raises:
        BadRowError: unknown role, system turn not first, no assistant turn, an empty one, or
            text that no tokenizer takes.
    """
    for position, turn in enumerate(messages):
        if turn["role"] not in KNOWN_ROLES:
            raise BadRowError(
                f"messages[{position}] has role {turn['role']!r}; known: {', '.join(KNOWN_ROLES)}",
                "unknown role",
            )
        if turn["role"] == "system" and position > 0:
            raise BadRowError(
                f"messages[{position}] is a system turn; it must be the first",
                "system turn not first",
            )
        check_text(turn["content"], f"turn {position}")
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise BadRowError(
            f"row has no assistant turn, so nothing to train; its roles: {roles}",
            "no assistant turn",
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRowError(
            f"row has no user turn before the first assistant turn; its roles: {roles}",
            "no user turn first",
        )
    if any(
        not turn["content"].strip() and not turn.get("tool_calls")
        for turn in messages
        if turn["role"] == "assistant"
    ):
        raise BadRowError("an assistant turn is empty, so nothing to train", "empty assistant turn")
    return messages


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
            f"{where} contains half of a surrogate pair at character {error.start}, which is no "
            "text",
            "not text",
        ) from error
