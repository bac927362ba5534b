"""N26's table: for every config field a check that really sees its effect. See test_fields.py."""

from __future__ import annotations

from collections.abc import Callable

from tests.trust.lab import Lab

Check = Callable[[Lab], None]
EFFECTS: dict[str, Check] = {}


def shows(*fields: str) -> Callable[[Check], Check]:
    """Enter a check for these fields."""

    def enter(check: Check) -> Check:
        for name in fields:
            assert name not in EFFECTS, f"{name} stands twice"
            EFFECTS[name] = check
        return check

    return enter
