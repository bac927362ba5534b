"""Files of text as UTF-8 bytes, and JSON text as values, strictly; what is wrong, in words."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from trainer.counts import counted
from trainer.data.data_files import DataFile, open_bytes
from trainer.data.rows import BadRowError
from trainer.errors import DataError

# ---- files of text as UTF-8 bytes, whatever they were saved as; what is no text is named
#
# UTF-16 and UTF-32 with a byte order mark are read like UTF-8, and lines that end in a lone CR like
# any other. A file in a single-byte encoding such as Windows-1252 is named, never guessed at.


SNIFFED = 2**16
"""Bytes at the beginning that tell what a file is."""

WIDE = (  # the marks of UTF-32 first: one of them begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

MAGIC = (
    (b"PAR1", "a Parquet file; its name must end in .parquet"),
    (b"ARROW1", "an Arrow file; its name must end in .arrow"),
    (b"PK\x03\x04", "a zip archive, as Excel and LibreOffice write; save the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "packed by gzip; its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; its name must end in .zst"),
    (b"BZh", "packed by bzip2; its name must end in .bz2"),
    (b"\xfd7zXZ", "packed by xz; its name must end in .xz"),
    (b"%PDF", "a PDF; its text must be put into rows"),
    (b"SQLite format 3", "a SQLite database; export its rows as CSV or JSONL"),
)

CONTROLS = bytes([*range(9), *range(14, 27)])
"""Bytes that are hardly ever in a text."""

NO_SINGLE_BYTE = re.compile(rb"\xff\xfe|\xfe\xff")
"""Marks of UTF-16 in the middle of a file: pieces of another encoding, not a text of its own."""


def open_text(path: DataFile) -> IO[bytes]:
    """The file's text as UTF-8 without a byte order mark, its lines ending in LF or CR LF.

    Bytes that are no UTF-8 pass: the row that holds them is named where it is read.

    Raises:
        DataError: the file is no text, or UTF-16 or UTF-32 that is damaged or has no mark.
    """
    file = open_bytes(path)
    try:
        head = file.read(SNIFFED)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file = _from(file, head, start)
        wide = next((name for mark, name in WIDE if head.startswith(mark)), None)
        if wide is not None:
            with file:
                return io.BytesIO(_with_lf(_recoded(path, file.read(), wide)))
        _refuse_binary(path, head)
        if b"\r" in head and b"\n" not in head.removesuffix(b"\r"):
            with file:
                return io.BytesIO(_with_lf(file.read()))
    except BaseException:
        file.close()
        raise
    return file


def _from(file: IO[bytes], head: bytes, start: int) -> IO[bytes]:
    """The file from byte `start` on, of which `head` was read."""
    if file.seekable():
        file.seek(start)
        return file
    return cast(IO[bytes], io.BufferedReader(_Joined(head[start:], file), SNIFFED))


class _Joined(io.RawIOBase):
    """Bytes, then the rest of a file that cannot be sought in."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(found) :]
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._rest.close()
        super().close()


def _recoded(path: DataFile, content: bytes, encoding: str) -> bytes:
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise DataError(
            f"{path}: begins as {encoding.upper()} text, but is not ({error}); save it as UTF-8."
        ) from error


def _with_lf(content: bytes) -> bytes:
    """Lone CRs as LFs, in a text that has no other line ends."""
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _refuse_binary(path: DataFile, head: bytes) -> None:
    what = next((text for magic, text in MAGIC if head.startswith(magic)), None)
    if what is not None:
        raise DataError(f"{path}: this is {what}.")
    for first, name in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        units = head[first::2]
        if len(units) > 1 and units.count(0) > 0.6 * len(units):
            raise DataError(
                f"{path}: seems to be {name} text without a byte order mark; save it as UTF-8 "
                f"(iconv -f {name} -t UTF-8 FILE > NEW)."
            )
    if sum(map(head.count, CONTROLS)) > max(0.05 * len(head), 8):
        raise DataError(
            f"{path}: this is a binary file, not text. Give JSONL, JSON, CSV, TSV or Parquet."
        )


def as_windows_1252(line: bytes) -> str:
    """Up to 40 characters round the first byte that is no UTF-8, read as Windows-1252."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        begin = max(error.start - 20, 0)
        return line[begin : error.start + 20].decode("cp1252", "replace").strip()
    return ""


def refuse_single_byte(path: DataFile, *, at_least: int = 2) -> None:
    """Refuse a file that is no UTF-8 at all, once; called when one line of it is none.

    Several lines are no UTF-8, and no character outside ASCII is written in UTF-8: not a damaged
    line, but a file in another encoding.

    Args:
        path: of the file.
        at_least: so many lines that are no UTF-8.
    Raises:
        DataError: that is so.
    """
    with open_bytes(path) as file:
        if file.read(3) == codecs.BOM_UTF8:
            return  # says itself that it is UTF-8, so it is the lines that are damaged
    bad: list[tuple[int, bytes]] = []
    count = 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            if any(char > "\x7f" for char in line.decode("utf-8", "ignore")):
                return
            if NO_SINGLE_BYTE.search(line):
                return
            count += 1
            bad = bad or [(number, line)]
    if count >= at_least:
        number, line = bad[0]
        raise DataError(
            f"{path}: not UTF-8 text ({counted(count, 'line')}, the first is line {number}). It "
            "looks like a single-byte encoding; as Windows-1252 (cp1252) that line says "
            f"{as_windows_1252(line)!r}. Save it as UTF-8 (Excel: 'CSV UTF-8'; else "
            "iconv -f CP1252 -t UTF-8 FILE > NEW)."
        )


# ---- JSON text -> values, strictly, and what is wrong with text that is none, in words


SPACE = re.compile(r"[ \t\n\r]*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRowError(
            f"the key {twice!r} occurs twice in one object; remove one of them",
            "key twice",
        )
    return found


def _refuse_constant(name: str) -> None:
    raise BadRowError(
        f"not valid JSON: {name} is not a JSON number; write null, or leave the key out", "not JSON"
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
        return "a byte order mark before the row, as in files that were joined; remove it"
    if begin.startswith(("//", "#", "/*")):
        return "JSON has no comments; remove the line"
    if re.match(r"\[?\s*\{\s*'", begin):
        return "a Python dict in single quotes; write rows by json.dumps(row), not by str(row)"
    if message == "Extra data" and rest == ",":
        return "a comma after the row; remove it"
    if message == "Extra data" and rest.startswith(("{", ",")):
        return "several values on one line; put each row on a line of its own"
    if message == "Expecting value" and rest.startswith(",") and before.endswith("}"):
        return "a comma between two rows; remove such commas, or enclose all rows in [ ]"
    if rest.startswith(("]", "}")) and before.endswith(","):
        return f"a comma before the closing {rest[0]!r}; remove it"
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
