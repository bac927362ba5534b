"""A phase that goes on in silence is told again, and nothing else is."""

from __future__ import annotations

import itertools
import time
from typing import Any

from trainer.monitoring.events import TRAINING, Observers, PhaseChanged, Waits


def test_a_phase_is_told_again_within_two_seconds_and_then_ever_more_rarely() -> None:
    now = [0.0]
    waits = Waits(lambda text: None, clock=lambda: now[0])
    waits.note(PhaseChanged(state="loading", text="loading x"))
    told: list[tuple[float, str]] = []
    for _ in range(1200):
        now[0] += 0.1
        words = waits.words()
        if words is not None:
            told.append((round(now[0], 1), words))
    assert told[0] == (1.5, "loading x: 2 s")
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(told)]
    assert max(gaps[:8]) < 2.2
    assert 8 < gaps[-1] < 13
    waits.note(PhaseChanged(state="training", text="previews", is_pause=True))
    now[0] += 3
    assert waits.words() == "previews: 3 s"
    waits.note(PhaseChanged(state="training", text=TRAINING, is_pause=True))
    now[0] += 100
    assert waits.words() is None


def test_a_wait_is_told_to_who_has_a_method_for_it_and_not_after_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(Waits, "FIRST_S", 0.05)

    class Slow:
        waits: list[str]

        def __init__(self) -> None:
            self.waits = []

        def on_event(self, event: Any) -> None: ...

        def on_wait(self, text: str) -> None:
            self.waits.append(text)
            raise ValueError("mine")

    slow = Slow()
    observers = Observers([slow])
    observers.phase("loading", "loading x")
    deadline = time.monotonic() + 30
    while len(slow.waits) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    observers.close()
    assert slow.waits[0].startswith("loading x: ")
    assert len(slow.waits) >= 2
    assert observers._waits._thread is not None
    assert not observers._waits._thread.is_alive()
