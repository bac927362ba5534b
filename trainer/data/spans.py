"""Which tokens of a rendered conversation the assistant writes, proved turn by turn.

Each text of a row is marked where it ends, and the marks are found again in what the template
makes of the row: so a turn is known wherever it stands, also where the template rewrites the turns
before it. A turn begins where the prompt that asks for it ends: what a template puts there by
itself (a header, an empty thought) is never trained. It ends with the first end-of-turn token
behind all that it says and calls.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from unicodedata import normalize

from trainer.data.rendered import Rendered, left_out, lost_thought
from trainer.data.rows import BadRowError, decoded
from trainer.data.template import Asking, ChatTemplate, TurnMarks, shared_start
from trainer.data.tools import missing_arguments
from trainer.data.turns import assistant_turns, num_openings
from trainer.errors import TemplateError
from trainer.profiles import Message

MARKER = re.compile(r"<[^<>\s]*>")
"""What stands for one token in the format of a family, whether it is one or not."""

OPENED = re.compile(r"(<[^<>\s]*>)+")


@dataclass(frozen=True)
class Spans:
    """The trained stretches of one row."""

    ranges: list[tuple[int, int]]
    """Half-open ranges of ids, one per assistant turn, each with its stop token if it has one."""
    stripped: tuple[str, ...]
    """Text of the row's turns that the template leaves out of the tokens."""
    num_thoughts: int = 0
    """Turns whose thought stands in the tokens."""
    is_opened: bool = False
    """A prompt of this row would open a thought that the row does not have."""
    is_by_shape: bool = False
    """As of `Rendered`."""
    last_prompt: tuple[str, int, int] | None = None
    """The end of the last turn's prompt as text, and the half-open range of ids that it must be."""


class SpanFinder:
    """Finds and proves the trained stretches of rows under one template."""

    def __init__(self, template: ChatTemplate, *, train_on_thinking: bool = True) -> None:
        """Without `train_on_thinking` a turn's stretch begins behind its thought."""
        self.template = template
        self.train_on_thinking = train_on_thinking

    def find(self, rendered: Rendered, encoding: Any) -> Spans:
        """The trained stretches of one row.

        Args:
            rendered: what `render_row` made of it.
            encoding: its text as tokens, a `tokenizers.Encoding`.
        Raises:
            BadRowError: it cannot be proved which tokens are the assistant's.
        """
        return _Search(self.template, rendered, encoding).spans(
            train_on_thinking=self.train_on_thinking
        )


