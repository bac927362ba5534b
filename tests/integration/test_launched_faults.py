"""Faults of runs that torchrun started, on one machine and on two; what signals to it do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from trainer.core.checkpoint import verify_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WAIT_S, LIMIT_S = 120, 60
"""Until something begins, and until a fault has ended all."""

WHOLE_S = 400
"""For a run without a fault, on a machine that does other work."""


class Launched:
    """torchrun, once per machine, and the ranks that it started."""

    def __init__(self, out: Path, texts: list[Path], agents: list[subprocess.Popen[bytes]]) -> None:
        self.out, self.texts, self.agents = out, texts, agents
        self.ranks: dict[int, psutil.Process] = {}
        self.family: list[psutil.Process] = []

    def wait_for_step(self, step: int) -> None:
        path, deadline = self.out / "metrics.jsonl", time.monotonic() + WAIT_S
        while not path.exists() or path.read_text().count("StepDone") < step:
            assert time.monotonic() < deadline, self.text()
            assert all(agent.poll() is None for agent in self.agents), self.text()
            time.sleep(0.05)
        for agent in self.agents:
            started = psutil.Process(agent.pid).children()
            self.ranks |= {int(one.environ()["RANK"]): one for one in started}
            self.family += psutil.Process(agent.pid).children(recursive=True)

    def watcher_of(self, rank: int) -> psutil.Process:
        children = self.ranks[rank].children()
        [found] = [one for one in children if "trainer.monitoring.beats" in one.cmdline()]
        return found

    def ends(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes of torchrun; nothing that it started is alive."""
        codes = [agent.wait(limit_s) for agent in self.agents]
        _, alive = psutil.wait_procs(self.family, timeout=20)
        assert not alive, self.text()
        return codes

    def text(self) -> str:
        return "".join(path.read_text() for path in self.texts)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.out / "status.json").read_text())
        return status

    def end(self) -> None:
        family = [
            *self.family,
            *(psutil.Process(one.pid) for one in self.agents if one.poll() is None),
        ]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in [*one.children(recursive=True), one]:
                    child.kill()
        for agent in self.agents:
            agent.wait()


Start = Callable[..., Launched]


@pytest.fixture
def start(qa_file: Path, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a run of two processes, on one machine or on two."""
    with contextlib.ExitStack() as stack:

        def begin(
            *words: str, machines: int = 1, previews: str = "0", meeting_at: int = 0
        ) -> Launched:
            """`meeting_at`: the number of the machine that holds torchrun's rendezvous."""
            out = tmp_path / "out"
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            launch = ["--nnodes", machines, "--nproc-per-node", 2 // machines, "--rdzv-id", "x"]
            launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            launch += ["--local-addr", "127.0.0.1"]
            usual = [
                "-m",
                "trainer",
                "train",
                "--dataset",
                qa_file,
                "--model",
                "tiny",
                "--fp32",
                "--quiet",
            ]
            usual += [] if "--output" in words else ["--output", out]
            usual += ["--environment.device", "cpu", "--batch-size", "2", "--max-length", "64"]
            usual += ["--monitoring.inference_interval", previews]
            usual += [] if "--max-steps" in words else ["--max-steps", "100000"]
            usual += ["--monitoring.micro_eval_interval", "0", "--monitoring.report_to", "none"]
            texts = [tmp_path / f"machine-{number}.txt" for number in range(machines)]
            agents = []
            for number, path in enumerate(texts):
                # Both are on one machine here, and either could be first to hold it.
                holds = ["--rdzv-conf", f"is_host={str(number == meeting_at).lower()}"]
                with path.open("wb") as file:
                    agents.append(
                        subprocess.Popen(
                            [
                                *(sys.executable, "-m", "torch.distributed.run"),
                                *map(str, [*launch, *holds, *usual, *words]),
                            ],
                            env={**os.environ, "PYTHONPATH": str(ROOT)},
                            cwd=tmp_path,
                            stdout=file,
                            stderr=file,
                            start_new_session=True,
                        )
                    )
            launched = Launched(out, texts, agents)
            stack.callback(launched.end)
            return launched

        yield begin


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hyperparams.lr_scheduler", "flat"), "hyperparams.lr_scheduler='flat' is not one of"),
        (("--profile.name", "nope"), "profile.name='nope' is not a known profile"),
    ],
    ids=["before torch is loaded", "after"],
)
def test_a_mistake_of_the_user_is_told_once(
    start: Start, words: tuple[str, ...], message: str
) -> None:
    run = start(*words)
    assert run.agents[0].wait(WAIT_S) == 1
    assert run.text().count(message) == 1
    assert "exitcode  : 2" in run.text()
    assert not run.out.exists()


@pytest.mark.long
def test_a_rank_that_dies_under_torchrun_is_no_stop_by_its_sigterm(start: Start) -> None:
    run = start()
    run.wait_for_step(3)
    run.ranks[1].kill()
    assert run.ends() == [1]
    assert run.status()["error"]["message"] == "rank 1 died (SIGKILL)"
    assert "error: rank 1 died (SIGKILL)" in run.text()
    assert "stopped: by SIGTERM" not in run.text()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
    ids=["SIGTERM", "SIGINT", "Ctrl-C"],
)
def test_a_signal_to_torchrun_saves_a_checkpoint(
    start: Start, number: signal.Signals, to_group: bool, strategy: str
) -> None:
    run = start("--distributed.strategy", strategy)
    run.wait_for_step(3)
    [agent] = run.agents
    os.killpg(agent.pid, number) if to_group else agent.send_signal(number)
    assert run.ends() == [1]
    status = run.status()
    assert (status["state"], status["summary"]["ended_by"]) == ("stopped", number.name)
    record = json.loads((run.out / "run.json").read_text())
    assert record["exit_code"] == 128 + number
    assert record["processes"]["strategy"] == strategy
    names = sorted(path.name for path in (run.out / "checkpoints").iterdir())
    assert names == [f"step-{status['step']:08d}"]
    assert verify_checkpoint(run.out / "checkpoints" / names[0]).step == status["step"]


@pytest.mark.long
def test_shards_that_torchrun_stopped_go_on_as_if_they_had_not_been(
    start: Start, tmp_path: Path
) -> None:
    words = ("--distributed.strategy", "fsdp2", "--max-steps", "60", "--output.report", "false")
    words += ("--hyperparams.lr_scheduler", "constant")
    run = start(*words)
    run.wait_for_step(3)
    run.agents[0].send_signal(signal.SIGINT)
    assert run.ends() == [1]
    stopped_at = run.status()["step"]
    assert 3 <= stopped_at < 60
    again = start(*words, "--resume")
    assert again.ends(WHOLE_S) == [0], again.text()
    assert json.loads((again.out / "run.json").read_text())["resumed_from_step"] == stopped_at
    undisturbed = start(*words, "--output", str(tmp_path / "undisturbed"))
    assert undisturbed.ends(WHOLE_S) == [0], undisturbed.text()
    runs = (again.out, tmp_path / "undisturbed")
    found = [load_file(out / "final_model" / "model.safetensors") for out in runs]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    losses = [
        {
            one["step"]: one["train_loss"]
            for one in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if one["type"] == "StepDone"
        }
        for out in runs
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60


@pytest.mark.long
def test_a_rank_that_dies_on_another_machine_ends_all(start: Start) -> None:
    run = start(machines=2)
    run.wait_for_step(3)
    run.ranks[1].kill()
    assert run.ends() == [1, 1]
    assert run.status()["error"]["message"] == "rank 1 died (SIGKILL)"


@pytest.mark.long
def test_a_machine_that_is_gone_ends_all(start: Start) -> None:
    """Also the status file is written, by a rank that sees the same folder."""
    run = start("--distributed.heartbeat_timeout_s", "4", machines=2)
    run.wait_for_step(3)
    other = run.ranks[1].ppid()
    [first] = [agent for agent in run.agents if agent.pid != other]
    watcher = run.watcher_of(0)
    first.kill()
    watcher.kill()
    run.ranks[0].kill()
    assert sorted(run.ends()) == [-9, 1]
    words = "rank 0 did not answer for 4 s (nothing comes from its machine)"
    assert run.status()["error"]["message"] == words
    assert f"[rank 1] error: {words}" in run.text()


def freeze_second(run: Launched) -> subprocess.Popen[bytes]:
    """Stop all of the machine that has rank 1; returns torchrun of the other one."""
    [second] = [agent for agent in run.agents if agent.pid == run.ranks[1].ppid()]
    frozen = [psutil.Process(second.pid), run.watcher_of(1), run.ranks[1]]
    for one in frozen:
        one.suspend()
    [first] = [agent for agent in run.agents if agent is not second]
    return first


FROZEN = "rank 1 did not answer for 4 s (nothing comes from its machine)"


@pytest.mark.long
def test_a_machine_that_is_frozen_ends_all(start: Start) -> None:
    run = start("--distributed.heartbeat_timeout_s", "4", machines=2)
    run.wait_for_step(3)
    assert freeze_second(run).wait(LIMIT_S) == 1
    assert run.status()["error"]["message"] == FROZEN


@pytest.mark.long
def test_a_frozen_machine_with_the_rendezvous_ends_the_ranks_of_the_other(start: Start) -> None:
    """Its torchrun then waits for the rendezvous, which is beyond a run's reach."""
    run = start("--distributed.heartbeat_timeout_s", "4", machines=2, meeting_at=1)
    run.wait_for_step(3)
    freeze_second(run)
    ended, deadline = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD), time.monotonic() + LIMIT_S
    while run.ranks[0].is_running() and run.ranks[0].status() not in ended:
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)
    assert run.status()["error"]["message"] == FROZEN
    assert f"[rank 0] error: {FROZEN}" in run.text()
