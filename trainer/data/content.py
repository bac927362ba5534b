"""Texts of rows in the spellings that people bring: plain, lists of parts, numbers, thoughts."""

from __future__ import annotations

import json
import math
from typing import Any

from trainer.data.flags import is_given
from trainer.data.rows import BadRowError, RowNotes

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold what it thinks."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are words -> the key that holds them."""
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


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


def take_list(row: dict[str, Any], key: str) -> list[Any]:
    """The list under `key`, or its JSON text, as tables hold it.

    Raises:
        BadRowError: it is neither.
    """
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(
                f"{key!r} is text that is no JSON ({error})", f"{key} of wrong type"
            ) from error
    found: list[Any] = take({**row, key: value} if key in row else row, key, list)
    return found


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
        words, thoughts = split_parts(value, f"{where}{key}")
        if not thoughts:
            return words
    text: str = take(row, key, str)
    return text


def is_parts(value: Any) -> bool:
    """Whether a value is a list of content parts; a tool's result may be any JSON."""
    return isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    )


def split_parts(parts: list[Any], where: str) -> tuple[str, str]:
    """The words and the thoughts of a list of content parts, each joined as they follow.

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
        value = part.get(key)
        if is_thought and isinstance(value, list):
            value = "".join(split_parts(value, f"{at}.{key}"))
        if not isinstance(value, str):
            raise BadRowError(
                f"{at}.{key} is {type(value).__name__}; it must be str", "broken part"
            )
        found[is_thought] += value
    return found[False], found[True]


def take_thought(turn: dict[str, Any], where: str) -> str:
    """What a turn thinks, "" for nothing.

    Raises:
        BadRowError: it is no text, or is said twice and differently.
    """
    thoughts = {}
    for key in THOUGHT_KEYS:
        value = turn.get(key)
        if isinstance(value, list) and value:
            value = "".join(split_parts(value, f"{where}{key}"))
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
        raise BadRowError(f"{where} is {value}, which is no number", "not a number")
    return as_json_text(value)


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