class _Search:
    """The search through one row; positions are characters of the text unless called ids."""

    def __init__(self, template: ChatTemplate, rendered: Rendered, encoding: Any) -> None:
        self.template, self.encoding = template, encoding
        self.row, self.text = rendered.row, rendered.text
        self.rendered, self.marks, self.places = rendered, rendered.marks, rendered.places
        self.turns = assistant_turns(self.row)
        self.ids: list[int] = encoding.ids
        self.stripped: list[str] = []
        self.num_thoughts = 0
        self.is_opened = False

    def spans(self, *, train_on_thinking: bool) -> Spans:
        turns = self.turns
        runs = self._generated_runs()
        # Greetings before the first user turn have markers too, and no prompt that asks for them.
        runs = runs[num_openings(self.row) :]
        ranges: list[tuple[int, int]] = []
        taken: list[tuple[int, int]] = []
        last_prompt = None
        end = 0
        for nth, turn in enumerate(turns):
            begin = self._begin(nth, end, is_last=nth == len(turns) - 1)
            first = self._first_id(begin)
            if len(runs) == len(turns):  # the template's own markers may begin behind a space
                first = max(first, runs[nth][0])
                begin = max(begin, self._start_of(first))
            stop, end = self._end(nth, turn, begin)
            self._prove(nth, turn, begin, end)
            self._prove_ids(nth, first, stop)
            if nth == len(turns) - 1:
                last_prompt = self._prompt_end(begin, first)
            thought_end = self._thought(turn, begin)
            if thought_end is not None and not train_on_thinking:
                first = max(first, self._id_at(thought_end))
            taken.append((begin, end))
            ranges.append((first, stop))
        stripped = (*left_out(self.rendered, taken), *self.stripped)
        return Spans(
            ranges,
            stripped,
            self.num_thoughts,
            is_opened=self.is_opened,
            is_by_shape=self.rendered.is_by_shape,
            last_prompt=last_prompt,
        )

    def _generated_runs(self) -> list[tuple[int, int]]:
        """The ids between the template's own generation markers, as transformers finds them."""
        found = []
        for begin, end in self.rendered.generated or ():
            first, last = (self.encoding.char_to_token(place) for place in (begin, end - 1))
            if first is None:
                break
            found.append((first, last + 1 if last else len(self.ids)))
        return _merged(found)

    # ---- where a turn begins

    def _begin(self, nth: int, earliest: int, *, is_last: bool) -> int:
        """Where the prompt of a turn ends in the row, behind the end of the turn before."""
        anchor, tail = self._anchor(nth)
        if anchor is None:
            raise BadRowError(
                f"the model's chat template leaves out the turn before assistant turn {nth + 1}, "
                "so its prompt cannot be found in the row",
                "template not provable",
            )
        asking, is_thinking = self.template.asking, self.rendered.is_thinking
        own, other = asking[is_thinking], asking[not is_thinking]
        rest = self.text[anchor : anchor + len(tail) + 64]
        found = [
            (len(ending), is_opened)
            for ending, is_opened in _endings(tail, own, other)
            if rest.startswith(ending)
        ]
        if found:
            length, is_opened = max(found, key=lambda item: (item[0], not item[1]))
            self.is_opened |= is_opened and bool(self.template.opening)
        else:
            length = _whole_markers(tail, rest, shared_start(tail, rest))
            if is_last:
                raise BadRowError(
                    "the prompt of the last assistant turn is not a prefix of the whole row under "
                    "the model's chat template, so training and generation would not see the same "
                    f"tokens: the prompt continues {tail[length : length + 40]!r}, the row "
                    f"{rest[length : length + 40]!r}",
                    "template not provable",
                )
        if anchor + length < earliest:
            raise BadRowError(
                f"the model's chat template writes the prompt of assistant turn {nth + 1} before "
                "the end of the turn before it",
                "template not provable",
            )
        return anchor + length

    def _anchor(self, nth: int) -> tuple[int | None, str]:
        """The place of a prompt's last mark in the row, and what the prompt goes on with."""
        asked = self.rendered.asked[nth]
        if asked.mark is None:
            return 0, asked.tail
        places = self.places.get(asked.mark, [])
        return (places[asked.index] if asked.index < len(places) else None), asked.tail

    # ---- where it ends

    def _end(self, nth: int, turn: int, begin: int) -> tuple[int, int]:
        """The end of a turn: behind its end-of-turn token, as (id, character)."""
        written = [self._first_place(mark, begin) for mark in self.marks[turn].last]
        last = max([begin, *(place for place in written if place is not None)])
        limit = self._next_place(turn, begin)
        if last > limit:
            raise BadRowError(
                f"the model's chat template writes a part of assistant turn {nth + 1} after the "
                "turns that follow it, so the turn cannot be trained as one",
                "template reorders turns",
            )
        position = self._id_at(last)
        while position < len(self.ids) and self._start_of(position) < limit:
            if self.ids[position] in self.template.end_ids and self._start_of(position) >= last:
                return position + 1, self.encoding.token_to_chars(position)[1]
            position += 1
        return self._end_without_stop(turn, last)

    def _end_without_stop(self, turn: int, last: int) -> tuple[int, int]:
        """The end of a turn that no control token ends: what it is written with at a row's end."""
        end = len(self.text)
        if turn + 1 < len(self.row):
            try:
                alone = self.template.text(self.row[: turn + 1], thinking=self.rendered.is_thinking)
            except TemplateError:
                alone = self.text
            end = shared_start(alone, self.text)
            end = end if end >= last else last
        while end > last and self.text[end - 1].isspace():
            end -= 1
        position = self._id_at(end)
        if position < len(self.ids) and self.ids[position] in self.template.end_ids:
            return position + 1, self.encoding.token_to_chars(position)[1]
        return position, end

    # ---- that it is the turn

    def _prove(self, nth: int, turn: int, begin: int, end: int) -> None:
        """Check that a stretch says and calls what its turn does; note what was left out."""
        message, marks = self.row[turn], self.marks[turn]
        self._prove_calls(nth, message, marks, begin, end)
        content = message["content"].strip()
        if not content:
            return
        at = self._first_place(marks.content, begin) if marks.content else None
        if at is None or at > end:
            if message.get("tool_calls"):
                self.stripped.append(content)  # the call is there, what was said with it is not
                return
            raise self._lost(nth, content, begin, end)
        said = self.text[begin:at]
        if self._is_whole(said, content, begin):
            return
        kept = _shared_end(said, content)
        before, header = content[: len(content) - kept].strip(), said[: len(said) - kept].strip()
        is_beside = bool(before) and self.text[:begin].rstrip().endswith(before)
        thought = message.get("reasoning_content", "").strip()
        is_header = bool(header) and not (thought and thought in header)
        if not kept or (is_beside and not header) or (is_header and not self.template.asks):
            raise self._lost(nth, content, begin, end)
        if _squeezed(before) not in _squeezed(header):
            self.stripped.append(before)

    def _is_whole(self, said: str, content: str, begin: int) -> bool:
        """Whether a stretch says all of a content, or all but markers that its prompt ends with."""
        if said.strip() == content:
            return True
        words, spoken = _squeezed(content), _squeezed(said)
        if words == spoken:  # templates choose the spacing round a thought
            return True
        opened = words.removesuffix(spoken)
        return bool(
            spoken
            and OPENED.fullmatch(opened)
            and _squeezed(self.text[max(begin - 2 * len(content), 0) : begin]).endswith(opened)
        )

    def _prove_calls(
        self, nth: int, message: Message, marks: TurnMarks, begin: int, end: int
    ) -> None:
        at = begin
        said = self.text[begin:end]
        for number, (mark, call) in enumerate(
            zip(marks.calls, message.get("tool_calls", []), strict=True)
        ):
            place = self._first_place(mark, at)
            name = call["function"]["name"]
            if place is None or place > end or not self.text[:place].endswith(name):
                raise BadRowError(
                    f"assistant turn {nth + 1} calls {name!r}, which the model's chat template "
                    f"does not write (call {number + 1}); remove the calls and their results, or "
                    "choose a template that takes tools",
                    "template without tool calls",
                )
            at = place
            missing = missing_arguments(call["function"].get("arguments"), said)
            if missing or self.template.dialect.arguments is None:
                raise BadRowError(
                    f"assistant turn {nth + 1}, tool_calls[{number}].function.arguments: the "
                    f"model's chat template writes them neither as an object nor as JSON text "
                    f"({', '.join(map(repr, missing[:3])) or 'tried with a call of its own'})",
                    "template without arguments",
                )

    def _lost(self, nth: int, content: str, begin: int, end: int) -> BadRowError:
        return BadRowError(
            f"assistant turn {nth + 1} cannot be found in the tokens of the chat template: "
            f"expected {content[:60]!r}, found {self.text[begin:end][:60]!r}",
            "template not provable",
        )

    def _prove_ids(self, nth: int, first: int, stop: int) -> None:
        """Check that the ids of a stretch say its text."""
        if first >= stop:
            raise BadRowError(
                f"assistant turn {nth + 1} has no tokens of its own under the chat template",
                "template not provable",
            )
        said = decoded(self.template.tokenizer, self.ids[first:stop])
        text = self.text[self._start_of(first) : self.encoding.token_to_chars(stop - 1)[1]]
        # Some tokenizers compose letters and their accents, which are then other characters.
        if said == text:
            return
        if _squeezed(normalize("NFC", said)) != _squeezed(normalize("NFC", text)):
            raise BadRowError(
                f"assistant turn {nth + 1} cannot be found in the tokens of the chat template: "
                f"expected {text[:60]!r}, found {said[:60]!r}",
                "template not provable",
            )

    def _prompt_end(self, begin: int, first: int) -> tuple[str, int, int]:
        """The prompt's text from its last control token on, and the ids that it must become."""
        start = first
        while start > 0:
            start -= 1
            if self.ids[start] not in self.template.special_ids:
                continue
            # Text that the tokenizer does not know can become a special token as well.
            left, right = self.encoding.token_to_chars(start)
            if self.template.is_special(self.text[left:right].strip()):
                break
        return self.text[self._start_of(start) if start else 0 : begin], start, first

    # ---- its thought

    def _thought(self, turn: int, begin: int) -> int | None:
        """Where what follows a turn's thought begins; None where no thought stands there."""
        message, mark = self.row[turn], self.marks[turn].thought
        if mark is not None:
            place = self._first_place(mark, begin)
            if place is None and turn == self.turns[-1]:
                raise lost_thought(f"turn {turn} ({message['role']}), the last answer,")
            if place is None:  # many templates keep the thoughts of the last answer only
                self.stripped.append(message["reasoning_content"].strip())
                return None
            self.num_thoughts += 1
            end = place + shared_start(self.text[place:], self.template.thought_end)
            return self._behind_space(end) if self.template.dialect.thought == "content" else end
        if "</think>" not in message["content"]:
            return None
        content = self.marks[turn].content
        place = self._first_place(content, begin) if content else None
        at = self.text.find("</think>", begin, place) if place is not None else -1
        if at < 0:
            return None
        self.num_thoughts += 1
        return self._behind_space(at + len("</think>"))

    def _behind_space(self, place: int) -> int:
        while place < len(self.text) and self.text[place].isspace():
            place += 1
        return place

    # ---- positions

    def _first_place(self, mark: str | None, start: int) -> int | None:
        for place in self.places.get(mark or "", ()):
            if place >= start:
                return place
        return None

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """Where texts end, each with its turn; ascending."""
        return sorted(
            (place, turn)
            for turn, marks in enumerate(self.marks)
            for mark in marks.last
            for place in self.places.get(mark, [])
        )

    def _next_place(self, turn: int, start: int) -> int:
        """Where the first text of any later turn ends, from `start` on; else the text's end."""
        if turn + 1 == len(self.row):
            return len(self.text)
        at = bisect.bisect_left(self.ends, (start, -1))
        return next((place for place, n in self.ends[at:] if n > turn), len(self.text))

    def _first_id(self, place: int) -> int:
        """As `_id_at`, or the token of spaces before it, which some tokenizers give no place."""
        position = self._id_at(place)
        while position > 0 and self._start_of(position - 1) > place:
            position -= 1
        return position

    def _id_at(self, place: int) -> int:
        """The first token that holds the character, or one behind it, or the number of tokens."""
        while place < len(self.text):
            found: int | None = self.encoding.char_to_token(place)
            if found is not None:
                return found
            place += 1
        return len(self.ids)

    def _start_of(self, position: int) -> int:
        start: int = self.encoding.token_to_chars(position)[0]
        return start


