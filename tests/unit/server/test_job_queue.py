"""The queue with an engine that does as it is told: who waits, who is cancelled, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from trainer.server import job_queue
from trainer.server.inference_process import EngineDiedError
from trainer.server.job_book import KEPT_BYTES, Job, JobBook, KeyReusedError
from trainer.server.job_queue import JobQueue, QueueFullError

OLD, NEW = "a" * 64, "b" * 64
LOAD = json.dumps({"weights_id": NEW}).encode()


class FakeEngine:
    """Answers with the weights it holds; `hold` keeps an answer back until it is set."""

    def __init__(self) -> None:
        self.hello = {"weights_id": OLD}
        self.held = OLD
        self.beats = 0
        self.is_alive = True
        self.cancelled: list[int] = []
        self.asked: list[str] = []
        self.hold: threading.Event | None = None
        self.dies_on: set[str] = set()
        self._ids = iter(range(1, 10_000))

    def new_id(self) -> int:
        return next(self._ids)

    def start(self) -> None:
        self.held, self.is_alive = OLD, True

    def kill(self) -> None:
        self.is_alive = False
        if self.hold is not None:
            self.hold.set()

    def was_killed(self) -> bool:
        return False

    def cancel(self, message_id: int) -> None:
        self.cancelled.append(message_id)

    def ask(self, number: int, operation: str, body: bytes, on_text: Any = None) -> Any:
        self.asked.append(operation)
        if operation in self.dies_on:
            raise EngineDiedError
        if operation == "load_weights":
            self.held = json.loads(body)["weights_id"]
            return {"ok": True, "result": {}}, 10
        if self.hold is not None:
            while not self.hold.wait(0.01):
                if number in self.cancelled:
                    return {"ok": False, "status": 499, "error": "cancelled"}, 10
            if not self.is_alive:
                raise EngineDiedError
        return {"ok": True, "result": {"weights_id": self.held}}, len(body)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@contextlib.asynccontextmanager
async def running(engine: FakeEngine, **options: Any) -> AsyncIterator[JobQueue]:
    kept = {one: {"weights_id": one} for one in (OLD, NEW)}
    queue = JobQueue(engine, kept.get, **options)  # type: ignore[arg-type]
    queue.engine_started()
    tasks = [asyncio.create_task(work) for work in (queue.run(), queue.watch())]
    try:
        yield queue
    finally:
        if engine.hold is not None:
            engine.hold.set()
        for task in tasks:
            task.cancel()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def tag(weights_id: str, run: str | None = "r", step: int | None = 1) -> dict[str, Any]:
    return {"weights_id": weights_id, "run": run, "step": step}


def test_weights_are_chosen_for_each_job_and_move_nothing_for_others(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine) as queue:
            named = queue.submit("chat", b"{}", needs=tag(NEW))
            plain = queue.submit("chat", b"{}")
            for job in (named, plain):
                await queue.wait(job, 5)
            assert named.result == {"weights_id": NEW, "run": "r", "step": 1}
            assert plain.result == {"weights_id": OLD, "run": None, "step": None}
            assert queue.active["weights_id"] == OLD
            load = queue.submit("load_weights", LOAD, needs=tag(NEW, "r", 2))
            plain = queue.submit("chat", b"{}")
            await queue.wait(plain, 5)
            assert load.status == "done"
            assert plain.result == {"weights_id": NEW, "run": "r", "step": 2}

    run(work())


def test_a_restart_brings_the_active_weights_back_and_not_those_of_the_last_job(
    engine: FakeEngine,
) -> None:
    async def work() -> None:
        async with running(engine) as queue:
            load = queue.submit("load_weights", LOAD, needs=tag(NEW))
            await queue.wait(load, 5)
            await queue.wait(queue.submit("chat", b"{}", needs=tag(OLD)), 5)
            engine.dies_on = {"previews"}
            dead = queue.submit("previews", b"{}")
            await queue.wait(dead, 5)
            assert dead.code == 503
            assert engine.asked.count("previews") == 2
            assert engine.held == queue.active["weights_id"] == NEW

    run(work())


def test_a_load_that_ended_the_engine_is_not_tried_again(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine) as queue:
            engine.dies_on = {"load_weights"}
            load = queue.submit("load_weights", LOAD, needs=tag(NEW))
            await queue.wait(load, 5)
            assert (load.status, load.code) == ("failed", 422)
            assert engine.asked == ["load_weights"]
            assert queue.active["weights_id"] == OLD
            await queue.wait(job := queue.submit("chat", b"{}"), 5)
            assert job.result == {"weights_id": OLD, "run": None, "step": None}

    run(work())


def test_a_load_that_finds_the_engine_dead_is_done_by_the_next_one(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine) as queue:
            engine.is_alive = False
            load = queue.submit("load_weights", LOAD, needs=tag(NEW))
            await queue.wait(load, 5)
            assert (load.status, engine.held, queue.restarts) == ("done", NEW, 1)

    run(work())


def test_a_client_that_comes_back_with_its_key_gets_the_answer(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            first = queue.submit("chat", b"1", "key")
            first.waiters += 1
            await asyncio.sleep(0.05)
            queue.leave(first)  # its connection broke
            again = queue.submit("chat", b"1", "key")
            again.waiters += 1
            assert again is first
            engine.hold.set()
            await queue.wait(again, 5)
            assert again.status == "done"
            with pytest.raises(KeyReusedError):
                queue.submit("chat", b"2", "key")

    run(work())


def test_the_last_of_two_waiting_clients_ends_a_job_and_not_the_first(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(key: str | None) -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            job = queue.submit("chat", b"{}", key)
            job.waiters = 2
            await asyncio.sleep(0.05)
            queue.leave(job)
            await asyncio.sleep(0.1)
            assert not job.done.is_set()
            queue.leave(job)
            await queue.wait(job, 5)
            assert (job.status, job.code) == ("cancelled", 499)
            if key is not None:  # and whoever comes now gets a job of his own
                assert queue.submit("chat", b"{}", key) is not job

    monkeypatch.setattr(job_queue, "KEYED_GRACE_S", 0.05)
    run(work(None))
    run(work("key"))


def test_a_cancelled_job_is_no_answer_to_a_retry(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            job = queue.submit("chat", b"{}", "key")
            await asyncio.sleep(0.05)
            queue.cancel(job)
            assert queue.submit("chat", b"{}", "key") is not job

    run(work())


def test_what_takes_too_long_is_given_up_and_the_next_one_is_answered(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine, request_timeout_s=0.2) as queue:
            late, next_one = queue.submit("chat", b"{}"), queue.submit("chat", b"{}")
            while not late.done.is_set():
                engine.beats += 1
                await asyncio.sleep(0.1)
            engine.hold.set()
            await queue.wait(next_one, 5)
            assert late.code == 504
            assert "--request-timeout" in str(late.error)
            assert next_one.status == "done"

    run(work())


def test_an_engine_without_a_sign_of_life_is_replaced(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "WATCH_S", 0.02)

    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            job = queue.submit("chat", b"{}")
            await queue.wait(job, 10)
            assert (job.status, queue.restarts) == ("done", 1)
            engine.is_alive = False  # with nobody who asks
            while queue.restarts < 2:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)
            assert queue.is_ready

    run(work())


def test_bodies_go_when_jobs_end_and_cancelled_ones_leave_nothing(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            queue.submit("chat", b"{}")
            await asyncio.sleep(0.05)
            gc.collect()
            tracemalloc.start()
            for _ in range(600):
                queue.cancel(queue.submit("chat", b"x" * 100_000))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert grown < 2 << 20
            assert queue.waiting == 0

    run(work())


def test_large_bodies_are_bounded_together_and_keep_out_no_small_one(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            queue.submit("chat", b"{}")
            await asyncio.sleep(0.05)
            queue.submit("previews", b"x" * (40 << 20))
            with pytest.raises(QueueFullError):
                queue.submit("previews", b"x" * (40 << 20))
            queue.submit("chat", b"x" * 1000)

    run(work())


def test_previews_that_fill_their_places_leave_those_of_chat(engine: FakeEngine) -> None:
    async def work() -> None:
        engine.hold = threading.Event()
        async with running(engine) as queue:
            with contextlib.suppress(QueueFullError):
                for _ in range(100):
                    queue.submit("previews", b"{}")
            with pytest.raises(QueueFullError):
                queue.submit("previews", b"{}")
            assert queue.submit("chat", b"{}").status == "queued"

    run(work())


def test_results_are_kept_within_their_bytes_and_the_newest_always() -> None:
    book = JobBook()
    for number in range(20):
        job = Job("chat", b"")
        book.add(job)
        job.result_bytes = KEPT_BYTES // 4 if number < 19 else 2 * KEPT_BYTES
        job.finish("done", 200)
        book.forget_old(but=job)
        assert job.id in book.jobs
    assert len(book.jobs) == 1
