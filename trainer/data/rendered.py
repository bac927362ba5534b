"""Rows under a chat template: their text with marks in it, and texts read back into turns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.data.rows import (
    MARKED_ROLE,
    BadRowError,
    Row,
    RowErrors,
    is_text,
)
from trainer.data.template import (
    MARK,
    ChatTemplate,
    TurnMarks,
    has_marks,
    mark_places,
    marked,
    without_marks,
)
from trainer.data.tools import with_arguments
from trainer.data.turn_flags import settle
from trainer.data.turns import (
    assistant_turns,
    check_messages,
    leave_openings,
    num_openings,
)
from trainer.errors import ConfigError, TemplateError
from trainer.profiles import Message

if TYPE_CHECKING:
    from trainer.data.encode import RowEncoder


@dataclass(frozen=True)
class Asked:
    """The prompt of an assistant turn: the marked turns before it, and the header behind them."""

    mark: str | None
    """The last mark in it; None where it has none."""
    index: int
    """How often that mark stands before; a function's name may stand in its result too."""
    tail: str
    """What follows that mark."""


@dataclass(frozen=True)
class Rendered:
    """One row under the template."""

    row: list[Message]
    text: str
    marks: list[TurnMarks]
    places: dict[str, list[int]]
    """Where each mark stands in the text."""
    asked: list[Asked]
    """The prompt of each assistant turn."""
    is_thinking: bool
    generated: list[tuple[int, int]] | None
    """The stretches of the text between the template's own generation markers; None without."""
    is_by_shape: bool = False
    """It was rendered once; what it has in common with rows of its shape was proved on another."""


def lost_thought(where: str) -> BadRowError:
    """The error of a row whose thought the template would lose."""
    return BadRowError(
        f"{where} has a thought, which the model's chat template does not write there; "
        "remove it, or give a template that writes it (model.chat_template)",
        "template without thoughts",
    )


def thinks(turn: Message) -> bool:
    """Whether a turn brings a thought, as a key or in its content."""
    return bool(turn.get("reasoning_content", "").strip()) or "</think>" in turn["content"]


def thinks_last(row: list[Message]) -> bool:
    """Whether a row's last question is answered with a thought."""
    last_user = max((n for n, turn in enumerate(row) if turn["role"] == "user"), default=0)
    return any(thinks(turn) for turn in row[last_user:] if turn["role"] == "assistant")


def render_row(template: ChatTemplate, row: list[Message]) -> Rendered:
    """A row's text, the same with marks, and its prompts.

    Raises:
        BadRowError: the arguments of a call, or the row's thoughts, cannot be given to the
            template, or its text changes with the marks.
        TemplateError: the template refuses the row.
    """
    row = _spelled(template, row)
    is_thinking = thinks_last(row)
    [(text, generated)] = template.texts_and_markers([row], thinking=is_thinking)
    if has_marks(text):
        raise BadRowError(
            "row holds characters above U+108000 (private use), which are used internally; "
            "remove them from the data",
            "not text",
        )
    for only_answers in (False, True):
        turns, marks = marked(row, only_answers=only_answers)
        with_marks = template.text(turns, thinking=is_thinking)
        if without_marks(with_marks) == text:
            break
    else:
        raise BadRowError(
            "the model's chat template changes what it writes with the ends of the turns, so "
            "it cannot be proved which tokens the assistant writes",
            "template not provable",
        )
    asked = [
        _asked(template.text(turns[:turn], ask=True, thinking=is_thinking))
        for turn in assistant_turns(row)
    ]
    places = mark_places(with_marks)
    return Rendered(row, text, marks, places, asked, is_thinking, generated)


def _asked(prompt: str) -> Asked:
    found = list(MARK.finditer(prompt))
    if not found:
        return Asked(None, 0, prompt)
    mark, at = found[-1].group(), found[-1].start()
    return Asked(mark, prompt.count(mark, 0, at), prompt[at + 1 :])


def left_out(rendered: Rendered, answers: list[tuple[int, int]]) -> list[str]:
    """What the turns that are no answers say and a template does not write.

    Args:
        rendered: the row; the rest of its text must hold them whole and in order.
        answers: where its answers stand in its text, in order.
    """
    row, text = rendered.row, rendered.text
    if _is_all_there(rendered, answers):
        return []
    borders = [0, *(place for answer in answers for place in answer), len(text)]
    text = "".join(text[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True))
    missing = []
    answered = set(assistant_turns(row))
    for index, turn in enumerate(row):
        content = turn["content"].strip()
        if index in answered or not content:
            continue
        at = text.find(content)
        if at < 0:  # some templates write results as JSON
            content = json.dumps(content, ensure_ascii=False)[1:-1]
            at = text.find(content)
        if at < 0:
            missing.append(turn["content"].strip())
        else:  # each character of the text can prove one turn only
            text = text[:at] + "\0" + text[at + len(content) :]
    return missing


def _is_all_there(rendered: Rendered, answers: list[tuple[int, int]]) -> bool:
    """Whether all texts that are no answers stand whole, in their order, outside the answers.

    Then a search for one after the other finds each where it stands, or before.
    """
    places, text = rendered.places, rendered.text
    ranges = dict(zip(assistant_turns(rendered.row), answers, strict=True))
    behind = 0
    for turn, message in enumerate(rendered.row):
        if turn in ranges:
            begin, end = ranges[turn]
            if begin < behind:
                return False
            behind = end
            continue
        content = message["content"].strip()
        if not content:
            continue
        found = places.get(rendered.marks[turn].content or "", [])
        if len(found) != 1 or found[0] - len(content) < behind:
            return False
        behind = found[0]
        if text[behind - len(content) : behind] != content:
            return False
    return True


def _spelled(template: ChatTemplate, row: list[Message]) -> list[Message]:
    """The row with its calls as the template takes them."""
    dialect = template.dialect
    row = with_arguments(row, dialect.arguments)
    for position, turn in enumerate(row):
        if turn.get("reasoning_content", "").strip() and dialect.thought is None:
            raise lost_thought(f"turn {position} ({turn['role']})")
    return row


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
    rows: Iterable[Row], encoder: RowEncoder, errors: RowErrors, text_markers: str
) -> Iterator[Row]:
    """Rows of text that hold control tokens, as `data.text_markers` says; others as they are.

    Args:
        errors: receives the rows that cannot be read back.
        text_markers: `turns` or `tokens`.
    """
    reader: TemplateReader | None = None
    for row in rows:
        found = encoder.control_token(row.messages[0]["content"]) if is_text(row.messages) else None
        if found is None:
            yield row
            continue
        if text_markers == "tokens":
            turn = row.messages[0].copy()
            turn["role"] = MARKED_ROLE
            if ends_with_token(encoder, turn["content"]):  # no line end between it and end-of-text
                turn["content"] = turn["content"].rstrip()
            yield replace(row, messages=[turn])
            continue
        reader = reader or TemplateReader(encoder)
        try:
            turns = _as_turns(row, reader, found)
        except BadRowError as error:
            errors.add(row.where, str(error), error.reason)
            continue
        yield turns


def check_markers_used(num_marked: int, text_markers: str) -> None:
    """Refuse the option where no row has what it speaks of.

    Args:
        num_marked: texts that hold a control token.
    Raises:
        ConfigError: `data.text_markers=tokens` and there is none.
    """
    if text_markers == "tokens" and not num_marked:
        raise ConfigError(
            "data.text_markers=tokens is set, but no row of format 'text' holds a control token "
            "of this model; remove the option."
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
