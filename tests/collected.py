"""A generator to its end: what it yielded, and what it returned."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def collected(found: Generator[Item, None, Result]) -> tuple[list[Item], Result]:
    items = []
    while True:
        try:
            items.append(next(found))
        except StopIteration as end:
            return items, end.value
