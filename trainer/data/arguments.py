"""The arguments of tool calls: JSON text or an object in the rows, one of the two in a template."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from trainer.data.rows import BadRowError
from trainer.profiles import Message

ArgumentsForm = Literal["object", "text"]


def with_arguments(row: list[Message], form: ArgumentsForm | None) -> list[Message]:
    """The row with the arguments of its calls in the form that the chat template takes.

    Both spellings of the same arguments become the same; none, null and empty text are {}.

    Args:
        row: the turns; those without calls are handed on as they are.
        form: None where no form is known to be right, so that each stays as it is.
    Raises:
        BadRowError: text that is no JSON object, or that an object cannot hold exactly.
    """
    if not any(turn.get("tool_calls") for turn in row):
        return row
    turns = []
    for position, turn in enumerate(row):
        calls = turn.get("tool_calls")
        if calls:
            where = f"turn {position} ({turn['role']}), tool_calls"
            spelled = [_spelled(c, form, f"{where}[{n}]") for n, c in enumerate(calls)]
            turn = Message(**{**turn, "tool_calls": spelled})
        turns.append(turn)
    return turns


def _spelled(call: dict[str, Any], form: ArgumentsForm | None, where: str) -> dict[str, Any]:
    function = call["function"]
    value = parsed_arguments(function.get("arguments"), f"{where}.function.arguments")
    given: Any = json.dumps(value, ensure_ascii=False) if form == "text" else value
    return {**call, "function": {**function, "arguments": given}}


def parsed_arguments(value: Any, where: str) -> dict[str, Any]:
    """Arguments in either spelling as an object, members in their order.

    Raises:
        BadRowError: they are none, or would be changed by being read.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        value = _read(value, where)
    if not isinstance(value, dict):
        raise BadRowError(
            f"{where} is {json.dumps(value, ensure_ascii=False)[:60]}, a JSON "
            f"{type(value).__name__}; a call's arguments are an object such as "
            '{"city": "Oslo"}, or its JSON text',
            "broken arguments",
        )
    return value


def _read(text: str, where: str) -> Any:
    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is no number that can be written")
        return value

    def constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(
            text, object_pairs_hook=members, parse_float=number, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            f"{where} is text that is no JSON ({error}): {text[:60]!r}; mend it, or write the "
            "arguments as an object",
            "broken arguments",
        ) from error


def missing_arguments(arguments: Any, said: str) -> list[str]:
    """Names and texts of a call's arguments that do not stand in what its turn says.

    Args:
        arguments: as the template was given them.
        said: the turn as the template wrote it.
    """
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [leaf for leaf in _texts(value) if not any(form in said for form in _spellings(leaf))]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, part in value.items() for text in (str(key), *_texts(part))]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return []


def _spellings(text: str) -> tuple[str, ...]:
    """A text as templates write it: as it is, in JSON, in JSON of ASCII only, in Python."""
    return (
        text,
        *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True)),
        repr(text)[1:-1],
    )
