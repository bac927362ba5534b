"""Somebody is told how a run ends: real processes, a real receiver, a real command."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainer.monitoring.events import RunEnded
from trainer.monitoring.notify import Notifier
from trainer.views.notify import told_reason

WAIT_S = 30
SECRET = "T0123/SECRET"
FAILED = "run gsm: failed at step 1 of 9: ValueError"

A_RUN = """
import sys, time
from pathlib import Path
from trainer.monitoring.events import Observers, RunStarted, StepDone, RunEnded
from trainer.monitoring.notify import Notifier
from trainer.monitoring.status_writer import TrainingStatusWriter

folder, silence_s, *notify = sys.argv[1:]
observers = Observers([TrainingStatusWriter(None, run_dir=folder)])
notifier = Notifier(
    tuple(notify), silence_s=float(silence_s), folder=Path(folder), warn=observers.notice
)
observers.add(notifier)
observers.emit(RunStarted(
    model_name="tiny", total_steps=9, start_step=0, num_epochs=1, num_train_rows=9,
    num_validation_rows=1, context_window=9, effective_batch_size=1, output_dir=folder,
))
step = 0
for line in sys.stdin:
    if line == "step\\n":
        step += 1
        observers.emit(StepDone(
            step=step, total_steps=9, epoch=0.1, train_loss=0.5, learning_rate=1e-3,
            grad_norm=1.0, tokens_per_s=9.0, num_tokens=9, num_trained_tokens=9,
            step_time_s=0.01, eta_s=1.0, memory_gib=0.1,
        ))
    elif line == "fail\\n":
        observers.emit(RunEnded(
            state="failed", step=step, error_type="ValueError",
            error_message="ValueError: 'the golden answer is 42'", summary={},
        ))
        observers.close()
        notifier.finish()
        sys.exit(1)
    print(line, flush=True)
