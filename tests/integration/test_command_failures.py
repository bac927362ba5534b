"""Every command fails in the same form: one `error:` line, exit code 2, before torch is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import COMMANDS

PROBE = (
    "import sys; from trainer.cli import main; code = main(sys.argv[1:]); "
    "sys.exit(99 if {'torch', 'transformers'} & set(sys.modules) else code)"
)
TOO_LONG = "x" * 300
"""No file can have this name: the system's own error, as for a folder that may not be read."""

FAILURES: list[tuple[str, str]] = [
    ("nope", "there is no command 'nope'"),
    ("chat", "required: RUN"),
    ("chat RUN --nope", "unknown flag --nope"),
    ("chat RUN --step", "--step: expected one argument"),
    ("chat RUN --step bset", "'bset' is neither the number of a step (1 or more) nor `best`"),
    ("chat RUN --step 7", "step 7 has no checkpoint"),
    ("chat MODEL --step 7", "is not the folder of a run"),
    ("chat nowhere", "nowhere: no such folder; give the folder of a run"),
    ("chat some.txt", "some.txt: not a folder; give the folder of a run"),
    ("chat EMPTY", "empty: holds no run (no run.json), no checkpoint and no model"),
    ("chat DAMAGED", "run.json: cannot be read"),
    ("chat OTHER", "other: the record of the run cannot be used"),
    (f"chat {TOO_LONG}", "File name too long"),
    ("config", "give a command: show"),
    ("compare RUN --nope", "unknown flag --nope"),
    ("compare EMPTY", "give the folders of two to 6"),
    ("config --nope", "unknown flag --nope"),
    ("config nope", "unknown command nope"),
    ("config explain --nope", "unknown flag --nope"),
    ("config init --nope", "unknown flag --nope"),
    ("config init nowhere/c.json", "cannot be written"),
    ("config init some.txt", "ending in .json"),
    ("config schema more", "unexpected word more"),
    ("config show --config nowhere.json", "there is no such config file"),
    ("config validate", "give one or more config files"),
    ("config validate --nope", "unknown flag --nope"),
    ("config validate latin.json", "cannot be read as UTF-8"),
    ("config validate EMPTY.json", "cannot be read"),
    ("data", "give a command: inspect, cache"),
    ("data nope", "unknown command nope"),
    ("data cache nope", "invalid choice: 'nope'"),
    ("data inspect", "data.dataset_path is empty"),
    ("data inspect --nope", "unknown flag --nope"),
    ("demo --nope", "unknown flag --nope"),
    ("demo more", "unexpected word more"),
    ("demo --output some.txt/run", "some.txt/run: cannot be created"),
    (f"demo --output {TOO_LONG}", "File name too long"),
    ("doctor --nope", "unknown flag --nope"),
    ("export", "required: RUN"),
    ("export RUN --nope", "unknown flag --nope"),
    ("export RUN --step 7", "step 7 has no checkpoint"),
    ("export nowhere", "nowhere: no such folder"),
    ("export EMPTY", "empty: holds no run"),
    ("export MODEL --output RUN", "exists already"),
    ("export MODEL --base RUN", "--base"),
    ("models --nope", "unknown flag --nope"),
    ("models more", "unexpected word more"),
    ("monitor", "required: RUN_OR_FOLDER"),
    ("monitor RUN --nope", "unknown flag --nope"),
    ("monitor some.txt", "some.txt: not a folder"),
    ("monitor RUN --host 192.0.2.1", "--key-file"),
    ("monitor RUN --host 192.0.2.1 --key-file EMPTY", "--key-file"),
    ("monitor RUN --host nowhere.invalid --key-file key.txt", "cannot listen"),
    (f"monitor {TOO_LONG}", "File name too long"),
    ("report", "required: RUN"),
    ("report RUN --nope", "unknown flag --nope"),
    ("report nowhere", "nowhere: no such folder"),
    ("report some.txt", "some.txt: not a folder"),
    ("report EMPTY", "empty: holds no run"),
    ("report DAMAGED", "damaged/status.json"),
    ("report RUN --output nowhere/r.html", "cannot be written"),
    (f"report {TOO_LONG}", "File name too long"),
    ("serve --nope", "unknown flag --nope"),
    ("serve nowhere", "nowhere: no such folder"),
    ("serve EMPTY", "empty: holds no run"),
    ("serve RUN --step 7", "step 7 has no checkpoint"),
    ("serve RUN --model tiny", "each name a model"),
    ("serve --step 7", "give it as RUN"),
    ("serve --weights-dir nowhere", "--weights-dir nowhere"),
    ("serve --wait-for-weights", "--wait-for-weights needs --model"),
    ("serve --api-key-file nowhere", "--api-key-file nowhere"),
    ("serve --api-key-file EMPTY", "--api-key-file"),
    ("serve --host 192.0.2.1", "--api-key-file"),
    ("train", "data.dataset_path is empty"),
    ("train --nope", "unknown flag --nope"),
    ("train more", "unexpected word 'more'"),
    ("train --dataset", "expected one argument"),
    ("train --config EMPTY.json", "cannot be read"),
    ("train --resume --output nowhere", "holds no run"),
    ("watch", "required: RUN"),
    ("watch RUN --nope", "unknown flag --nope"),
    ("watch nowhere", "nowhere: no such folder"),
    ("watch some.txt", "some.txt: not a folder"),
    ("watch EMPTY", "empty: holds no run"),
    ("watch DAMAGED", "damaged/status.json"),
    (f"watch {TOO_LONG}", "File name too long"),
]


