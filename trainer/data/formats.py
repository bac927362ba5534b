"""Rows -> messages: which layout a file has, and its bad rows with file:line.

Reading is in `row_files.py`, the layouts are in `layouts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.content import MARKED_ROLE, is_text
from trainer.data.layouts import FORMATS, Format, messages_of
from trainer.data.row_files import RawRow, raw_rows
from trainer.data.rows import MAX_ERRORS_SHOWN, BadRowError, Row, RowErrors, RowNotes, settle
from trainer.data.turns import check_messages, leave_openings, num_openings
from trainer.errors import ConfigError, DataError, TemplateError
from trainer.profiles import Message

if TYPE_CHECKING:
    from trainer.data.encode import RowEncoder


# ---- text that a chat template wrote, read back into the turns it was made from
#
# What the template writes between two turns is learned by rendering a few small conversations. A
# text counts as the template's only if it is made of nothing but these pieces and the words between
# them, and if the turns found, rendered again, give the same turns back. White space beside control
# tokens may differ, as it does in texts put together by hand.


ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}

PROBES = ("ua", "uaua", "suaua", "uaa", "uata", "suasua", "saua", "aua")
"""Conversations, a letter for each turn, that show what a template puts between turns."""

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
"""What people put behind a whole text, whether or not it is the model's own."""


def read_back(
    rows: list[Row], encoder: RowEncoder, errors: RowErrors, text_markers: str
) -> list[Row]:
    """Rows of text that hold control tokens, as `data.text_markers` says; others as they are.

    Args:
        errors: receives the rows that cannot be read back.
        text_markers: `turns` or `tokens`.
    """
    reader: TemplateReader | None = None
    result = []
    for row in rows:
        found = encoder.control_token(row.messages[0]["content"]) if is_text(row.messages) else None
        if found is None:
            result.append(row)
            continue
        if text_markers == "tokens":
            turn = row.messages[0].copy()
            turn["role"] = MARKED_ROLE
            if ends_with_token(encoder, turn["content"]):  # no line end between it and end-of-text
                turn["content"] = turn["content"].rstrip()
            result.append(replace(row, messages=[turn]))
            continue
        reader = reader or TemplateReader(encoder)
        try:
            result.append(_as_turns(row, reader, found))
        except BadRowError as error:
            errors.add(row.where, str(error), error.reason)
    return result


def check_markers_used(rows: list[Row], text_markers: str) -> None:
    """Refuse the option where no row has what it speaks of.

    Raises:
        ConfigError: `data.text_markers=tokens` and no text holds a control token.
    """
    if text_markers == "tokens" and not any(row.messages[0]["role"] == MARKED_ROLE for row in rows):
        raise ConfigError(
            "data.text_markers=tokens is set, but no row of format 'text' holds a control token "
            "of this model; leave the option out."
        )


def _as_turns(row: Row, reader: TemplateReader, token: str) -> Row:
    [text] = row.messages
    turns = reader.read(text["content"], token)
    for turn in [turn for turn in turns if turn["role"] == "assistant"][num_openings(turns) :]:
        turn["weight"] = text.get("weight", 1.0)
    return replace(row, messages=check_messages(settle(leave_openings(turns))), is_rendered=True)


def ends_with_token(encoder: RowEncoder, text: str) -> bool:
    """Whether a text ends with a control token, white space aside."""
    text = text.rstrip()
    return any(match.end() == len(text) for match in encoder.control_tokens.finditer(text))


@dataclass(frozen=True)
class _Piece:
    """What a template puts before a turn."""

    pattern: re.Pattern[str]
    length: int
    role: str


