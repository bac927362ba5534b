"""What differs between a golden answer and a generated one: for both sides, and in words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Literal

from trainer.counts import counted

MAX_PAIRS = 200_000
"""Equal word pairs up to which the middle is compared word by word: very repetitive texts would
take seconds, and say nothing more in detail."""

FOLD_CHARS, FOLD_CONTEXT = 600, 160
"""Equal stretches of more than FOLD_CHARS are folded, up to FOLD_CONTEXT beside a difference."""

Kind = Literal["same", "missing", "extra"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text."""

    kind: Kind
    """`same` in both; `missing`: only in the reference; `extra`: only in the text."""
    text: str


@dataclass(frozen=True)
class Fold:
    """A long equal stretch that is shown when somebody asks for it."""

    text: str


@dataclass(frozen=True)
class Difference:
    """Two texts beside each other; each side's pieces make up its text after the thoughts."""

    reference: tuple[Piece, ...]
    """`same` and `missing` pieces."""
    text: tuple[Piece, ...]
    """`same` and `extra` pieces."""
    reference_thought: str
    """`<think> ... </think>` at the beginning, with the white space around it; "" without."""
    text_thought: str
    first: int | None
    """Number of the first word that differs, from 1, or of the first character in scripts without
    spaces; None where nothing differs but white space or thoughts."""
    unit: Literal["word", "character"]
    words: str
    """Such as `first difference at word 9`, `only white space differs: 32 line breaks` or
    `no difference`."""

    @property
    def is_equal(self) -> bool:
        """Whether the texts are the same to the last sign, thoughts left out."""
        return all(piece.kind == "same" for piece in (*self.reference, *self.text))


def compare(reference: str, text: str) -> Difference:
    """Compare an answer with its golden answer, each without what it thought before."""
    reference_thought, reference = split_thought(reference)
    text_thought, text = split_thought(text)
    pieces = _joined(_without_crumbs(word_diff(reference, text)))
    first, unit = _first_difference(pieces)
    return Difference(
        reference=tuple(one for one in pieces if one.kind != "extra"),
        text=tuple(one for one in pieces if one.kind != "missing"),
        reference_thought=reference_thought,
        text_thought=text_thought,
        first=first,
        unit=unit,
        words=_in_words(pieces, first, unit, is_thought_same=reference_thought == text_thought),
    )


_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def split_thought(text: str) -> tuple[str, str]:
    """The thought at the beginning of an answer ("" without one), and what comes after it."""
    found = _THOUGHT.match(text)
    return (text[: found.end()], text[found.end() :]) if found else ("", text)


def folded(pieces: Sequence[Piece]) -> list[Piece | Fold]:
    """Pieces with their long equal stretches folded; all texts in order make up the same text."""
    found: list[Piece | Fold] = []
    if all(one.kind == "same" for one in pieces):
        return list(pieces)  # nothing to look for: the text itself is what is of interest
    for number, piece in enumerate(pieces):
        if piece.kind != "same" or len(piece.text) <= FOLD_CHARS:
            found.append(piece)
            continue
        start = 0 if number == 0 else _edge(piece.text, FOLD_CONTEXT)
        is_last = number == len(pieces) - 1
        end = len(piece.text) if is_last else _edge(piece.text, len(piece.text) - FOLD_CONTEXT)
        found += [Piece("same", piece.text[:start])] if start else []
        found.append(Fold(piece.text[start:end]))
        found += [Piece("same", piece.text[end:])] if end < len(piece.text) else []
    return found


def _edge(text: str, at: int) -> int:
    """A place near `at` where a line or a word begins."""
    for sign in ("\n", " "):
        found = text.find(sign, at - 40, at + 40)
        if found >= 0:
            return found + 1
    return at


# ---- words


