"""Same prompts at fixed steps; a slow backend never blocks, and what it misses is counted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.scheduler import PreviewScheduler, Stall

REQUESTS = [PreviewRequest(prompt="a", golden_answer="A"), PreviewRequest(prompt="b")]


class Backend:
    """Answers with the step number; a gated one waits until it is let go."""

    def __init__(self, backend_type: str, gate: threading.Event | None = None) -> None:
        self.backend_type, self.gate, self.closed = backend_type, gate, False

    def preview(self, *args: Any, **kwargs: Any) -> PreviewResult:
        raise NotImplementedError

    def preview_batch(self, requests: Any, step: int, **kwargs: Any) -> list[PreviewResult]:
        if self.gate is not None:
            assert self.gate.wait(30)
        return [PreviewResult(step=step, prompt=r.prompt, text=str(step)) for r in requests]

    def close(self) -> None:
        self.closed = True


def scheduler(backend: Backend, interval: int = 5) -> tuple[PreviewScheduler, list[Any]]:
    seen: list[Any] = []
    made = PreviewScheduler(
        backend, REQUESTS, interval=interval, deliver=lambda step, r, s: seen.append((step, r))
    )
    return made, seen


def test_step_zero_the_interval_and_the_last_step_have_previews() -> None:
    made, seen = scheduler(Backend("local"))
    for step in range(13):
        if made.is_due(step, is_last=step == 12):
            made.ask(step)
    assert [step for step, _ in seen] == [0, 5, 10, 12]
    assert all([r.prompt for r in results] == ["a", "b"] for _, results in seen)


def test_interval_zero_means_none_at_all() -> None:
    made, _ = scheduler(Backend("local"), interval=0)
    assert not made.is_due(0)
    assert not made.is_due(7, is_last=True)


def test_a_step_is_not_previewed_twice() -> None:
    made, seen = scheduler(Backend("local"))
    made.ask(10)
    assert not made.is_due(10, is_last=True)
    assert len(seen) == 1


def test_newer_steps_replace_waiting_ones_and_the_last_is_kept() -> None:
    gate = threading.Event()
    made, seen = scheduler(Backend("remote_3090", gate))
    for step in (0, 5, 10, 15):
        made.ask(step)
    assert [step for step, _ in seen] == [5, 10]
    assert all("superseded by step" in str(r.error_message) for _, found in seen for r in found)
    gate.set()
    made.drain(30)
    assert [step for step, found in seen if found[0].ok] == [0, 15]
    assert made.counters.superseded == 4
    assert made.counters.asked == 8
    assert made.counters.done == 4


def test_drain_gives_up_in_time_and_counts_the_rest_as_failed() -> None:
    gate = threading.Event()
    made, seen = scheduler(Backend("remote_3090", gate))
    made.ask(0)
    made.ask(5)
    made.drain(0.05)
    gate.set()
    assert [step for step, _ in seen] == [0, 5]
    assert made.counters.failed == 4
    made.close()
    assert made.backend.closed  # type: ignore[attr-defined]


class Broken(Backend):
    """Raises, which a backend must not."""

    def preview_batch(self, requests: Any, step: int, **kwargs: Any) -> list[PreviewResult]:
        raise RuntimeError("no idea")


def test_a_backend_that_raises_is_told_and_the_next_step_is_asked() -> None:
    made, seen = scheduler(Broken("openai"))
    for step in (0, 5):
        made.ask(step)
        made.drain(30)
    assert [step for step, _ in seen] == [0, 5]
    assert all("no idea" in str(result.error_message) for _, found in seen for result in found)
    assert made.counters.failed == 4


def test_a_run_that_ends_early_says_what_became_of_what_was_asked() -> None:
    gate = threading.Event()
    made, seen = scheduler(Backend("openai", gate))
    made.ask(0)
    made.give_up("the run ended")
    gate.set()
    assert [(step, found[0].error_message) for step, found in seen] == [(0, "the run ended")]
    made.give_up("again")
    assert len(seen) == 1


def test_on_a_gpu_the_devices_own_time_is_the_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 350.0])

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stall = Stall(is_on_gpu=True)
    stall.end()
    assert stall.seconds() == 0.25
    here = Stall(is_on_gpu=False)
    here.end()
    assert 0 <= here.seconds() < 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_work_that_a_gpu_does_later_is_a_stall() -> None:
    torch.cuda.init()
    torch.cuda._sleep(1_000_000_000)  # training's own, before it
    stall = Stall(is_on_gpu=True)
    torch.cuda._sleep(200_000_000)
    stall.end()
    assert stall._ended - stall._began < 0.05, "the thread does not wait"
    assert 0.05 < stall.seconds() < 0.4
