"""Files of text as UTF-8 bytes, whatever they were saved as; what is no text is named.

UTF-16 and UTF-32 with a byte order mark are read like UTF-8, and lines that end in a lone CR like
any other. A file in a single-byte encoding such as Windows-1252 is named, never guessed at.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from pathlib import Path
from typing import IO, cast

from trainer.errors import DataError

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
    (b"ARROW1", "an Arrow file; save the table as .parquet"),
    (b"PK\x03\x04", "a zip archive, as Excel and LibreOffice write; save the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "packed by gzip; its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it, or pack it by gzip"),
    (b"BZh", "packed by bzip2; unpack it, or pack it by gzip"),
    (b"\xfd7zXZ", "packed by xz; unpack it, or pack it by gzip"),
    (b"%PDF", "a PDF; its text must be put into rows"),
    (b"SQLite format 3", "a SQLite database; export its rows as CSV or JSONL"),
)
CONTROLS = bytes([*range(9), *range(14, 27)])
"""Bytes that are hardly ever in a text."""
NO_SINGLE_BYTE = re.compile(rb"\xff\xfe|\xfe\xff")
"""Marks of UTF-16 in the middle of a file: pieces of another encoding, not a text of its own."""


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in .gz."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def open_text(path: Path) -> IO[bytes]:
    """The file's text as UTF-8 without a byte order mark, its lines ending in LF or CR LF.

    Bytes that are no UTF-8 pass: the row that holds them is named where it is read.

    Raises:
        DataError: the file is no text, or UTF-16 or UTF-32 that is damaged or has no mark.
    """
    file = open_bytes(path)
    try:
        head = file.read(SNIFFED)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
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


def _recoded(path: Path, content: bytes, encoding: str) -> bytes:
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise DataError(
            f"{path}: begins as {encoding.upper()} text, but is none ({error}); save it as UTF-8."
        ) from error


def _with_lf(content: bytes) -> bytes:
    """Lone CRs as LFs, in a text that has no other line ends."""
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _refuse_binary(path: Path, head: bytes) -> None:
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
            f"{path}: this is a binary file, no text. Give JSONL, JSON, CSV, TSV or Parquet."
        )


def as_windows_1252(line: bytes) -> str:
    """Up to 40 characters round the first byte that is no UTF-8, read as Windows-1252."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        begin = max(error.start - 20, 0)
        return line[begin : error.start + 20].decode("cp1252", "replace").strip()
    return ""


def refuse_single_byte(path: Path, *, at_least: int = 2) -> None:
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
            f"{path}: not UTF-8 text ({count:,} lines, the first is line {number}). It looks like "
            "a single-byte encoding; as Windows-1252 (cp1252) that line says "
            f"{as_windows_1252(line)!r}. Save it as UTF-8 (Excel: 'CSV UTF-8'; else "
            "iconv -f CP1252 -t UTF-8 FILE > NEW)."
        )
