"""File rows (messages, question/answer, prompt/completion) -> messages; errors say file:line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.profiles import Message

KNOWN_ROLES = ("system", "user", "assistant")
MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str
    """`file:line` for JSONL, `file[index]` for a JSON array."""
    index: int
    """Position in the file from 0, bad rows counted."""
    messages: list[Message]


@dataclass
class RowErrors:
    """Rows that could not be used, and why."""

    policy: str
    """`strict` or `skip` (data.on_bad_row)."""
    errors: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, message: str, reason: str) -> None:
        """Note one bad row."""
        self.errors.append(f"{where}: {message}")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def raise_if_strict(self) -> None:
        """Stop with the first 20 errors when the policy says so.

        Raises:
            DataError: there is a bad row and the policy is strict.
        """
        if not self.errors or self.policy != "strict":
            return
        shown = "\n  ".join(self.errors[:MAX_ERRORS_SHOWN])
        more = len(self.errors) - MAX_ERRORS_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        raise DataError(
            f"{len(self.errors)} bad rows:\n  {shown}{tail}\n"
            "Mend them, or set data.on_bad_row=skip to leave them out and count them."
        )


class BadRowError(ValueError):
    """One row is wrong; `reason` is the short name under which it is counted."""

    def __init__(self, message: str, reason: str) -> None:
        """Keep the message for the user and the reason for the count."""
        super().__init__(message)
        self.reason = reason


def read_rows(
    path: Path, format_name: str, errors: RowErrors, max_rows: int | None
) -> tuple[list[Row], str]:
    """Read a JSONL or JSON file.

    Args:
        path: the file; `.json` may hold an array of rows or be JSONL.
        format_name: `auto` or one of FORMATS.
        errors: receives the bad rows.
        max_rows: read no more than this many rows, bad ones counted.
    Returns:
        The rows in file order and the name of their format.
    Raises:
        DataError: the file is missing, empty, not UTF-8 text, or of no known format.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what}. Give a JSONL or JSON file with --dataset.")
    rows: list[Row] = []
    convert: Callable[[dict[str, Any]], list[Message]] | None = None
    count = 0
    for index, (where, parsed) in enumerate(_raw_rows(path)):
        if max_rows is not None and index >= max_rows:
            break
        count += 1
        try:
            if isinstance(parsed, BadRowError):
                raise parsed
            row = _as_object(parsed)
            if convert is None:
                format_name = detect_format(row) if format_name == "auto" else format_name
                convert = FORMATS[format_name]
            rows.append(Row(where, index, check_messages(convert(row))))
        except BadRowError as error:
            errors.add(where, str(error), error.reason)
    if count == 0:
        raise DataError(f"{path}: the file is empty. Give a file with at least one row.")
    return rows, format_name


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, parsed JSON or BadRowError) of each row; blank lines are no rows."""
    if path.suffix == ".json" and _first_byte(path) == b"[":
        yield from _array_rows(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a UTF-8 BOM is not part of the row
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    parsed = _parse_line(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(parsed, BadRowError):
        raise DataError(f"{path}: {parsed}. A .json file must be one array of rows, or JSONL.")
    for index, row in enumerate(parsed):
        yield f"{path}[{index}]", row


def _parse_line(line: bytes) -> Any:
    """Parse strict JSON; what is wrong comes back as a BadRowError value."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 text (byte {error.start} of the line)", "not UTF-8")
    except json.JSONDecodeError as error:
        at = (
            f"line {error.lineno} column {error.colno}"
            if error.lineno > 1
            else f"column {error.colno}"
        )
        return BadRowError(f"not valid JSON: {error.msg} at {at}", "not JSON")
    except RecursionError:
        return BadRowError("not usable JSON: nested too deeply", "not JSON")
    except BadRowError as error:
        return error


def _refuse_constant(name: str) -> None:
    raise BadRowError(f"not valid JSON: {name} is no JSON number", "not JSON")


def _as_object(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise BadRowError(
            f"row is a JSON {type(parsed).__name__}; it must be an object such as "
            '{"question": "...", "answer": "..."}',
            "not an object",
        )
    return parsed


def detect_format(row: dict[str, Any]) -> str:
    """Name the format of a row by its keys.

    Raises:
        BadRowError: no format has these keys.
    """
    for name, keys in FORMAT_KEYS.items():
        if keys <= set(row):
            return name
    wanted = "; ".join(f"{' and '.join(sorted(keys))}" for keys in FORMAT_KEYS.values())
    raise BadRowError(
        f"row has the keys {sorted(row)}; it needs one of: {wanted}", "no known format"
    )


def _from_messages(row: dict[str, Any]) -> list[Message]:
    turns = _take(row, "messages", list)
    messages = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRowError(
                f"messages[{position}] is a {type(turn).__name__}; it must be an object with "
                "role and content",
                "broken messages",
            )
        extra = sorted(set(turn) - {"role", "content", "name"})
        if any(turn[key] for key in extra):
            raise BadRowError(
                f"messages[{position}] has {extra}, which this version cannot train on; "
                "it takes role and content",
                "unsupported turn",
            )
        messages.append(Message(role=_take(turn, "role", str), content=_take(turn, "content", str)))
    return messages


def _from_question_answer(row: dict[str, Any]) -> list[Message]:
    return _two_turns(_take(row, "question", str), _take(row, "answer", str))


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    return _two_turns(_take(row, "prompt", str), _take(row, "completion", str))


def _two_turns(user: str, assistant: str) -> list[Message]:
    return [Message(role="user", content=user), Message(role="assistant", content=assistant)]


def _take(row: dict[str, Any], key: str, kind: type) -> Any:
    if key not in row:
        raise BadRowError(f"row has no {key!r}; found keys {sorted(row)}", f"no {key}")
    value = row[key]
    if not isinstance(value, kind):
        raise BadRowError(
            f"{key!r} is {type(value).__name__}; it must be {kind.__name__}", f"{key} of wrong type"
        )
    return value


def check_messages(messages: list[Message]) -> list[Message]:
    """Refuse conversations that cannot be trained on.

    Raises:
        BadRowError: unknown role, system turn not first, no assistant turn, or an empty one.
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
    if any(not turn["content"].strip() for turn in messages if turn["role"] == "assistant"):
        raise BadRowError("an assistant turn is empty, so nothing to train", "empty assistant turn")
    return messages


FORMATS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "question_answer": _from_question_answer,
    "prompt_completion": _from_prompt_completion,
}
FORMAT_KEYS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "question_answer": frozenset({"question", "answer"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
}