@lru_cache(maxsize=1024)
def _endings(tail: str, own: Asking, other: Asking) -> tuple[tuple[str, bool], ...]:
    """How a prompt may end in the row: with thinking off or on, or without an opened thought.

    Args:
        tail: the end of the row's own prompt.
        own: how prompts end as this row is rendered.
        other: how they end with thinking the other way.
    Returns:
        Each ending, and whether something that the prompt opens was left out.
    """
    shared = shared_start(own.tail, other.tail)
    whole = [(tail, own.openings)]
    if tail.endswith(own.tail[shared:]):
        swapped = tail[: len(tail) - len(own.tail[shared:])] + other.tail[shared:]
        whole.append((swapped, other.openings))
    # The other prompt may differ before the header too, and go on behind it.
    if own.tail in other.tail:
        whole.append((tail + other.tail.rpartition(own.tail)[2], ()))
    opened = [
        (ending.removesuffix(opening), True)
        for ending, openings in whole
        for opening in openings
        if ending.endswith(opening)
    ]
    return (*((ending, False) for ending, _ in whole), *opened)


def _whole_markers(a: str, b: str, length: int) -> int:
    """A length of what two texts share, less the start of a marker that only one of them has."""
    for text in (a, b):
        for marker in MARKER.finditer(text):
            if marker.start() < length < marker.end():
                length = marker.start()
    return length


def _squeezed(text: str) -> str:
    """A text less its spacing."""
    return "".join(text.split())


def _shared_end(a: str, b: str) -> int:
    """How many trailing characters two texts share."""
    return shared_start(a[::-1], b[::-1])


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open ranges as the stretches that they cover together, ascending."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged
