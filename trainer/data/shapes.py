"""One rendering a row: what rows of one shape have in common is rendered once, the rest is proved.

A shape is the roles of a row, which of its texts are empty, its thoughts and its tools. Its marked
text and its prompts are rendered with words of our own. A row of that shape is rendered once; where
its text is, character for character, what the shape says of its words, every mark and every prompt
stands where the shape has it. All other rows are rendered with marks of their own.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from trainer.data.rendered import Asked, Rendered, render_row, thinks_last
from trainer.data.rows import BadRowError
from trainer.data.template import ChatTemplate, TurnMarks, has_marks
from trainer.data.tools import tools_of
from trainer.errors import TemplateError
from trainer.profiles import Message

MAX_SHAPES = 2000
"""Shapes that are remembered; a file has a few, or its rows are all different."""

PLAIN_KEYS = frozenset({"role", "content", "reasoning_content", "tools", "weight"})
"""Keys of turns that a shape can have: what else a template writes is proved on the row."""

SPACES = " \n "

TextKey = Literal["content", "reasoning_content"]


@dataclass(frozen=True)
class Slot:
    """The place of one text of a row."""

    turn: int
    key: TextKey
    mark: str
    spaces: tuple[bool | None, bool | None]
    """Whether the template keeps white space before and behind the text; None: it depends."""


@dataclass(frozen=True)
class Shape:
    """The text of all rows of one shape: pieces of the template's own, and slots between them."""

    pieces: list[str]
    """One more than slots."""
    slots: list[Slot]
    marks: list[TurnMarks]
    asked: list[Asked]
    is_thinking: bool

    def fill(self, row: list[Message]) -> tuple[str, dict[str, list[int]], dict[str, str]] | None:
        """The text of a row, where each mark stands in it, and the white space behind texts.

        None where the shape cannot tell.
        """
        parts, places, behind = [self.pieces[0]], {}, {}
        position = len(parts[0])
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            text: str = row[slot.turn][slot.key]
            core = text.strip()
            end = len(core)
            if core != text:
                found = _with_spaces(text, core, slot.spaces)
                if found is None:
                    return None
                text, end, behind[slot.mark] = found
            places[slot.mark] = [position + end]
            position += len(text) + len(piece)
            parts += (text, piece)
        return "".join(parts), places, behind


def _with_spaces(
    text: str, core: str, kept: tuple[bool | None, bool | None]
) -> tuple[str, int, str] | None:
    """A text with the white space that is kept, where its words end, and what follows them."""
    at = text.index(core)
    before, after = text[:at], text[at + len(core) :]
    if (before and kept[0] is None) or (after and kept[1] is None):
        return None
    before, after = before if kept[0] else "", after if kept[1] else ""
    return before + core + after, len(before) + len(core), after


Ranges = list[tuple[int, int]]
"""Stretches of a text, in characters."""

Ahead = tuple[Shape, str, Ranges | None]
"""A row's shape, its text, and what stands between the template's generation markers."""