_NO_SPACES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Scripts that put no spaces between words: there a word is a character."""


_WITH_MARKS = ((0, 0x1F000), (0xE0000, 0xE0200))
"""Beyond these there are no marks."""


@cache
def _pattern() -> re.Pattern[str]:
    """Words, characters of scripts without spaces, signs, white space.

    Marks (accents, vowel signs, variation selectors, skin tones) and what a joiner joins belong
    to the character before them: `\\w` knows nothing of them and would cut Hindi words in two.
    """
    marks = []
    for start, end in _WITH_MARKS:
        # In ranges, and by one call each: the first visitor of a page waits for it.
        kinds = "".join(map(unicodedata.category, map(chr, range(start, end))))[::2]
        spans = (one.span() for one in re.finditer("M+", kinds))
        marks += [f"\\U{start + a:08x}-\\U{start + b - 1:08x}" for a, b in spans]
    mark = f"[{''.join(marks)}\U0001f3fb-\U0001f3ff]"
    tail = f"(?:{mark}|\u200d[^\\s])*"
    return re.compile(
        rf"\s+|[{_NO_SPACES}]{tail}|(?:(?![{_NO_SPACES}])\w{tail})+"
        rf"|[\U0001f1e6-\U0001f1ff]{{2}}|[^\s]{tail}"
    )


def split_words(text: str) -> list[str]:
    """A text as words, signs and white space, which joined make up the text."""
    return _pattern().findall(text)


def word_diff(reference: str, text: str) -> list[Piece]:
    """Compare `text` with `reference` by words, numbers, signs and white space.

    Returns:
        Pieces in reading order; the `same` and `extra` ones make up `text`, the `same` and
        `missing` ones make up `reference`.
    """
    old, new = split_words(reference), split_words(text)
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    pieces = [Piece("same", "".join(new[:start]))]
    pieces += _middle(old[start : len(old) - end], new[start : len(new) - end])
    pieces.append(Piece("same", "".join(new[len(new) - end :])))
    return [piece for piece in pieces if piece.text]


def _middle(old: list[str], new: list[str]) -> list[Piece]:
    """The part between the common beginning and the common end."""
    counts = Counter(old)
    if sum(counts[word] for word in new) > MAX_PAIRS:
        return [Piece("missing", "".join(old)), Piece("extra", "".join(new))]
    pieces = []
    for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(new[c:d])))
        else:
            pieces += [Piece("missing", "".join(old[a:b])), Piece("extra", "".join(new[c:d]))]
    return pieces


def _without_crumbs(pieces: list[Piece]) -> list[Piece]:
    """Without equal pieces that hold no word and stand between differences.

    A space or a comma that two quite different texts share says nothing, and cuts in two what
    reads better in one.
    """
    found: list[Piece] = []
    for number, piece in enumerate(pieces):
        is_between = 0 < number < len(pieces) - 1
        has_word = any(sign.isalnum() for sign in piece.text) or "\n" in piece.text
        if piece.kind == "same" and is_between and not has_word and _is_replaced(pieces, number):
            found += [Piece("missing", piece.text), Piece("extra", piece.text)]
        else:
            found.append(piece)
    return found


def _is_replaced(pieces: list[Piece], number: int) -> bool:
    """Whether both sides have something else before and after an equal piece."""
    before = {one.kind for one in pieces[max(0, number - 2) : number]}
    after = {one.kind for one in pieces[number + 1 : number + 3]}
    return before == after == {"missing", "extra"}


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind in one piece, the missing before the extra of each difference."""
    found: list[Piece] = []
    missing, extra = "", ""
    for piece in [*pieces, Piece("same", "")]:
        if piece.kind == "missing":
            missing += piece.text
        elif piece.kind == "extra":
            extra += piece.text
        else:
            found += [Piece("missing", missing)] if missing else []
            found += [Piece("extra", extra)] if extra else []
            missing, extra = "", ""
            found += [piece] if piece.text else []
    return found


# ---- in words


def _first_difference(pieces: Sequence[Piece]) -> tuple[int | None, Literal["word", "character"]]:
    """Where the texts differ first in more than white space, from 1."""
    before: list[str] = []
    for number, piece in enumerate(pieces):
        if piece.kind == "same":
            before += split_words(piece.text)
            continue
        pair = pieces[number : number + 2] if piece.kind == "missing" else [piece]
        texts = {one.kind: one.text for one in pair}
        missing, extra = texts.get("missing", ""), texts.get("extra", "")
        if missing.split() != extra.split():
            words = [one for one in before if not one.isspace()]
            common = _num_common(missing, extra)
            is_by_character = bool(words + split_words(missing + extra)) and _is_without_spaces(
                "".join([*words, missing, extra])
            )
            if is_by_character:
                return len(words) + common + 1, "character"
            counted = [one for one in words if any(sign.isalnum() for sign in one)]
            return len(counted) + common + 1, "word"
        if piece.kind == "missing":
            before += split_words(missing)
        elif not missing:
            before += split_words(extra)
    return None, "word"


def _num_common(missing: str, extra: str) -> int:
    """Words with which both sides of one difference begin."""
    pairs = zip(missing.split(), extra.split(), strict=False)
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count


def _is_without_spaces(text: str) -> bool:
    letters = [sign for sign in text if sign.isalnum()]
    return 2 * sum(bool(re.match(f"[{_NO_SPACES}]", one)) for one in letters) > len(letters)


def _in_words(
    pieces: Sequence[Piece],
    first: int | None,
    unit: str,
    *,
    is_thought_same: bool,
) -> str:
    if first is not None:
        return f"first difference at {unit} {first:,}"
    white = [one for one in pieces if one.kind != "same"]
    if white:
        return f"only white space differs: {_white_words(white)}"
    return "no difference" if is_thought_same else "only the thoughts differ"


def _white_words(pieces: Sequence[Piece]) -> str:
    """What white space one side has more of, such as `32 line breaks`."""
    names = (("\n", "line break"), ("\t", "tab"), (" ", "space"))
    parts = []
    for sign, name in names:
        counts = dict.fromkeys(("missing", "extra"), 0)
        for piece in pieces:
            counts[piece.kind] += piece.text.count(sign)
        more = abs(counts["extra"] - counts["missing"])
        if more:
            which = "more" if counts["extra"] > counts["missing"] else "fewer"
            parts.append(counted(more, f"{which} {name}"))
    return ", ".join(parts) or "in other places"
