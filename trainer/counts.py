"""Counts in words; the one place that knows that there is 1 row, and 2 rows."""

from __future__ import annotations


def counted(count: int, one: str, many: str | None = None) -> str:
    """Such as `1 row`, `0 rows`, `12,345 rows`, `1 older entry`.

    Args:
        one: what there may be one of.
        many: of any other count; None: `one` with an s.
    """
    return f"{count:,} {noun(count, one, many)}"


def noun(count: int, one: str, many: str | None = None) -> str:
    """The noun alone, for counts that are written in another way, such as `3 of 1 row`."""
    return one if count == 1 else many if many is not None else f"{one}s"
