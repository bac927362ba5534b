"""What fails on the training side of published previews is an error of its step, never the end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from trainer.preview.base import PreviewRequest
from trainer.preview.scheduler import Finished
from trainer.publish.identity import Canary
from trainer.publish.lane import PublishedPreviews
from trainer.publish.snapshot import Snapshotter, read_later

REQUESTS = [PreviewRequest(prompt="a"), PreviewRequest(prompt="b")]


class NoWorker:
    """Never listens, so that nothing is given to a publisher."""

    url: str | None = None

    def start(self, on_ready: Callable[[], None]) -> None: ...

    def look_after(self) -> None: ...

    @property
    def is_lost(self) -> bool:
        return False

    def close(self) -> None: ...


class Unlucky:
    """A lane whose snapshot, canary or late device error can be switched on and off."""

    def __init__(self, folder: Path) -> None:
        self.error: dict[str, Exception] = {}
        self.finished: list[Finished] = []
        snapshots = Snapshotter({"w": torch.ones(4)}, torch.float32, torch.device("cpu"))
        copy = snapshots.copy

        def copies(arena: Any) -> Callable[[], None]:
            self._maybe("copy")
            copy(arena)
            return lambda: self._maybe("late")

        snapshots.copy = copies  # type: ignore[method-assign]
        self.lane = PublishedPreviews(
            worker=NoWorker(),
            setup={},
            snapshotter=snapshots,
            folder=folder,
            num_slots=2,
            requests=REQUESTS,
            canary=Canary((0,), 1, 1.0, self._score),
            matches=str.__eq__,
            parts_of=lambda ids: {"golden_tokens": tuple(map(str, ids))},
            backend_type="sidecar",
        )
        self.told = threading.Event()
        self.lane.start(self._on_finished)

    def _on_finished(self, finished: Finished) -> None:
        self.finished.append(finished)
        self.told.set()

    def _score(self) -> torch.Tensor:
        self._maybe("canary")
        return torch.zeros(1)

    def _maybe(self, place: str) -> None:
        if place in self.error:
            raise self.error[place]

    @property
    def num_free(self) -> int:
        return len(self.lane._state.free)


@pytest.fixture
def unlucky(tmp_path: Path) -> Any:
    folder = tmp_path / "arenas"
    folder.mkdir()
    made = Unlucky(folder)
    yield made
    made.lane.close()


@pytest.mark.parametrize("place", ["copy", "canary"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("launch failed")]
)
def test_an_error_in_snapshot_or_canary_is_the_steps_own(
    unlucky: Unlucky, place: str, error: Exception
) -> None:
    unlucky.error[place] = error
    for step in (0, 5, 10):  # more often than there are slots
        unlucky.lane.ask(step, is_kept=step == 0)
    assert [one.step for one in unlucky.finished] == [0, 5, 10]
    messages = {r.error_message or "" for one in unlucky.finished for r in one.results}
    assert all(str(error) in message for message in messages)
    assert unlucky.num_free == 2
    unlucky.error.clear()
    unlucky.lane.ask(15, is_kept=True)
    assert unlucky.lane.pending() == [15]


def test_an_error_that_the_device_tells_late_frees_the_slot_too(unlucky: Unlucky) -> None:
    unlucky.error["late"] = torch.OutOfMemoryError("CUDA out of memory")
    unlucky.lane.worker.url = "http://127.0.0.1:9"
    unlucky.lane.ask(0, is_kept=True)
    assert unlucky.told.wait(10)
    assert "out of memory" in (unlucky.finished[0].results[0].error_message or "")
    assert (unlucky.num_free, unlucky.lane.pending()) == (2, [])


def test_a_kept_step_without_a_slot_is_not_shown_with_the_weights_of_a_later_one(
    unlucky: Unlucky,
) -> None:
    """A preview that somebody asks for is kept, and so is the last step; both find no slot."""
    for step in (0, 5, 10):
        unlucky.lane.ask(step, is_kept=True)
    assert unlucky.lane.pending() == [0, 10]
    assert [one.step for one in unlucky.finished] == [5]
    assert unlucky.finished[0].is_superseded


def test_what_a_failed_canary_held_is_gone_when_the_lane_goes_on(unlucky: Unlucky) -> None:
    import weakref

    held: list[Any] = []

    def hungry() -> torch.Tensor:
        logits = torch.zeros(3)
        held.append(weakref.ref(logits))
        raise torch.OutOfMemoryError("CUDA out of memory")

    unlucky.lane.canary = Canary((0,), 1, 1.0, hungry)
    unlucky.lane.ask(0, is_kept=True)
    assert [one() for one in held] == [None]


class Watched(torch.Tensor):
    """Notes in which thread anything is asked of it."""

    threads: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.threads.add(threading.current_thread().name)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_feeding_thread_asks_nothing_of_the_device(unlucky: Unlucky) -> None:
    value = torch.ones(()).as_subclass(Watched)
    unlucky.lane.canary = Canary((0,), 1, 1.0, lambda: value)
    given: list[float | None] = []
    unlucky.lane._give = lambda one: given.append(one.canary_value)  # type: ignore[method-assign]
    unlucky.lane.worker.url = "http://127.0.0.1:9"
    Watched.threads.clear()
    unlucky.lane.ask(0, is_kept=True)
    for _ in range(200):
        if given:
            break
        time.sleep(0.02)
    assert given == [1.0]
    assert Watched.threads == {threading.main_thread().name}


def test_a_number_on_a_gpu_is_brought_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Held:
        def copy_(self, value: Any, *, non_blocking: bool) -> None:
            done.append("copy" if non_blocking else "wait")

        def __float__(self) -> float:
            done.append("read")
            return 2.5

    class Event:
        def record(self, stream: Any) -> None:
            done.append(f"mark {stream}")

        def synchronize(self) -> None:
            done.append("wait")

    def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
        done.append(f"on {device}")
        return contextlib.nullcontext()

    gpu = torch.device("cuda", 1)
    value: Any = SimpleNamespace(device=gpu, dtype=torch.float32)
    with monkeypatch.context() as fakes:
        fakes.setattr(torch, "empty", lambda *_, **options: options["pin_memory"] and Held())
        fakes.setattr(torch.cuda, "Event", Event)
        fakes.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        fakes.setattr(torch.cuda, "device", on)
        read = read_later(value)
        assert done == ["copy", "mark stream of cuda:1"]
        assert read() == 2.5
    assert done[2:] == ["on cuda:1", "wait", "read"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_number_is_read_while_the_gpu_has_other_work() -> None:
    value = torch.ones((), device="cuda") * 3
    read = read_later(value)
    torch.cuda._sleep(2_000_000_000)  # about a second of work behind the copy
    marker = torch.cuda.Event()
    marker.record()
    assert read() == 3.0
    assert not marker.query(), "the number came before the work was done"


def spooled(folder: Path, num_slots: int, finished: list[Finished]) -> PublishedPreviews:
    """A lane whose evaluations never give way, and whose server is not there yet."""
    folder.mkdir()
    lane = PublishedPreviews(
        worker=NoWorker(),
        setup={},
        snapshotter=Snapshotter({"w": torch.ones(4)}, torch.float32, torch.device("cpu")),
        folder=folder,
        num_slots=num_slots,
        requests=REQUESTS,
        canary=None,
        matches=str.__eq__,
        parts_of=lambda ids: {"golden_tokens": tuple(map(str, ids))},
        backend_type="sidecar",
        evaluation=[PreviewRequest(prompt="c")],
        is_spooled=True,
    )
    lane.start(finished.append)
    return lane


def test_no_newer_step_takes_the_place_of_an_evaluation_by_which_a_score_decides(
    tmp_path: Path,
) -> None:
    finished: list[Finished] = []
    lane = spooled(tmp_path / "arenas", 2, finished)
    try:
        lane.ask(0, is_kept=True, is_evaluated=True)
        assert lane.has_room()
        lane.ask(5, is_kept=False)  # a preview gives way, as there is an evaluation before it
        assert [(one.step, one.is_superseded) for one in finished] == [(5, True)]
        lane.ask(10, is_kept=False, is_evaluated=True)
        assert not lane.has_room()
        assert lane.pending() == [0, 10]
        lane.ask(15, is_kept=False)
        assert lane.pending() == [0, 10]
        assert [one.step for one in lane._state.staged] == [0, 10]  # answered in this order
        lane.ask(20, is_kept=False, is_evaluated=True)  # nobody waited for room
        assert [one.step for one in finished] == [5, 15, 20]
        [error] = {one.error_message for one in finished[-1].results}
        assert (error, len(finished[-1].results)) == ("no room for a copy of these weights", 3)
        assert not finished[-1].is_superseded
    finally:
        lane.close()