class TemplateReader:
    """Reads texts of one chat template."""

    def __init__(self, encoder: RowEncoder) -> None:
        """Learn the template's pieces from small conversations."""
        self.tokenizer, self.encoder = encoder.tokenizer, encoder
        starts: dict[str, set[str]] = {}
        between: dict[str, dict[str, set[str]]] = {role: {} for role in ROLES.values()}
        self.ends = {self.tokenizer.eos_token, *END_OF_TEXT} - {None}
        for probe in PROBES:
            roles = [ROLES[letter] for letter in probe]
            pieces = self._pieces(roles)
            if pieces is None:
                continue
            head, *middle, tail = pieces
            self.ends |= set(self._tokens(tail))
            # Nothing but a system prompt can stand first without a header.
            for start in self._beginnings(head):
                if start.strip() or roles[0] == "system":
                    starts.setdefault(start.strip(), set()).add(roles[0])
            for previous, role, piece in zip(roles, roles[1:], middle, strict=False):
                # An empty thought that the template puts there by itself may be missing.
                for variant in {piece, piece.partition("<think>")[0]}:
                    between[previous].setdefault(variant, set()).add(role)
                    for start in self._beginnings(variant):
                        starts.setdefault(start, set()).add(role)
        self.starts = self._sorted(starts)
        self.between = {role: self._sorted(found) for role, found in between.items()}

    def read(self, text: str, token: str) -> list[Message]:
        """The turns of a text.

        Args:
            token: a control token that is in it, for the message.
        Raises:
            BadRowError: the text is not what the template writes.
        """
        turns = self._parse(text)
        if turns is None or _words(self._parse(self._render(turns) or "")) != _words(turns):
            raise BadRowError(
                f"the text contains {token!r}, which the tokenizer turns into a control token, and "
                "cannot be read back into turns of the model's chat template; write the row as "
                "'messages', or set data.text_markers=tokens to train every token of such texts",
                "control token in text",
            )
        return turns

    def _parse(self, text: str) -> list[Message] | None:
        bos = self.tokenizer.bos_token
        text = self._without_end(text.strip().removeprefix(bos or "").lstrip())
        for piece in self.starts:
            match = piece.pattern.match(text)
            if match:
                return self._turns(piece.role, text[match.end() :])
        return None

    def _turns(self, role: str, rest: str) -> list[Message] | None:
        """The turns of a text whose first header is behind us; None where a token is left over."""
        turns: list[Message] = []
        while True:
            found = [(m.start(), -p.length, p.role, m) for p in self.between[role]
                     if (m := p.pattern.search(rest))]  # fmt: skip
            if not found:
                turns.append(Message(role=role, content=rest.strip()))
                clean = all(self.encoder.control_token(turn["content"]) is None for turn in turns)
                return turns if clean else None
            _, _, following, match = min(found, key=lambda item: item[:3])
            turns.append(Message(role=role, content=rest[: match.start()].strip()))
            role, rest = following, rest[match.end() :]

    def _without_end(self, text: str) -> str:
        text = text.strip()
        while ends := [end for end in self.ends if text.endswith(end)]:
            text = text.removesuffix(max(ends, key=len)).rstrip()
        return text

    def _render(self, turns: list[Message]) -> str | None:
        """The turns as the template writes them; None where it does not take them."""
        try:
            return self.encoder.template.text(turns)
        except TemplateError:
            return None

    def _pieces(self, roles: list[str]) -> list[str] | None:
        """What stands before, between and behind the words; None where a piece proves nothing."""
        words = [f"\ue000{number}\ue001" for number in range(len(roles))]
        text = self._render(
            [Message(role=role, content=word) for role, word in zip(roles, words, strict=True)]
        )
        if text is None or any(text.count(word) != 1 for word in words):
            return None
        pieces = re.split("|".join(words), text)
        bos = self.tokenizer.bos_token
        pieces[0] = pieces[0].removeprefix(bos) if bos else pieces[0]
        # White space alone, as some templates put behind a system turn, could be anybody's words.
        return pieces if all(piece.strip() for piece in pieces[1:-1]) else None

    def _beginnings(self, piece: str) -> set[str]:
        """The piece, and its ends that begin with a control token: a text may begin with them."""
        at = [match.start() for match in self.encoder.control_tokens.finditer(piece)]
        return {piece, *(piece[start:] for start in at)}

    def _tokens(self, piece: str) -> list[str]:
        return self.encoder.control_tokens.findall(piece)

    def _sorted(self, pieces: dict[str, set[str]]) -> list[_Piece]:
        """The pieces, the longest first; where several roles share one, the most usual role."""
        usual = ("user", "assistant", "system", "tool")
        found = [
            _Piece(re.compile(self._pattern(piece)), len(piece), min(roles, key=usual.index))
            for piece, roles in pieces.items()
        ]
        return sorted(found, key=lambda piece: -piece.length)

    def _pattern(self, piece: str) -> str:
        """A piece as a pattern: beside control tokens white space is free."""
        parts = re.split(r"(\s+)", piece)
        tokens = tuple(self._tokens(piece))
        pattern = ""
        for position, part in enumerate(parts):
            if not part.isspace():
                pattern += re.escape(part)
                continue
            before, after = parts[position - 1], "".join(parts[position + 1 : position + 2])
            is_free = before.endswith(tokens) or after.startswith(tokens) or not before
            pattern += r"\s*" if is_free else r"\s+"
        return pattern


def _words(turns: list[Message] | None) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns or []]


# ---- rows -> messages: which layout a file has, and its bad rows with file:line
#
# Reading is in `files.py`, the layouts are in `layouts.py`.


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
            notes = RowNotes()
            rows.append(Row(where, index, messages_of(row, known, notes), source, notes))
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
        if known.fits(row):
            return name
    wanted = "; ".join(" and ".join(sorted(known.keys)) for known in FORMATS.values())
    raise BadRowError(
        f"row has the keys {sorted(row)}; it needs one of: {wanted} "
        "(data.columns maps other names to these)",
        NO_FORMAT,
    )


def _refuse_change(row: dict[str, Any], name: str, *, is_found: bool) -> None:
    """A row of another layout than the file's is named as that, not as a row with holes."""
    if FORMATS[name].fits(row):
        return
    others = [other for other, known in FORMATS.items() if known.fits(row)]
    if others:
        why = "as its first row says" if is_found else "as data.format says"
        raise BadRowError(
            f"row is of format {others[0]!r}, but the file is {name!r}, {why}; "
            "put rows of one format into a file",
            "another format",
        )