@pytest.fixture
def folders(tmp_path: Path, model_folder: Path) -> dict[str, Path]:
    """What the words RUN, MODEL, EMPTY, DAMAGED and OTHER stand for, in the current folder."""
    from trainer.config import create_default_config

    here = tmp_path / "cwd"
    here.mkdir(exist_ok=True)
    found = {name: here / name.lower() for name in ("RUN", "EMPTY", "DAMAGED", "OTHER")}
    for path in found.values():
        path.mkdir()
    config = create_default_config(model_path="m", dataset_path="d", output_dir="o")
    record = {"config": config.model_dump(mode="json"), "system_prompt": None}
    (found["RUN"] / "run.json").write_text(json.dumps(record))
    (found["OTHER"] / "run.json").write_text("{}")
    (found["DAMAGED"] / "run.json").write_text("{")
    for name in ("DAMAGED", "OTHER"):
        (found[name] / "final_model").mkdir()
    (here / "some.txt").write_text("x")
    (here / "key.txt").write_text("k" * 40)
    (here / "latin.json").write_bytes(b'{"model": {"model_path": "\xfc"}}')
    (here / "EMPTY.json").mkdir()
    return {**found, "MODEL": model_folder}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("line", "expected"), FAILURES, ids=[line.replace(TOO_LONG, "LONG") for line, _ in FAILURES]
)
def test_a_mistake_is_one_error_line_before_torch_is_loaded_and_nothing_is_written(
    line: str, expected: str, cli: Callable[..., Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    words = [str(folders.get(word, word)) for word in line.split()]
    before = tree(tmp_path)
    done = cli(*words, command=[sys.executable, "-c", PROBE], stdin=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == before


def test_every_command_is_in_the_list_with_an_unknown_flag() -> None:
    for name in COMMANDS:
        assert any(line.split()[0] == name and "--nope" in line for line, _ in FAILURES), name


PRINTS = [
    *("--help", "--version", "models", "doctor --offline"),
    *("config schema", "config show", "config explain", "config --help", "data --help"),
    *(f"{name} --help" for name in COMMANDS if name not in ("config", "data")),
]


@pytest.mark.parametrize("buffering", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("line", PRINTS)
def test_a_reader_that_went_away_is_no_error(line: str, buffering: str, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *line.split()],
        stdout=write_end,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONUNBUFFERED": buffering,
        },
        text=True,
        timeout=120,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["monitor EMPTY --port 0", "serve --port 0"])
def test_ctrl_c_ends_a_command_that_waits_with_130_and_no_traceback(
    line: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = [str(folders.get(word, word)) for word in line.split()]
    with running(words, tmp_path) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        time.sleep(0.5)  # printed before the server begins
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (130, "stopped\n")


def running(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    """`trainer WORDS` with pipes, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    )
