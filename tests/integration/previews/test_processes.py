"""Killed workers, publishers and trainers; servers that come late, are full, or are not ours."""

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

from tests.integration import faulty_proxy as faults
from tests.integration.serving import Server, command, running_server
from trainer.core import TrainerEngine
from trainer.preview.scheduler import PreviewScheduler
from trainer.publish import snapshot
from trainer.views.page.worker_link import WorkerAddress, ask_worker

pytestmark = pytest.mark.slow
SIDECAR = {"preview_backend": "sidecar", "preview_drain_timeout": 60}


def process_of(word: str) -> psutil.Process:
    """Our descendant with this word in its command line; a sidecar's engine is its only child."""
    alive = [
        one
        for one in psutil.Process().children(recursive=True)
        if one.status() != psutil.STATUS_ZOMBIE
    ]
    [found] = [one for one in alive if word in one.cmdline()]
    return found


@pytest.fixture
def before_ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """A function that has something done just before the preview of a step is asked for."""

    def plan(when: int, what: Callable[[], None]) -> None:
        ask = PreviewScheduler.ask

        def ask_after(self: PreviewScheduler, step: int, **options: Any) -> None:
            if step == when:
                what()
            ask(self, step, **options)

        monkeypatch.setattr(PreviewScheduler, "ask", ask_after)

    return plan


def kill_engine() -> None:
    children = process_of("--wait-for-weights").children()
    [engine] = [one for one in children if "trainer.server.inference" in " ".join(one.cmdline())]
    engine.kill()


@pytest.mark.parametrize(
    "victim",
    ["sidecar", *(pytest.param(name, marks=pytest.mark.long) for name in ("engine", "publisher"))],
)
def test_a_killed_helper_is_started_again_and_the_next_previews_are_verified(
    attempt: Callable[..., Any], before_ask: Any, victim: str
) -> None:
    kills: dict[str, Callable[[], None]] = {
        "sidecar": lambda: process_of("--wait-for-weights").kill(),
        "engine": kill_engine,
        "publisher": lambda: process_of("trainer.publish.publisher").kill(),
    }
    # `attempt` waits for each preview, so that at step 3 all helpers are there and idle.
    result, rows = attempt(1, patch=lambda: before_ask(3, kills[victim]), **SIDECAR)
    assert [row["step"] for row in rows if row["error_message"] is None] == [0, 0, 3, 3, 6, 6]
    assert result.summary["previews"]["failed"] == 0


def test_a_publisher_killed_while_a_preview_is_made_makes_it_again(
    attempt: Callable[..., Any], before_ask: Any
) -> None:
    import threading

    def kill_soon() -> None:
        process = process_of("trainer.publish.publisher")
        threading.Timer(0.03, process.kill).start()

    _, rows = attempt(1, patch=lambda: before_ask(3, kill_soon), **SIDECAR)
    assert [row["step"] for row in rows if row["error_message"] is None] == [0, 0, 3, 3, 6, 6]