@dataclass
class Shapes:
    """The shapes of one template, and rows rendered by them."""

    template: ChatTemplate

    def __post_init__(self) -> None:
        # No fields: what is remembered does not change what rows become, so no key counts it.
        self._known: dict[Any, Shape | None] = {}
        source = self.template.tokenizer.chat_template
        self._sought = sought_texts(source) if self.template.is_usual else None

    def render_ahead(self, rows: list[list[Message]]) -> list[Ahead | None]:
        """Rows of known shapes, all rendered at once; None for the others.

        Where the template refuses one of them, it is None for all.
        """
        shapes = [
            None if (key := self._plain_key(row)) is None else self._known.get(key) for row in rows
        ]
        ahead: list[Ahead | None] = [None] * len(rows)
        for is_thinking in (False, True):
            places = [
                place
                for place, shape in enumerate(shapes)
                if shape and shape.is_thinking == is_thinking and tools_of(rows[place]) is None
            ]
            with contextlib.suppress(TemplateError):
                texts = self.template.texts_and_markers(
                    [rows[place] for place in places], thinking=is_thinking
                )
                for place, found in zip(places, texts, strict=True):
                    shape = shapes[place]
                    assert shape is not None, "only such places were chosen"
                    ahead[place] = (shape, *found)
        return ahead

    def render(self, row: list[Message], ahead: Ahead | None = None) -> Rendered | None:
        """The row as `render_row` renders it; None where only that can tell.

        Args:
            ahead: of `render_ahead`.
        Raises:
            TemplateError: the template refuses the row.
        """
        if ahead is not None:
            return self._by_shape(row, *ahead)
        key = self._plain_key(row)
        if key is None:
            return None
        if key in self._known:
            shape = self._known[key]
            return self._rendered(shape, row) if shape is not None else None
        if len(self._known) >= MAX_SHAPES:
            self._known.clear()
        self._known[key] = None
        shape = self._learn(row)
        found = self._rendered(shape, row) if shape is not None else None
        # The first row of each shape is rendered both ways.
        if found is None or not _is_same(found, render_row(self.template, row)):
            return None
        self._known[key] = shape
        return found

    def _plain_key(self, row: list[Message]) -> Any:
        """What rows of one shape have in common; None for a row that can have none."""
        if self._sought is None:
            return None
        key = _key(row)
        return key if key is not None and self._sought.is_plain(row) else None

    def _rendered(self, shape: Shape, row: list[Message]) -> Rendered | None:
        [found] = self.template.texts_and_markers([row], thinking=shape.is_thinking)
        return self._by_shape(row, shape, *found)

    def _by_shape(
        self, row: list[Message], shape: Shape, text: str, generated: Ranges | None
    ) -> Rendered | None:
        filled = shape.fill(row)
        if filled is None:
            return None
        expected, places, behind = filled
        if text != expected or has_marks(text):
            return None
        asked = shape.asked
        if behind:  # white space that the template keeps stands in the prompts too
            asked = [replace(one, tail=behind.get(one.mark or "", "") + one.tail) for one in asked]
        return Rendered(
            row,
            text,
            marks=shape.marks,
            places=places,
            asked=asked,
            is_thinking=shape.is_thinking,
            generated=generated,
            is_by_shape=True,
        )

    def _learn(self, row: list[Message]) -> Shape | None:
        """The shape of a row; None where it has no such text or its texts are not kept whole."""
        try:
            rendered = render_row(self.template, _sentinels(row))
            spaced = self.template.text(
                _sentinels(row, spaces=SPACES), thinking=rendered.is_thinking
            )
        except (BadRowError, TemplateError):
            return None
        if rendered.is_thinking != thinks_last(row):
            return None
        found = _slots(row, rendered)
        if found is None or any(len(places) > 1 for places in rendered.places.values()):
            return None
        if any(one.mark and one.index for one in rendered.asked):
            return None
        pieces = re.split("|".join(word for word, _ in found) or r"(?!)", rendered.text)
        outer = re.split("|".join(word for word, _ in found) or r"(?!)", spaced)
        if len(pieces) != len(found) + 1 or len(outer) != len(pieces):
            return None
        kept = [
            _kept(piece, with_spaces, is_first=n == 0, is_last=n == len(found))
            for n, (piece, with_spaces) in enumerate(zip(pieces, outer, strict=True))
        ]
        slots = [
            replace(slot, spaces=(kept[n][1], kept[n + 1][0])) for n, (_, slot) in enumerate(found)
        ]
        return Shape(pieces, slots, rendered.marks, rendered.asked, rendered.is_thinking)


def _key(row: list[Message]) -> Any:
    """What rows of one shape have in common; None for a row that has none."""
    key: list[Any] = []
    for turn in row:
        if not PLAIN_KEYS.issuperset(turn):
            return None
        content, thought = turn["content"], turn.get("reasoning_content")
        is_blank = bool(content) and not content.strip()
        if is_blank or (thought is not None and not thought.strip()):
            return None
        key.append((turn["role"], not content, thought is not None))
        if turn.get("tools"):
            key.append(json.dumps(turn["tools"]))
    return tuple(key)


def _sentinels(row: list[Message], *, spaces: str = "") -> list[Message]:
    """The row with words of our own for its texts."""
    turns = []
    for number, turn in enumerate(row):
        copy = turn.copy()
        copy.pop("weight", None)
        if turn["content"]:
            copy["content"] = f"{spaces}{_word(number, 'content')}{spaces}"
        if "reasoning_content" in turn:
            copy["reasoning_content"] = f"{spaces}{_word(number, 'reasoning_content')}{spaces}"
        turns.append(copy)
    return turns


def _word(number: int, key: TextKey) -> str:
    return f"\ue000{number}{key[0]}\ue001"


def _slots(row: list[Message], rendered: Rendered) -> list[tuple[str, Slot]] | None:
    """The words of `_sentinels` in the order of the text; None where one stands there twice."""
    found: list[tuple[int, str, Slot]] = []
    for number, (turn, marks) in enumerate(zip(row, rendered.marks, strict=True)):
        keys: list[tuple[TextKey, bool, str | None]] = [
            ("content", bool(turn["content"]), marks.content),
            ("reasoning_content", "reasoning_content" in turn, marks.thought),
        ]
        for key, is_there, mark in keys:
            word = _word(number, key)
            count = rendered.text.count(word) if is_there else 0
            if count > 1 or (count and mark is None) or (bool(count) != (mark in rendered.places)):
                return None
            if count and mark is not None:
                slot = Slot(number, key, mark, (None, None))
                found.append((rendered.text.index(word), word, slot))
    return [(word, slot) for _, word, slot in sorted(found, key=lambda item: item[0])]


