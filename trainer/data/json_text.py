"""JSON text -> values, strictly, and what is wrong with text that is none, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from trainer.data.rows import BadRowError
from trainer.data.text_files import as_windows_1252

SPACE = re.compile(r"[ \t\n\r]*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRowError(
            f"the key {twice!r} stands twice in one object; take one of them out",
            "key twice",
        )
    return found


def _refuse_constant(name: str) -> None:
    raise BadRowError(
        f"not valid JSON: {name} is no JSON number; write null, or leave the key out", "not JSON"
    )


STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
LENIENT = json.JSONDecoder(parse_int=str)
"""Only to find where a value ends that STRICT does not take."""


def parse(content: bytes) -> Any:
    """Parse one line; what is wrong comes back as a BadRowError value."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        text = f"not UTF-8 text (byte {error.start} of the line)"
        if content[error.start] < 0xFE:  # these two begin no text, in whatever encoding
            said = as_windows_1252(content)
            text += f"; as Windows-1252 it says {said!r}; save the file as UTF-8"
        return BadRowError(text, "not UTF-8")
    try:
        return STRICT.decode(text)
    except json.JSONDecodeError as error:
        return BadRowError(f"not valid JSON: {explain(error)}", "not JSON")
    except (RecursionError, BadRowError, ValueError) as error:
        return _unusable(error)


def _unusable(error: Exception) -> BadRowError:
    if isinstance(error, BadRowError):
        return error
    if isinstance(error, RecursionError):
        return BadRowError("not usable JSON: nested too deeply", "not JSON")
    # Python refuses integers of thousands of digits.
    return BadRowError("not usable JSON: a number with too many digits", "not JSON")


def values(text: str) -> Iterator[tuple[int, Any]]:
    """The JSON values that follow one another, each with the position at which it begins.

    Where the text begins with `[`, the elements of that array, counted from 0, and nothing may
    follow. A value that is JSON and no row (a key twice, NaN) comes as a BadRowError value.

    Raises:
        json.JSONDecodeError: the text is no JSON from some place on.
        RecursionError: it is nested too deeply to be told apart.
    """
    is_array = text[_skip(text, 0) : _skip(text, 0) + 1] == "["
    position = _skip(text, _skip(text, 0) + is_array)
    if is_array and text[position : position + 1] == "]":
        _expect_end(text, position + 1)
        return
    index = 0
    while position < len(text):
        start = position
        value, position = _value(text, position)
        yield index if is_array else start, value
        index, position = index + 1, _skip(text, position)
        if not is_array:
            continue
        mark = text[position : position + 1]
        if mark == "]":
            _expect_end(text, position + 1)
            return
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip(text, position + 1)
    if is_array:
        raise json.JSONDecodeError("Expecting value", text, position)


def _value(text: str, position: int) -> tuple[Any, int]:
    try:
        return STRICT.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (BadRowError, ValueError) as error:
        _, end = LENIENT.raw_decode(text, position)
        return _unusable(error), end


def _expect_end(text: str, position: int) -> None:
    position = _skip(text, position)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skip(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    return found.end() if found else position


def explain(error: json.JSONDecodeError) -> str:
    """The parser's words, the place, and what people mean who write this."""
    place = f"column {error.colno}"
    if error.lineno > 1:
        place = f"line {error.lineno} {place}"
    hint = _hint(error.doc, error.pos, error.msg)
    return f"{error.msg.removesuffix(' at')} at {place}" + (f" ({hint})" if hint else "")


def _hint(text: str, position: int, message: str) -> str:
    begin, rest = text.lstrip(), text[position:].strip()
    before = text[:position].rstrip()
    if text.startswith("\ufeff"):
        return "a byte order mark stands before the row, as where files were joined; take it out"
    if begin.startswith(("//", "#", "/*")):
        return "JSON has no comments; take the line out"
    if re.match(r"\[?\s*\{\s*'", begin):
        return "a Python dict in single quotes; write rows by json.dumps(row), not by str(row)"
    if message == "Extra data" and rest == ",":
        return "a comma stands behind the row; take it off"
    if message == "Extra data" and rest.startswith(("{", ",")):
        return "several values on one line; put each row on a line of its own"
    if message == "Expecting value" and rest.startswith(",") and before.endswith("}"):
        return "a comma stands between two rows; take such commas off, or put [ ] round the whole"
    if rest.startswith(("]", "}")) and before.endswith(","):
        return f"a comma stands before the closing {rest[0]!r}; take it out"
    if rest.startswith(("None", "True", "False")):
        return "JSON writes null, true and false"
    if rest.startswith(("\u201c", "\u201d", "\u201e")):
        return "typographic quotes; JSON's are the straight ones"
    if message.startswith("Invalid control character"):
        return r"a line end or tab within quotes; JSON writes \n or \t"
    if message.startswith("Invalid \\escape"):
        return r"a single backslash; JSON writes it twice: \\"
    if not rest or message.startswith("Unterminated string"):
        return "the text ends within a value; is it cut off?"
    return ""
