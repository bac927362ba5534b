"""A diff of two texts by words, for people: what is the same, what is missing, what is extra."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

MAX_PAIRS = 200_000
"""Equal word pairs up to which the middle is compared word by word: very repetitive texts would
take seconds, and say nothing more in detail."""
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")

Kind = Literal["same", "missing", "extra"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text."""

    kind: Kind
    """`same` in both; `missing`: only in the reference; `extra`: only in the text."""
    text: str


def word_diff(reference: str, text: str) -> list[Piece]:
    """Compare `text` with `reference` by words, numbers, signs and white space.

    Returns:
        Pieces in reading order; the `same` and `extra` ones make up `text`, the `same` and
        `missing` ones make up `reference`.
    """
    old, new = _WORDS.findall(reference), _WORDS.findall(text)
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
