"""Runs of several processes end truthfully when one dies, hangs or fails, and can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.integration import ranks as ranks_module
from trainer.core.finished import open_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WAIT_S = 60
LIMIT_S = 60
"""From the fault to the end of all processes."""


@dataclass
class Launch:
    """One run of several processes, while it goes on or after."""

    folder: Path
    out: Path
    pids: list[int]
    launcher: subprocess.Popen[str]
    family: list[psutil.Process]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.steps() < step:
            assert time.monotonic() < deadline, self.texts()
            time.sleep(0.02)
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.family += psutil.Process(pid).children(recursive=True)

    def has(self, module: str) -> bool:
        """Whether a process of the run is this program."""
        for one in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in one.cmdline():
                    return True
        return False

    def steps(self) -> int:
        path = self.out / "metrics.jsonl"
        return path.read_text().count("StepDone") if path.exists() else 0

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pids[rank], number)

    def ends(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes; nothing of the run is alive any more."""
        assert self.launcher.stdout is not None
        too_long = threading.Timer(limit_s, self.kill)
        too_long.start()
        codes: list[int] = json.loads(self.launcher.stdout.readline())
        assert too_long.is_alive(), f"too long: {self.texts()}"
        too_long.cancel()
        _, alive = psutil.wait_procs(self.family, timeout=20)
        assert not alive
        return codes

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def texts(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank-*.txt")))

    def text_of(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def check_failed(self, *words: str) -> None:
        """status.json and run.json say that it failed, and why."""
        status = status_of(self.out)
        assert status["state"] == "failed", self.texts()
        for word in words:
            assert word in status["error"]["message"], status["error"]
        assert json.loads((self.out / "run.json").read_text())["state"] == "failed"


def status_of(out: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((out / "status.json").read_text())
    return status


Start = Callable[..., Launch]


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(Path(ranks_module.__file__))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        yield process
        process.stdin.close()


@pytest.fixture
def start(launcher: subprocess.Popen[str], qa_file: Path, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a run of two processes."""
    launches: list[Launch] = []

    def start(
        *words: str, patch: str = "", out: str = "out", steps: int = 100000, previews: str = "0"
    ) -> Launch:
        usual = ["--dataset", qa_file, "--model", "tiny", "--output", tmp_path / out, "--fp32"]
        usual += ["--environment.device", "cpu", "--batch-size", "2", "--max-length", "64"]
        usual += ["--max-steps", steps, "--monitoring.inference_interval", previews, "--quiet"]
        usual += ["--monitoring.micro_eval_interval", "0", "--monitoring.report_to", "none"]
        usual += ["--environment.num_threads", "1", "--output.report", "false"]
        folder = tmp_path / f"{out}-texts-{len(launches)}"
        folder.mkdir()
        order = {"folder": str(folder), "patch": patch, "world": 2}
        order["words"] = [str(word) for word in [*usual, *words]]
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        launcher.stdin.write(json.dumps(order) + "\n")
        launcher.stdin.flush()
        pids = json.loads(launcher.stdout.readline())
        family = [psutil.Process(one) for one in pids]
        launches.append(Launch(folder, tmp_path / out, pids, launcher, family))
        return launches[-1]

    yield start
    for one in launches:
        if any(process.is_running() for process in one.family):  # a test that failed
            one.kill()
            one.ends()


def test_a_rank_that_dies_ends_all_and_says_so(start: Start) -> None:
    run = start("--output.checkpoint_interval", "2")
    run.wait_for_step(3)
    run.send(1, signal.SIGKILL)
    assert run.ends() == [1, -9]
    run.check_failed("rank 1 died (SIGKILL)", "--resume")


def test_a_rank_that_is_stopped_ends_all_and_says_so(start: Start) -> None:
    run = start("--distributed.heartbeat_timeout_s", "2")
    run.wait_for_step(3)
    run.send(1, signal.SIGSTOP)
    assert run.ends() == [1, -9]
    run.check_failed("rank 1 did not answer for 2 s (its process is stopped)")


AT_STEP = """
import os, re, signal, time
from trainer.core.hf_trainer import SupervisedTrainer
plain = SupervisedTrainer.compute_loss
def compute_loss(self, *args, **options):
    step = self.state.global_step
    WHAT
    return plain(self, *args, **options)
SupervisedTrainer.compute_loss = compute_loss
"""


def at_step(what: str) -> str:
    """A patch that has something done in each forward pass, after `step` steps."""
    return AT_STEP.replace("WHAT", what)


def test_of_a_main_rank_that_dies_its_watcher_tells_and_the_run_goes_on_exactly(
    start: Start, assert_same_weights: Callable[[Path, Path], None]
) -> None:
    words = ("--output.checkpoint_interval", "2")
    dies = at_step("if rank == 0 and step == 5: os.kill(os.getpid(), signal.SIGKILL)")
    run = start(*words, patch=dies, steps=8)
    assert run.ends() == [-9, 1]
    run.check_failed("rank 0 died (SIGKILL)", "--resume")
    assert "[rank 1] error: rank 0 died (SIGKILL)" in run.text_of(1)
    again = start(*words, "--resume", steps=8)
    assert again.ends() == [0, 0], again.texts()
    undisturbed = start(*words, out="undisturbed", steps=8)
    assert undisturbed.ends() == [0, 0], undisturbed.texts()
    assert "find_unused_parameters" not in undisturbed.texts()
    assert_same_weights(again.out / "final_model", undisturbed.out / "final_model")
    assert status_of(again.out)["train_loss"] == status_of(undisturbed.out)["train_loss"]


def test_an_error_of_one_rank_is_told_by_all(start: Start) -> None:
    run = start(patch=at_step("if rank == 1 and step == 3: raise KeyError('no such column')"))
    assert run.ends() == [1, 1], run.texts()
    run.check_failed("rank 1 raised KeyError: 'no such column'")
    assert "[rank 1] error: KeyError: 'no such column'" in run.text_of(1)
    assert "[rank 1] ERROR trainer.core.run: the run failed\nTraceback" in run.text_of(1)
    assert "Traceback" not in run.text_of(0)
    summary = json.loads((run.out / "run.json").read_text())["summary"]
    assert "in compute_loss" in summary["traceback"]


@pytest.mark.long
def test_a_rank_that_runs_out_of_memory_says_so_to_all(start: Start) -> None:
    full = "import torch; raise torch.OutOfMemoryError('CUDA out of memory')"
    run = start(patch=at_step(f"if rank == 1 and step == 3:\n        {full}"))
    assert run.ends() == [1, 1], run.texts()
    run.check_failed("rank 1 raised MemoryFullError: step 4 ran out of the memory of cpu")


MISSING = """
from trainer.core import preparation
from trainer.errors import DataError
check_early = preparation.check_early
def check(*args, **options):
    found = check_early(*args, **options)
    if rank == 1:
        raise DataError("rows.jsonl: no such file")
    return found
preparation.check_early = check
"""


def test_an_error_of_one_rank_before_training_leaves_no_folder(start: Start) -> None:
    run = start(patch=MISSING)
    assert run.ends() == [2, 2], run.texts()
    assert "error: rank 1 raised DataError: rows.jsonl: no such file" in run.text_of(0)
    assert not run.out.exists()


def test_a_mistake_that_all_processes_find_is_told_once(start: Start) -> None:
    run = start("--hyperparams.lr_scheduler", "flat")
    first, second = run.ends()
    assert first == 2, run.texts()
    assert second in (2, -signal.SIGTERM)  # by the launcher, before it was ready for that
    assert "hyperparams.lr_scheduler='flat' is not one of" in run.text_of(0)
    assert run.texts().count("error:") == 1
    assert not run.out.exists()


OWN_MISTAKE = """
import os
from trainer import child
child.TOLD_S = 1.0
if rank == 1:
    os.environ["TRAINER_NOPE"] = "1"
"""


def test_a_mistake_that_one_process_finds_in_its_settings_is_told_by_it(start: Start) -> None:
    run = start(patch=OWN_MISTAKE)
    assert run.ends()[1] == 2, run.texts()
    assert "error: environment variable TRAINER_NOPE" in run.text_of(1)
    assert not (run.out / "run.json").exists()


NAN = """
import torch
from trainer.core.sharding import gathered
from trainer.core.hf_trainer import SupervisedTrainer
compute = SupervisedTrainer.compute_loss
def compute_loss(self, *args, **options):
    loss = compute(self, *args, **options)
    return loss * float("nan") if rank == 1 and self.state.global_step == 3 else loss
note = SupervisedTrainer._note
def noting(self, loss, inputs):
    note(self, loss * float("nan") if rank == 1 and self.state.global_step == 3 else loss, inputs)
guard = SupervisedTrainer._guard
def guarded(self, *args):
    try:
        guard(self, *args)
    except Exception:
        held = {}
        for names, tensor in gathered(self.accelerator.unwrap_model(self.model)):
            held |= dict.fromkeys(names, tensor.clone())
        held["is_fsdp2"] = bool(getattr(self.accelerator, "is_fsdp2", False))
        torch.save(held, f"FOLDER/rank-{rank}.pt")
        raise
SupervisedTrainer.compute_loss, SupervisedTrainer._note = compute_loss, noting
SupervisedTrainer._guard = guarded
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_a_nan_of_one_rank_stops_all_before_any_weight_moves(
    start: Start, strategy: str, tmp_path: Path
) -> None:
    words = ("--output.checkpoint_interval", "3", "--distributed.strategy", strategy)
    run = start(*words, patch=NAN.replace("FOLDER", str(tmp_path)))
    assert run.ends() == [1, 1], run.texts()
    run.check_failed("step 4: the loss of rank 1 is nan; the weights are those of step 3")
    model, _ = open_run(run.out, step="3").load()
    saved = model.state_dict()
    assert len(saved) > 10
    for rank in range(2):
        held = torch.load(tmp_path / f"rank-{rank}.pt")
        assert held["is_fsdp2"] == (strategy == "fsdp2")
        assert [name for name in saved if not torch.equal(saved[name], held[name])] == []


BUSY = """if rank == 0 and step in (2, 3, 4):
        begun = time.monotonic()
        if step == 2:
            time.sleep(SECONDS)
        elif step == 3:
            while time.monotonic() < begun + SECONDS: pass
        else:  # one call of C code that keeps Python's lock
            re.match("(a*)*b", "a" * LENGTH)
        print("BUSY", step, time.monotonic() - begun, flush=True)"""


def check_busy(start: Start, limit_s: float, busy_s: float, length: int) -> None:
    what = BUSY.replace("SECONDS", str(busy_s)).replace("LENGTH", str(length))
    limit = ("--distributed.heartbeat_timeout_s", str(limit_s))
    run = start(*limit, patch=at_step(what), steps=6)
    assert run.ends(600) == [0, 0], run.texts()
    times = [float(line.split()[2]) for line in run.text_of(0).splitlines() if "BUSY" in line]
    assert len(times) == 3
    assert min(times) > limit_s


def test_a_rank_that_is_busy_for_longer_than_the_limit_goes_on(start: Start) -> None:
    check_busy(start, 1.0, 2.5, 25)


@pytest.mark.long
def test_a_main_rank_that_is_busy_for_90_s_does_not_end_the_run(start: Start) -> None:
    check_busy(start, 30.0, 90.0, 31)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(start: Start) -> None:
    run = start()
    run.wait_for_step(3)
    run.send(1, signal.SIGINT)
    assert run.ends() == [130, 130], run.texts()
    status = status_of(run.out)
    assert (status["state"], status["summary"]["ended_by"]) == ("stopped", "SIGINT")
    assert status["phase"].startswith(f"by SIGINT after step {status['step']}")
    names = [path.name for path in (run.out / "checkpoints").iterdir()]
    assert names == [f"step-{status['step']:08d}"]
    assert not (run.out / "final_model").exists()


LOADS = """
from trainer.core import preparation
from trainer.errors import ModelError
load = preparation.load_base
def load_base(*args, **options):
    if rank == 1:
        raise ModelError("weights: no such file")
    return load(*args, **options)
preparation.load_base = load_base
"""


@pytest.mark.long
def test_an_error_of_one_rank_while_others_wait_to_begin_leaves_no_folder(start: Start) -> None:
    run = start(patch=LOADS)
    assert run.ends() == [2, 2], run.texts()
    assert "error: rank 1 raised ModelError: weights: no such file" in run.text_of(0)
    assert not run.out.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)]
)
def test_a_sidecar_does_not_outlive_the_run(
    start: Start, victim: int, number: signal.Signals
) -> None:
    words = ["--distributed.heartbeat_timeout_s", "3", "--monitoring.preview_backend", "sidecar"]
    run = start(*words, previews="2")
    deadline = time.monotonic() + WAIT_S
    while not run.has("trainer.publish.publisher"):  # there once the sidecar answers
        assert time.monotonic() < deadline, run.texts()
        run.wait_for_step(3)
    run.send(victim, number)
    run.ends()
    run.check_failed(f"rank {victim} ")


@pytest.mark.long
def test_a_rank_in_c_code_is_ended_by_its_watcher(start: Start) -> None:
    busy = at_step(
        "if rank == 0 and step == 3: print('NOW', flush=True) or re.match('(a*)*b', 'a' * 40)"
    )
    run = start(patch=busy)
    deadline = time.monotonic() + WAIT_S
    while "NOW" not in run.text_of(0):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send(1, signal.SIGKILL)
    assert run.ends() == [-9, -9]
    run.check_failed("rank 1 died (SIGKILL)")


@pytest.mark.long
def test_watchers_that_are_killed_are_started_again(start: Start) -> None:
    run = start("--distributed.heartbeat_timeout_s", "3")
    run.wait_for_step(3)
    watchers = [one for one in run.family if "trainer.monitoring.beats" in one.cmdline()]
    assert len(watchers) == 2
    for one in watchers:
        one.kill()
    time.sleep(6)
    run.wait_for_step(run.steps() + 3)
    run.send(1, signal.SIGKILL)
    assert run.ends() == [1, -9]
    run.check_failed("rank 1 died (SIGKILL)")
