"""Rows -> messages, for every layout we know; errors say file:line. Reading is in `files.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.files import RawRow, raw_rows
from trainer.data.plain_text import check_text_row, is_text
from trainer.data.rows import MAX_ERRORS_SHOWN, BadRowError, Row, RowErrors
from trainer.data.tools import with_tools
from trainer.data.turns import check_messages, from_sharegpt, from_turns, take, take_text
from trainer.errors import DataError
from trainer.profiles import Message

__all__ = [
    "FORMATS",
    "MAX_ERRORS_SHOWN",
    "BadRowError",
    "Format",
    "Row",
    "RowErrors",
    "check_messages",
    "detect_format",
    "read_rows",
    "to_rows",
]

NO_FORMAT = "no known format"


@dataclass(frozen=True)
class Format:
    """A layout of rows."""

    keys: frozenset[str]
    """Keys that a row of this layout must have; they also tell it from the others."""
    optional: frozenset[str]
    """Keys that are used where they are."""
    convert: Callable[[dict[str, Any]], list[Message]]


def read_rows(
    path: Path,
    format_name: str,
    errors: RowErrors,
    max_rows: int | None,
    *,
    columns: Mapping[str, str] | None = None,
    first_index: int = 0,
    source: int = 0,
) -> tuple[list[Row], str]:
    """Read one file.

    Args:
        path: of a kind that `files.py` reads.
        format_name: `auto` or one of FORMATS.
        errors: receives the bad rows.
        max_rows: read no more than this many rows, bad ones counted.
        columns: a format's key -> the file's name for it.
        first_index: index of the first row.
        source: which of the run's files this is.
    Returns:
        The rows in file order and the name of their format.
    Raises:
        DataError: the file is missing, empty or damaged.
    """
    return to_rows(
        raw_rows(path),
        str(path),
        format_name,
        errors,
        max_rows,
        columns=columns,
        first_index=first_index,
        source=source,
    )


def to_rows(
    raw: Iterable[RawRow],
    name: str,
    format_name: str,
    errors: RowErrors,
    max_rows: int | None,
    *,
    columns: Mapping[str, str] | None = None,
    first_index: int = 0,
    source: int = 0,
) -> tuple[list[Row], str]:
    """Turn raw rows of the file called `name` into messages; the rest is as in `read_rows`."""
    rows: list[Row] = []
    strange: list[str] = []
    known = None if format_name == "auto" else format_name
    count = 0
    for index, (where, parsed) in enumerate(raw, start=first_index):
        if max_rows is not None and count >= max_rows:
            break
        count += 1
        try:
            if isinstance(parsed, BadRowError):
                raise parsed
            row = _renamed(_as_object(parsed), columns or {})
            row = _in_usual_spelling(row, known)
            known = known or detect_format(row)
            _refuse_change(row, known, is_found=format_name == "auto")
            messages = FORMATS[known].convert(row)
            if not is_text(messages):
                check_messages(messages)
            rows.append(Row(where, index, messages, source))
        except BadRowError as error:
            errors.add(where, str(error), error.reason)
            if error.reason == NO_FORMAT:
                strange.append(f"{where}: {error}")
    if count == 0:
        raise DataError(f"{name}: the file is empty. Give a file with at least one row.")
    if known is None and count == len(strange) > 1:
        raise DataError(
            f"{strange[0]}. None of the file's {count:,} rows has the keys of a known format."
        )
    return rows, known or format_name


def _as_object(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise BadRowError(
            f"row is a JSON {type(parsed).__name__}; it must be an object such as "
            '{"question": "...", "answer": "..."}',
            "not an object",
        )
    return parsed


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's own keys."""
    renamed = {key: value for key, value in row.items() if key not in columns}
    for key, column in columns.items():
        if column not in row:
            raise BadRowError(
                f"row has no {column!r}, which data.columns names for {key!r}; "
                f"found keys {sorted(row)}",
                f"no {column}",
            )
        renamed.pop(column, None)
    return renamed | {key: row[column] for key, column in columns.items()}


