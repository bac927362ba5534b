"""Golden and generated cut to the room there is, both round their first difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from trainer.monitoring.events import ELISION, printable
from trainer.views.differences import Piece, compare

LEAD_SHARE = 1 / 3
"""Of the room, for what stands before the first difference."""

FAR_CHARS = 4000
"""What stands further from the first difference is in no view of a terminal."""

THOUGHT = "(thought) "

Width = Callable[[str], int]


@lru_cache(maxsize=512)
def cut_pair(
    golden: str, text: str, room: int, width_of: Width = len
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both sides of a comparison on one line each, with the first difference in sight.

    Args:
        room: longest result, in the unit of `width_of`.
        width_of: characters, or the cells of a terminal.
    Returns:
        Pieces of golden (`same`, `missing`) and of the text (`same`, `extra`), printable. Both
        begin at the same place of what they share.
    """
    pairs = enumerate(zip(golden, text, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(golden), len(text)))
    begin, end = max(0, same - FAR_CHARS), same + FAR_CHARS
    found = compare(golden[begin:end], text[begin:end])
    left = _shown(found.reference, found.reference_thought)
    right = _shown(found.text, found.text_thought)
    places = [at for at in map(_first, (left, right)) if at is not None]
    if not places:  # nothing to point at: beginnings and ends say most
        sides = (_plain(left), _plain(right)) if len(golden) < end > len(text) else (golden, text)
        whole = [Piece("same", fit(side, room, width_of)) for side in sides]
        return (whole[0],), (whole[1],)
    longest = max(left, right, key=lambda side: width_of(_plain(side)))
    start = _start(_plain(longest), min(places), room, width_of)
    return _window(left, start, room, width_of), _window(right, start, room, width_of)


def fit(text: str, room: int, width_of: Width = len) -> str:
    """The text made printable, its middle left out where it is too long."""
    limit = room
    shown = printable(text, limit)
    while width_of(shown) > room and limit > 1:
        limit = max(1, limit * room // width_of(shown))
        shorter = printable(text, limit)
        if len(shorter) >= len(shown):
            break
        shown = shorter
    return shown


def _shown(pieces: Sequence[Piece], thought: str) -> list[Piece]:
    shown = [Piece(one.kind, printable(one.text, 8 * len(one.text) + 8)) for one in pieces]
    return [Piece("same", THOUGHT), *shown] if thought else shown


def _plain(pieces: Sequence[Piece]) -> str:
    return "".join(one.text for one in pieces)


def _first(pieces: Sequence[Piece]) -> int | None:
    """Where a side differs first, in characters."""
    at = 0
    for piece in pieces:
        if piece.kind != "same":
            return at
        at += len(piece.text)
    return None


def _start(text: str, at: int, room: int, width_of: Width) -> int:
    """The first character to show, so that the difference at `at` is in the room."""
    if width_of(text) <= room:
        return 0
    start, lead = at, int(room * LEAD_SHARE)
    while start > 0 and width_of(text[start - 1 : at]) <= lead:
        start -= 1
    # Near the end of the text there is room for more of what stands before.
    while start > 0 and width_of(text[start - 1 :]) <= room - len(ELISION.lstrip()):
        start -= 1
    return start


def _window(pieces: Sequence[Piece], start: int, room: int, width_of: Width) -> tuple[Piece, ...]:
    text = _plain(pieces)
    start = min(start, len(text))
    before = ELISION.lstrip() if start else ""
    room -= len(before)
    end = len(text)
    if width_of(text[start:]) > room:
        room -= len(ELISION.rstrip())
        end = start
        while end < len(text) and width_of(text[start : end + 1]) <= room:
            end += 1
    after = ELISION.rstrip() if end < len(text) else ""
    found, place = [Piece("same", before)], 0
    for piece in pieces:
        low, high = max(start, place), min(end, place + len(piece.text))
        if low < high:
            found.append(Piece(piece.kind, text[low:high]))
        place += len(piece.text)
    return tuple(one for one in [*found, Piece("same", after)] if one.text)