"""


class Receiver:
    """A webhook on loopback that keeps what it is told."""

    def __init__(self, *, answers: bool = True) -> None:
        told: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        is_over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                told.put((self.path, json.loads(body)))
                if not answers:
                    is_over.wait(WAIT_S)
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"ok")  # no JSON, as Slack answers

            def log_message(self, *args: Any) -> None:
                pass

        self._told, self._is_over = told, is_over
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.host = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.host}/services/{SECRET}?token=t"

    def hears(self) -> dict[str, Any]:
        path, message = self._told.get(timeout=WAIT_S)
        assert path == f"/services/{SECRET}?token=t"
        return message

    @property
    def is_told_more(self) -> bool:
        return not self._told.empty()

    def close(self) -> None:
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


StartRun = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[StartRun]:
    """A function that starts a process that writes the files of a run, and is at step 1."""
    started = []

    def start(*notify: str, silence_s: float = 0.0) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", A_RUN, str(tmp_path / "gsm"), str(silence_s), *notify]
        run = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(run)
        say(run, "step")
        return run

    yield start
    for run in started:
        run.kill()
        run.communicate()


def say(run: subprocess.Popen[str], word: str) -> None:
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(f"{word}\n")
    run.stdin.flush()
    if word != "fail":
        assert run.stdout.readline()


def test_a_run_that_fails_is_told_without_what_its_error_quotes(
    receiver: Receiver, start_run: StartRun
) -> None:
    run = start_run(receiver.url)
    say(run, "fail")
    message = receiver.hears()
    assert (message["event"], message["status"], message["step"]) == ("failed", "failed", 1)
    assert message["text"] == message["content"] == FAILED
    assert message["reason"] is None
    assert message["figures"]["train_loss"] == 0.5
    assert "42" not in json.dumps({**message, "created_at": 0, "host": ""})
    assert run.wait(WAIT_S) == 1


def test_a_run_that_is_killed_is_told_by_the_process_that_outlives_it(
    receiver: Receiver, start_run: StartRun
) -> None:
    run = start_run(receiver.url)
    run.send_signal(signal.SIGKILL)
    message = receiver.hears()
    assert (message["event"], message["status"], message["step"]) == ("killed", "lost", 1)
    assert "died (SIGKILL) without saying why" in message["reason"]
    assert "no checkpoint was written" in message["reason"]


def test_a_silent_run_is_told_once_and_again_when_it_goes_on(
    receiver: Receiver, start_run: StartRun
) -> None:
    run = start_run(receiver.url, silence_s=0.6)
    run.send_signal(signal.SIGSTOP)
    message = receiver.hears()
    assert (message["event"], message["status"], message["step"]) == ("silent", "training", 1)
    assert "no update for" in message["text"]
    assert "its process is stopped" in message["text"]
    time.sleep(0.8)  # longer than silence_s: it is not told twice
    assert not receiver.is_told_more
    run.send_signal(signal.SIGCONT)
    say(run, "step")
    assert receiver.hears()["event"] == "goes_on"


def test_a_command_gets_the_message_without_a_shell(tmp_path: Path, start_run: StartRun) -> None:
    told = tmp_path / "told"
    program = "import os, sys; open(sys.argv[1], 'w').write(f'{sys.argv[2]}\\n{sys.stdin.read()}')"
    run = start_run(sys.executable, "-c", program, str(told), "{text}; touch $HOME `id`")
    say(run, "fail")
    assert run.wait(WAIT_S) == 1
    words, values = told.read_text().splitlines()
    assert words == f"{FAILED}; touch $HOME `id`"
    assert json.loads(values)["event"] == "failed"


def test_a_dead_receiver_is_said_once_without_its_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warned: list[str] = []
    notifier = Notifier(
        (f"http://127.0.0.1:9/services/{SECRET}",),
        silence_s=0.0,
        folder=tmp_path / "none",
        warn=warned.append,
    )
    began = time.monotonic()
    notifier.on_event(RunEnded(state="completed", step=3))
    assert time.monotonic() - began < WAIT_S
    notifier.finish()
    [record] = caplog.records
    assert "http://127.0.0.1:9/***" in record.message
    assert "cannot be reached" in record.message
    assert SECRET not in record.message
    assert not warned
    with pytest.raises(ProcessLookupError):
        os.kill(notifier._child.pid, 0)


def test_a_run_that_is_given_up_is_nothing_to_tell(tmp_path: Path) -> None:
    told = tmp_path / "told"
    notifier = Notifier(
        (sys.executable, "-c", f"open({str(told)!r}, 'w')"),
        silence_s=0.0,
        folder=tmp_path / "none",
        warn=print,
    )
    notifier.on_event(RunEnded(state="stopped", step=0, summary={"ended_by": "given_up"}))
    notifier.finish()
    assert not told.exists()


@pytest.mark.long
def test_a_receiver_that_never_answers_has_a_time_limit(start_run: StartRun) -> None:
    slow = Receiver(answers=False)
    run = start_run(slow.url, silence_s=0.5)
    assert slow.hears()["event"] == "silent"
    say(run, "step")  # training goes on meanwhile
    assert slow.hears()["event"] == "silent"  # the one retry
    say(run, "fail")
    assert slow.hears()["event"] in ("goes_on", "failed")
    assert run.wait(2 * WAIT_S) == 1
    slow.close()


@pytest.mark.parametrize(
    ("error_type", "message", "told"),
    [
        ("NonFiniteError", "step 3: the loss is nan", "step 3: the loss is nan"),
        ("OutOfMemoryError", "CUDA out of memory\nrows", "CUDA out of memory"),
        ("DataError", "rows.jsonl:3: 'a secret row'", None),
        ("KeyError", "'a secret row'", None),
        ("RankError", "rank 1 raised KeyError: 'a secret row'", "rank 1"),
        ("RankError", "rank 1 died (SIGKILL)", "rank 1 died (SIGKILL)"),
        (None, "x", None),
    ],
)
def test_the_message_of_an_error_is_told_where_it_quotes_no_row(
    error_type: str | None, message: str, told: str | None
) -> None:
    assert told_reason(error_type, message) == told