def _kept(
    piece: str, outer: str, *, is_first: bool, is_last: bool
) -> tuple[bool | None, bool | None]:
    """Whether white space of the text before a piece is kept, and that of the text behind it."""
    found = [
        (before, behind)
        for before in ((False,) if is_first else (False, True))
        for behind in ((False,) if is_last else (False, True))
        if outer == SPACES * before + piece + SPACES * behind
    ]
    return found[0] if len(found) == 1 else (None, None)


def _is_same(one: Rendered, other: Rendered) -> bool:
    """Whether a row is the same by its shape and by marks of its own, the template's own markers
    aside, which are the row's own both times."""
    parts = ("text", "marks", "places", "asked", "is_thinking")
    return all(getattr(one, part) == getattr(other, part) for part in parts)


# ---- what a template looks for in texts: a row that has it is no row like any other


@dataclass(frozen=True)
class Sought:
    """Texts that a template may ask about, beside whether there is one at all."""

    inside: tuple[str, ...]
    """It looks whether a text holds these."""
    whole: frozenset[str]
    """It looks whether a text is one of these."""
    is_folded: bool
    """It changes capitals."""

    def is_plain(self, row: list[Message]) -> bool:
        """Whether the template can find none of them in the row's texts."""
        texts = [turn["content"] for turn in row]
        texts += [turn["reasoning_content"] for turn in row if "reasoning_content" in turn]
        if not self.whole.isdisjoint(texts):
            return False
        joined = "\0".join(texts)
        if self.is_folded:
            joined = joined.casefold()
        return not any(text in joined for text in self.inside)


class _Generation(Extension):
    """Reads {% generation %} blocks as their content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


FOLDING = frozenset({"lower", "upper", "capitalize", "title", "casefold", "swapcase"})

THINKING = ("<think>", "</think>")
"""What our own code looks for in answers."""


def sought_texts(source: str) -> Sought | None:
    """The texts that a template's source asks about; None where that cannot be told."""
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols], autoescape=False)
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError:
        return None
    inside, whole = set(THINKING), set[str]()
    for compare in tree.find_all(nodes.Compare):
        left = compare.expr
        for operand in compare.ops:
            right = operand.expr
            if operand.op in ("in", "notin"):
                if isinstance(right, nodes.Const) and isinstance(right.value, str):
                    return None  # a part of a text may be what is looked for
                inside.update(_strings([left]))
                whole.update(_strings([right]))
            else:
                is_part = any(map(_is_part, (left, right)))
                (inside if is_part else whole).update(_strings([left, right]))
            left = right
    names = set()
    for used in tree.find_all((nodes.Filter, nodes.Test)):
        names.add(used.name)
        inside.update(_strings(used.args))
    for call in tree.find_all(nodes.Call):
        inside.update(_strings([*call.args, *(pair.value for pair in call.kwargs)]))
        if isinstance(call.node, nodes.Getattr):
            names.add(call.node.attr)
    for assigned in tree.find_all((nodes.Assign, nodes.For, nodes.Macro)):
        parts = {nodes.Assign: "node", nodes.For: "iter", nodes.Macro: "defaults"}
        part = getattr(assigned, parts[type(assigned)])
        inside.update(_strings(part if isinstance(part, list) else [part]))
    is_folded = bool(names & FOLDING)
    if is_folded:
        inside = {text.casefold() for text in inside}
    # White space at the ends of texts is another matter (`Slot.spaces`).
    return Sought(tuple(sorted(inside - {""} - {"\n", " ", "\n\n"})), frozenset(whole), is_folded)


def _strings(expressions: Iterable[Any]) -> set[str]:
    """Texts that stand in expressions as they are, or in lists and objects."""
    found: set[str] = set()
    for expression in expressions:
        if isinstance(expression, nodes.Const):
            found |= {expression.value} if isinstance(expression.value, str) else set()
        elif isinstance(expression, nodes.List | nodes.Tuple):
            found |= _strings(expression.items)
        elif isinstance(expression, nodes.Dict):
            found |= _strings(part for pair in expression.items for part in (pair.key, pair.value))
    return found


def _is_part(expression: Any) -> bool:
    """Whether an expression may be a part of a text, or made of one."""
    if isinstance(expression, nodes.Getitem):
        return not (
            isinstance(expression.arg, nodes.Const) and isinstance(expression.arg.value, str)
        )
    return isinstance(expression, nodes.Call | nodes.Filter | nodes.Slice)