@pytest.fixture
def start_training(
    model: Path, qa_file: Path, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts `trainer train` in a process of its own; ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*words: str, output: str = "out") -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "trainer", "train", "--model", str(model)),
                        *("--dataset", str(qa_file), "--output", str(tmp_path / output), "--fp32"),
                        *("--batch-size", "4", "--monitoring.preview_max_tokens", "8"),
                        *("--monitoring.preview_temperature", "0", "--learning-rate", "0.01"),
                        *("--environment.num_threads", "1", *words),
                    ],
                    cwd=tmp_path,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def wait_until(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def test_a_killed_trainer_takes_sidecar_publisher_and_shared_memory_with_it(
    start_training: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("--max-steps", "100000", "--monitoring.inference_interval", "50")
    process = start_training(*words, "--monitoring.preview_backend", "sidecar")
    worker = tmp_path / "out" / "worker.json"
    wait_until(worker.exists)
    answers = tmp_path / "out" / "previews.jsonl"
    wait_until(lambda: answers.exists() and '"verified"' in answers.read_text())
    children = psutil.Process(process.pid).children(recursive=True)
    names = " ".join(word for one in children for word in one.cmdline())
    assert "serve" in names
    assert "trainer.publish.publisher" in names
    key_file = Path(json.loads(worker.read_text())["key_file"])
    assert key_file.stat().st_mode & 0o777 == 0o600
    address = WorkerAddress.model_validate(json.loads(worker.read_text()))
    reply = ask_worker(address, "2+2?", max_new_tokens=2)
    assert reply.run == address.run is not None  # by which the page knows whose weights answer
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    wait_until(lambda: not key_file.parent.exists(), 10)


@pytest.mark.long
def test_ctrl_c_while_draining_ends_the_wait_and_keeps_the_checkpoint(
    start_training: Callable[..., Any], server: Server, tmp_path: Path
) -> None:
    with faults.faulty_proxy(server.port, r"POST /previews", faults.hang) as proxy:
        port = str(proxy.server_address[1])
        words = ["--max-steps", "4", "--monitoring.preview_backend", "remote_3090"]
        words += ["--monitoring.remote_3090_host", "127.0.0.1"]
        process = start_training(*words, "--monitoring.remote_3090_port", port)
        for line in process.stdout:
            if "waiting for the last previews" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (tmp_path / "out" / "checkpoints" / "step-00000004").is_dir()
    rows = [json.loads(x) for x in (tmp_path / "out" / "previews.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 4}
    assert all("stopped before the answer" in row["error_message"] for row in rows)


def test_two_trainers_share_one_worker_and_each_gets_its_own_weights(
    start_training: Callable[..., Any], server: Server, tmp_path: Path
) -> None:
    words = ["--max-steps", "6", "--monitoring.inference_interval", "2"]
    words += ["--monitoring.preview_backend", "remote_3090"]
    words += ["--monitoring.remote_3090_host", "127.0.0.1"]
    words += ["--monitoring.remote_3090_port", str(server.port)]
    runs = {
        name: start_training(*words, "--environment.seed", seed, output=name)
        for name, seed in (("a", "1"), ("b", "2"))
    }
    ids = {}
    for name, process in runs.items():
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0, printed
        lines = (tmp_path / name / "previews.jsonl").read_text().splitlines()
        shown = [row for row in map(json.loads, lines) if row["error_message"] is None]
        assert {row["weights"] for row in shown} == {"verified"}
        assert {0, 6} <= {row["step"] for row in shown}
        ids[name] = {row["weights_id"] for row in shown if row["step"] == 6}
    assert ids["a"] != ids["b"]


def test_without_room_in_shared_memory_the_run_folder_is_used(
    attempt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server
) -> None:
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", tmp_path / "not there")
    seen: list[Path] = []
    folder = snapshot.arena_folder
    monkeypatch.setattr(
        "trainer.core.publishing.arena_folder",
        lambda *a, **k: seen.append(folder(*a, **k)) or seen[-1],
    )
    _, rows = attempt(server.port)
    assert {row["weights"] for row in rows} == {"verified"}
    assert seen[0].parent == tmp_path / "out"
    assert not seen[0].exists()


def test_a_server_that_comes_late_answers_from_then_on(
    attempt: Callable[..., Any], before_ask: Any, model: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:

        def come() -> None:
            started = stack.enter_context(
                subprocess.Popen(
                    command("--port", str(port), "--model", str(model)),
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
            stack.callback(started.terminate)
            assert started.stdout is not None
            assert started.stdout.readline().startswith("ready:")

        _, rows = attempt(
            port,
            patch=lambda: before_ask(3, come),
            is_patient=False,
            preview_drain_timeout=60,
        )
    by_step = {row["step"]: row["weights"] for row in rows if row["error_message"] is None}
    assert by_step[0] == by_step[6] == "verified"  # the first and the last step are kept


def test_nobody_there_warns_and_counts_and_training_is_the_same(
    attempt: Callable[..., Any],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        result, rows = attempt(taken.getsockname()[1], is_patient=False, preview_drain_timeout=1)
    counts = result.summary["previews"]
    assert len(rows) == counts["failed"] + counts["superseded"] == 6
    assert all(row["error_message"] for row in rows)


def test_a_server_without_room_is_told_and_counted(
    attempt: Callable[..., Any], model: Path
) -> None:
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "limited"]  # KiB a file
    with running_server("--model", str(model), prefix=limited) as full:
        _, rows = attempt(full.port)
    failed = [row for row in rows if row["error_message"] is not None]
    assert {row["step"] for row in failed} == {3, 6}  # step 0 is what it loaded itself
    assert all("cannot be stored" in row["error_message"] for row in failed)


@pytest.mark.parametrize(
    "mistake",
    [
        "key",
        "scope",
        pytest.param("tokenizer", marks=pytest.mark.long),
        "architecture",
        pytest.param("no server", marks=pytest.mark.long),
    ],
)
def test_a_misconfigured_server_fails_the_start(
    train: Callable[..., Any],
    model: Path,
    make_tokenizer: Any,
    make_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    words = {
        "key": "set monitoring.remote_3090_key_file or ULTIMATE_TRAINER_KEY",
        "scope": "has the scope generate, and a run publishes its weights",
        "tokenizer": "another chat template",
        "architecture": "another architecture",
        "no server": "does not answer as a preview server",
    }
    other, keys, options = tmp_path / "other", tmp_path / "keys", ["--model", str(model)]
    if mistake == "key":
        keys.write_text("x" * 20)
        options += ["--api-key-file", str(keys)]
    elif mistake == "scope":
        keys.write_text(f"generate: {'g' * 20}\npublish: {'p' * 20}\n")
        options += ["--api-key-file", str(keys)]
        monkeypatch.setenv("ULTIMATE_TRAINER_KEY", "g" * 20)
    elif mistake in ("tokenizer", "architecture"):
        changes = {"hidden_size": 64} if mistake == "architecture" else {}
        tokenizer = make_tokenizer("{{ messages[0]['content'] }}")
        make_model(vocab_size=len(tokenizer), **changes).save_pretrained(other)
        tokenizer.save_pretrained(other)
        options = ["--model", str(other)]
    monitoring = {"preview_backend": "remote_3090", "remote_3090_host": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(*options))
        port = server.port
        if mistake == "no server":
            proxy = faults.faulty_proxy(server.port, "GET /info", faults.garbage)
            port = stack.enter_context(proxy).server_address[1]
        result = train(
            "out", model_path=str(model), monitoring={**monitoring, "remote_3090_port": port}
        )
    assert (result.success, result.exit_code) == (False, 2)
    assert words[mistake] in (result.error_message or "")
    assert not (tmp_path / "out").exists()


def test_a_server_without_a_model_is_told_which_one_the_run_trains(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    with running_server() as empty:
        monitoring = {
            "preview_backend": "remote_3090",
            "remote_3090_host": "127.0.0.1",
            "remote_3090_port": empty.port,
            "preview_drain_timeout": 60,
        }
        hyper = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3}
        result = train("out", model_path="tiny", hyperparams=hyper, monitoring=monitoring)
    assert result.success, result.error_message
    assert result.summary["previews"]["verified"] == 8


@pytest.mark.long
def test_a_server_without_a_model_that_restarts_is_told_again(
    train: Callable[..., Any], before_ask: Any
) -> None:
    with contextlib.ExitStack() as first, contextlib.ExitStack() as later:
        port = first.enter_context(running_server()).port

        def restart() -> None:
            first.close()
            later.enter_context(running_server("--port", str(port)))

        before_ask(2, restart)
        monitoring = {
            "preview_backend": "remote_3090",
            "remote_3090_host": "127.0.0.1",
            "remote_3090_port": port,
            "inference_interval": 2,
            "num_eval_samples": 2,
            "preview_drain_timeout": 60,
        }
        hyper = {"max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-3}
        result = train("out", model_path="tiny", hyperparams=hyper, monitoring=monitoring)
    assert result.success, result.error_message
    lines = (result.output_dir / "previews.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["step"] == 4]
    assert [row["weights"] for row in last] == ["verified"] * 2


def test_a_server_that_cannot_load_the_runs_model_fails_the_start(
    train: Callable[..., Any], model: Path
) -> None:
    with running_server() as empty:
        monitoring = {
            "preview_backend": "remote_3090",
            "remote_3090_host": "127.0.0.1",
            "remote_3090_port": empty.port,
        }
        result = train("out", model_path=str(model), monitoring=monitoring)
    assert result.exit_code == 2
    assert "start it there with `trainer serve --model" in (result.error_message or "")


def test_copies_that_memory_has_no_room_for_are_told_and_lie_in_the_run_folder(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Listener:
        def on_event(self, event: Any) -> None:
            told.append(str(getattr(event, "text", "")))

        def close(self) -> None: ...

    monkeypatch.setattr(snapshot, "memory_left", lambda: 0)
    engine = TrainerEngine(observers=[Listener()])
    engine.build_callbacks(job(monitoring={"preview_backend": "sidecar"}))
    arenas = list((tmp_path / "out").glob("trainer-weights-*/arena-*"))
    engine.close()
    assert len(arenas) == 3
    assert any("the memory limit of this container has no room" in text for text in told)
