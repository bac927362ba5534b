"""A child process speaks lines, ends with its parent, and never outlives `end`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trainer import __version__
from trainer.child import Child

ROOT = Path(__file__).parents[2]

ECHO = """
from trainer.child import own_lines
lines, out = own_lines()
print("a library prints")
for line in lines:
    out.write(line[::-1].strip() + b"\\n")
    out.flush()
"""

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""

PARENT = """
import sys
print("the main script ran", file=sys.stderr, flush=True)
from trainer import __version__
from trainer.child import Child
child = Child(["echo_child"])
child.send(b"abc")
child.receive()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on this process's path with the modules above."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in (("echo_child", ECHO), ("stubborn_child", STUBBORN), ("parent", PARENT)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def echo(modules: Path, tmp_path: Path) -> Iterator[Child]:
    child = Child(["echo_child"], log=tmp_path / "log")
    yield child
    child.end(5)
    child.lines.close()


def test_lines_go_both_ways_whatever_their_length(echo: Child) -> None:
    long = b"x" * (1 << 20) + b"y"
    echo.send(b"abc", long)
    assert echo.receive() == b"cba"
    assert echo.receive() == long[::-1]


def test_what_a_library_prints_in_the_child_is_no_line(echo: Child, tmp_path: Path) -> None:
    echo.send(b"abc")
    assert echo.receive() == b"cba"
    echo.end(5, is_asked=False)
    assert (tmp_path / "log").read_text() == "a library prints\n"


def test_a_child_ends_by_itself_when_its_stdin_closes(echo: Child) -> None:
    echo.send(b"abc")
    echo.receive()
    echo.end(10, is_asked=False)
    assert echo.returncode == 0


def test_a_child_that_ignores_sigterm_is_killed(modules: Path) -> None:
    child = Child(["stubborn_child"])
    assert child.receive() == b"up"
    child.end(0.2)
    assert child.returncode == -signal.SIGKILL
    child.lines.close()


def test_end_may_be_called_twice_and_after_a_kill(echo: Child) -> None:
    echo.process.kill()
    echo.end(5)
    echo.end(5)
    assert echo.returncode == -signal.SIGKILL


def test_a_child_that_is_gone_takes_and_gives_no_line(echo: Child) -> None:
    echo.process.kill()
    echo.wait(5)
    with pytest.raises(EOFError):
        echo.receive()
    with pytest.raises(BrokenPipeError):
        echo.send(b"abc")
    echo.end(5)
    with pytest.raises(BrokenPipeError):
        echo.send(b"abc")
    echo.lines.close()
    with pytest.raises(EOFError):
        echo.receive()


def test_a_line_that_a_killed_child_did_not_finish_is_no_line(modules: Path) -> None:
    (modules / "half_child.py").write_text("print('half of a', end='', flush=True)\n")
    child = Child(["half_child"])
    with pytest.raises(EOFError):
        child.receive()
    child.end(5)
    child.lines.close()


def test_the_wait_for_a_first_line_has_an_end(echo: Child) -> None:
    with pytest.raises(TimeoutError):
        echo.receive(0.1)
    echo.send(b"abc")
    assert echo.receive(30) == b"cba"


def test_a_file_of_the_working_folder_is_not_taken_for_a_module(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Run as a script, a program has its own folder on its path and not the working one.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(ROOT))])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit(3)\n")
    (modules / "json_child.py").write_text("import json; print(json.dumps([1]))\n")
    monkeypatch.chdir(elsewhere)
    child = Child(["json_child"])
    assert child.receive() == b"[1]"
    child.end(5)
    child.lines.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent_and_runs_no_main_script_again(
    modules: Path, number: signal.Signals
) -> None:
    parent = subprocess.Popen(
        [sys.executable, str(modules / "parent.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=30)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert errors.decode().count("the main script ran") == 1


@pytest.mark.parametrize("is_own", [True, False])
def test_a_signal_to_the_parents_group_reaches_a_child_without_its_own_session(
    modules: Path, is_own: bool
) -> None:
    child = Child(["echo_child"], has_own_session=is_own)
    assert (os.getpgid(child.pid) == os.getpgid(0)) is not is_own
    child.end(5)
    child.lines.close()


def test_a_process_that_ends_looks_for_no_garbage() -> None:
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))  # after what comes later\n"
        "from trainer.cli import main\n"
        "main(['version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ultimate-trainer", __version__, "True"]
