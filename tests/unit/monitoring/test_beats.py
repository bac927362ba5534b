"""Watchers of three ranks, which are sleeping processes here: who failed first, told to all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.child import Child
from trainer.files import LOCK
from trainer.monitoring.beats import Fault, Settings, write_end

WAIT_S = 20
TOKEN = "secret"


class Rank:
    """A process that sleeps, and its watcher."""

    def __init__(self, rank: int, world: int, timeout_s: float, folder: Path) -> None:
        self.process = subprocess.Popen(["sleep", "300"])
        self.settings = Settings(
            rank, world, self.process.pid, timeout_s, str(folder), token=TOKEN, host="127.0.0.1"
        )
        self.watcher = self.start(self.settings)

    @staticmethod
    def start(settings: Settings) -> Child:
        child = Child(["trainer.monitoring.beats"])
        child.send(json.dumps(asdict(settings)).encode())
        return child

    def say(self, kind: str, **values: Any) -> None:
        self.watcher.send(json.dumps({"kind": kind, **values}).encode())

    def fails(self, fault: Fault) -> None:
        self.say("failed", fault=asdict(fault))

    def hears(self) -> str:
        line = json.loads(self.watcher.receive(WAIT_S))
        assert line["kind"] == "fault"
        return str(Fault(**line["fault"]))

    def hears_nothing(self, wait_s: float) -> None:
        with pytest.raises(TimeoutError):
            self.watcher.receive(wait_s)

    def end(self) -> None:
        for pid in (self.process.pid, self.watcher.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        self.process.wait()
        self.watcher.end(0.0)


Begin = Callable[..., list[Rank]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """A function that starts three ranks whose watchers know each other."""
    with contextlib.ExitStack() as stack:

        def start(timeout_s: float = 60.0) -> list[Rank]:
            ranks = [Rank(number, 3, timeout_s, tmp_path) for number in range(3)]
            for rank in ranks:
                stack.callback(rank.end)
            port = json.loads(ranks[0].watcher.receive(WAIT_S))["port"]
            for rank in ranks[1:]:
                rank.say("join", host="127.0.0.1", port=port, token=TOKEN)
            joined = 0
            deadline = time.monotonic() + WAIT_S
            while joined < 2:  # both connections are there
                assert time.monotonic() < deadline
                states = [
                    one.status for one in psutil.Process(ranks[0].watcher.pid).net_connections()
                ]
                joined = states.count("ESTABLISHED")
            return ranks

        yield start


def test_a_rank_that_dies_is_named_to_all_with_its_signal(begin: Begin) -> None:
    ranks = begin()
    ranks[2].process.send_signal(signal.SIGSEGV)
    assert {rank.hears() for rank in ranks[:2]} == {"rank 2 died (SIGSEGV)"}


def test_a_rank_that_ends_without_a_word_is_named(begin: Begin) -> None:
    ranks = begin()
    ranks[0].process.terminate()
    assert {rank.hears() for rank in ranks[1:]} == {"rank 0 died (SIGTERM)"}


def test_a_rank_that_is_stopped_is_named_and_killed(begin: Begin) -> None:
    ranks = begin(1.0)
    ranks[1].process.send_signal(signal.SIGSTOP)
    words = "rank 1 did not answer for 1 s (its process is stopped)"
    assert {rank.hears() for rank in ranks} == {words}
    assert ranks[1].process.wait(WAIT_S) == -signal.SIGKILL


def test_a_rank_that_goes_on_in_time_is_not_named(begin: Begin) -> None:
    ranks = begin(2.0)
    ranks[1].process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    ranks[1].process.send_signal(signal.SIGCONT)
    ranks[0].hears_nothing(2.5)


def test_a_job_that_is_suspended_as_a_whole_goes_on(begin: Begin) -> None:
    ranks = begin(1.0)
    pids = [pid for rank in ranks for pid in (rank.process.pid, rank.watcher.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.0)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    ranks[0].hears_nothing(1.5)
    ranks[1].hears_nothing(0.1)


def test_a_machine_that_is_silent_is_named(begin: Begin) -> None:
    ranks = begin(1.0)
    ranks[2].process.send_signal(signal.SIGSTOP)
    os.kill(ranks[2].watcher.pid, signal.SIGSTOP)
    words = "rank 2 did not answer for 1 s (nothing comes from its machine)"
    assert {rank.hears() for rank in ranks[:2]} == {words}


def test_the_main_machine_that_is_silent_is_named(begin: Begin) -> None:
    ranks = begin(1.0)
    os.kill(ranks[0].watcher.pid, signal.SIGKILL)  # first: it would say that its rank died
    ranks[0].process.kill()
    words = "rank 0 did not answer for 1 s (nothing comes from its machine)"
    assert {rank.hears() for rank in ranks[1:]} == {words}


def test_of_a_broken_exchange_and_its_cause_the_cause_is_named(begin: Begin) -> None:
    ranks = begin()
    ranks[1].fails(Fault(1, "raised RuntimeError: Connection closed by peer", is_echo=True))
    time.sleep(0.3)
    ranks[2].fails(Fault(2, "raised KeyError: x"))
    assert {rank.hears() for rank in ranks} == {"rank 2 raised KeyError: x"}


def test_a_broken_exchange_without_another_cause_is_named(begin: Begin) -> None:
    ranks = begin()
    ranks[1].fails(Fault(1, "raised RuntimeError: Timed out", is_echo=True))
    assert {rank.hears() for rank in ranks} == {"rank 1 raised RuntimeError: Timed out"}


def test_a_rank_that_has_ended_in_order_is_not_missed(begin: Begin) -> None:
    ranks = begin(1.0)
    ranks[2].say("ended")
    assert ranks[2].watcher.wait(WAIT_S) == 0
    ranks[2].process.kill()
    ranks[0].hears_nothing(2.5)
    ranks[1].hears_nothing(0.1)


def test_a_watcher_that_is_started_again_finds_the_others(begin: Begin) -> None:
    ranks = begin(2.0)
    [port] = [
        one.laddr.port
        for one in psutil.Process(ranks[0].watcher.pid).net_connections()
        if one.status == "LISTEN"
    ]
    os.kill(ranks[0].watcher.pid, signal.SIGKILL)
    ranks[0].watcher.end(1.0)
    ranks[0].watcher = Rank.start(Settings(**{**asdict(ranks[0].settings), "port": port}))
    assert json.loads(ranks[0].watcher.receive(WAIT_S)) == {"kind": "port", "port": port}
    ranks[0].hears_nothing(3.0)
    ranks[1].process.kill()
    assert {ranks[0].hears(), ranks[2].hears()} == {"rank 1 died (SIGKILL)"}


def test_a_stranger_is_not_listened_to(begin: Begin) -> None:
    ranks = begin()
    [port] = [
        one.laddr.port
        for one in psutil.Process(ranks[0].watcher.pid).net_connections()
        if one.status == "LISTEN"
    ]
    for token in ("wrong", None):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            lines = [{"kind": "hello", "token": token, "rank": 1}]
            lines.append({"kind": "failed", "fault": asdict(Fault(1, "raised a lie"))})
            stranger.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            assert stranger.recv(100) in (b"", None)
    ranks[0].hears_nothing(0.5)


# ---- the last word of a run whose main process is gone


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A folder as a killed run leaves it."""
    status = {"state": "training", "phase": "training", "step": 7, "updated_at": time.time()}
    (tmp_path / "status.json").write_text(json.dumps({**status, "last_checkpoint": None}))
    (tmp_path / "run.json").write_text(json.dumps({"state": "training", "config": {}}))
    (tmp_path / LOCK).write_text("")
    return tmp_path