def _in_usual_spelling(row: dict[str, Any], known: str | None) -> dict[str, Any]:
    """The row with a format's own keys where its keys differ in capitals or outer spaces only."""
    formats = [FORMATS[known]] if known else list(FORMATS.values())
    folded = {key.strip().casefold() for key in row}
    if any(layout.keys <= set(row) for layout in formats) or len(folded) < len(row):
        return row
    for layout in formats:
        if layout.keys <= folded:
            names = layout.keys | layout.optional
            usual = {key: key.strip().casefold() for key in row}
            return {usual[key] if usual[key] in names else key: row[key] for key in row}
    return row


def detect_format(row: dict[str, Any]) -> str:
    """Name the format of a row by its keys.

    Raises:
        BadRowError: no format has these keys.
    """
    for name, known in FORMATS.items():
        if known.keys <= set(row):
            return name
    wanted = "; ".join(" and ".join(sorted(known.keys)) for known in FORMATS.values())
    raise BadRowError(
        f"row has the keys {sorted(row)}; it needs one of: {wanted} "
        "(data.columns maps other names to these)",
        NO_FORMAT,
    )


def _refuse_change(row: dict[str, Any], name: str, *, is_found: bool) -> None:
    """A row of another layout than the file's is named as that, not as a row with holes."""
    if FORMATS[name].keys <= set(row):
        return
    others = [other for other, known in FORMATS.items() if known.keys <= set(row)]
    if others:
        why = "as its first row says" if is_found else "as data.format says"
        raise BadRowError(
            f"row is of format {others[0]!r}, but the file is {name!r}, {why}; "
            "put rows of one format into a file",
            "another format",
        )


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return with_tools(row, from_turns(take(row, "messages", list), "messages"))


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    turns = from_sharegpt(take(row, "conversations", list))
    return with_tools(row, [*_system_turn(row), *turns])


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    """`input` is put under `instruction`; `history` holds earlier [question, answer] pairs."""
    question = take_text(row, "instruction")
    extra = row.get("input")
    if extra is not None and take_text(row, "input").strip():
        question = f"{question}\n\n{extra}"
    turns = _system_turn(row)
    history = take(row, "history", list) if row.get("history") else []
    for position, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise BadRowError(
                f"history[{position}] must be a pair of texts, [question, answer]",
                "broken history",
            )
        turns += _two_turns(*pair)
    return [*turns, *_two_turns(question, take_text(row, "output"))]


def _from_question_answer(row: dict[str, Any]) -> list[Message]:
    turns = _two_turns(take_text(row, "question"), take_text(row, "answer"))
    return [*_system_turn(row), *turns]


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    """Both are texts, or both are lists of turns, of which the completion's are trained."""
    if not isinstance(row.get("prompt"), list):
        return _two_turns(take_text(row, "prompt"), take_text(row, "completion"))
    prompt = from_turns(row["prompt"], "prompt")
    if any(turn["role"] == "assistant" for turn in prompt):
        raise BadRowError(
            "'prompt' holds an assistant turn, which would be trained like the completion; "
            "use the format 'messages' if it should be, else take it out",
            "assistant turn in prompt",
        )
    return with_tools(row, [*prompt, *from_turns(take(row, "completion", list), "completion")])


def _from_text(row: dict[str, Any]) -> list[Message]:
    return [check_text_row(take_text(row, "text"))]


def _two_turns(user: str, assistant: str) -> list[Message]:
    return [Message(role="user", content=user), Message(role="assistant", content=assistant)]


def _system_turn(row: dict[str, Any]) -> list[Message]:
    """The row's own system prompt; none where the key is missing or empty."""
    if row.get("system") is None or not take_text(row, "system").strip():
        return []
    return [Message(role="system", content=row["system"])]


FORMATS: dict[str, Format] = {
    "messages": Format(frozenset({"messages"}), frozenset({"tools"}), _from_messages),
    "sharegpt": Format(
        frozenset({"conversations"}), frozenset({"system", "tools"}), _from_sharegpt
    ),
    "question_answer": Format(
        frozenset({"question", "answer"}), frozenset({"system"}), _from_question_answer
    ),
    "prompt_completion": Format(
        frozenset({"prompt", "completion"}), frozenset({"tools"}), _from_prompt_completion
    ),
    "alpaca": Format(
        frozenset({"instruction", "output"}),
        frozenset({"input", "system", "history"}),
        _from_alpaca,
    ),
    "text": Format(frozenset({"text"}), frozenset(), _from_text),
}
"""The layouts by name, in the order in which they are looked for."""
