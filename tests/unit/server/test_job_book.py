"""Who is next: the kind, and within it the client, that has had the least of the engine."""

from __future__ import annotations

from collections import Counter

import pytest

from trainer.server.job_book import SAVED_S, FairQueue


def served(queue: FairQueue[int], seconds: dict[str, float], rounds: int) -> Counter[str]:
    """Engine seconds by kind and client while everybody always has something waiting."""
    found: Counter[str] = Counter()
    for _ in range(rounds):
        job, kind, client = queue.pop()
        queue.charge(kind, client, seconds[kind])
        found[kind] += seconds[kind]  # type: ignore[assignment]
        found[client] += seconds[kind]  # type: ignore[assignment]
        queue.push(job + 1000, kind, client)
    return found


def test_two_preview_clients_and_one_chat_share_the_engine_by_halves() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(20):
        queue.push(number, "previews", f"run-{number % 2}")
    queue.push(100, "chat", "me")
    found = served(queue, {"previews": 5.0, "chat": 1.0}, 600)
    assert found["chat"] == pytest.approx(found["previews"], abs=5)
    assert found["run-0"] == pytest.approx(found["run-1"], abs=5)


def test_a_client_that_floods_its_kind_keeps_nobody_of_it_waiting() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(50):
        queue.push(number, "chat", "flood")
    _, kind, client = queue.pop()
    queue.charge(kind, client, 1.0)
    queue.push(777, "chat", "other")
    assert {queue.pop()[0], queue.pop()[0]} == {777, 1}


def test_whoever_was_away_has_not_saved_everything_up() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push(0, "previews", "a")
    for _ in range(1000):  # the chat was away all this time
        job, kind, client = queue.pop()
        queue.charge(kind, client, 1.0)
        queue.push(job, kind, client)
    queue.push(1, "chat", "b")
    found = served(queue, {"previews": 1.0, "chat": 1.0}, 100)
    assert found["previews"] == pytest.approx((100 - SAVED_S) / 2, abs=2)


def test_a_cancelled_job_leaves_nothing_behind() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(10_000):
        queue.push(number, "chat", "a")
        queue.remove(number, "chat", "a")
    queue.remove(5, "chat", "a")
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()
    assert not queue._clients["chat"]["a"].waiting


def test_clients_that_come_and_go_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(2000):
        queue.push(number, "chat", f"client-{number}")
        queue.pop()
    assert len(queue._clients["chat"]) < 300


def test_the_check_of_shares_is_killed_by_turns_instead_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: every job counts as much as every other, however long it took."""
    charge = FairQueue.charge
    monkeypatch.setattr(FairQueue, "charge", lambda self, kind, one, _: charge(self, kind, one, 1))
    with pytest.raises(AssertionError):
        test_two_preview_clients_and_one_chat_share_the_engine_by_halves()