def states(folder: Path) -> tuple[str, str]:
    status, run = (json.loads((folder / name).read_text()) for name in ("status.json", "run.json"))
    return status["state"], run["state"]


def test_what_a_killed_run_left_says_who_died(left: Path) -> None:
    write_end(left, Fault(0, "died (SIGKILL)"), since=0.0)
    assert states(left) == ("failed", "failed")
    status = json.loads((left / "status.json").read_text())
    assert status["error"] == {"type": "RankError", "message": "rank 0 died (SIGKILL)"}
    assert (status["step"], status["eta_s"]) == (7, None)
    assert json.loads((left / "run.json").read_text())["exit_code"] == 1


def test_nothing_is_said_of_an_earlier_run_or_of_one_that_has_ended(left: Path) -> None:
    write_end(left, Fault(0, "died"), since=time.time() + 1)
    assert states(left) == ("training", "training")
    status = json.loads((left / "status.json").read_text())
    (left / "status.json").write_text(json.dumps({**status, "state": "completed"}))
    write_end(left, Fault(0, "died"), since=0.0)
    assert states(left) == ("completed", "training")
    write_end(left / "missing", Fault(0, "died"), since=0.0)
    assert not (left / "missing").exists()


def test_nothing_is_said_where_another_process_runs(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.monitoring.beats.LOCK_S", 0.1)
    with (left / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_end(left, Fault(0, "died"), since=0.0)
    assert states(left) == ("training", "training")
