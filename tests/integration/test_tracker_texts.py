"""What rows and answers say is in the trackers where `tracker_texts` says so, and nowhere else.

Each tracker's files are read back by its own reader. W&B and trackio are no dependencies: their
cases are skipped where they are not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SECRET = "zebra"
"""In every prompt and golden answer of the rows, and nowhere else."""

RUN = (
    *("--hyperparams.max_steps", "2", "--hyperparams.batch_size", "4"),
    *("--monitoring.inference_interval", "1", "--monitoring.num_eval_samples", "2"),
    *("--monitoring.preview_max_tokens", "4", "--monitoring.display", "plain"),
    *("--environment.device", "cpu", "--data.validation_split", "0.2"),
)


def needs(tracker: str) -> Any:
    is_here = importlib.util.find_spec(tracker) is not None
    return pytest.param(
        tracker,
        marks=pytest.mark.skipif(not is_here, reason=f"{tracker} is not installed here"),
    )


@pytest.fixture
def run(
    cli: Callable[..., Any], model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """A function that trains as a user does; gives the folder with everything that was written."""
    rows = [{"question": f"{SECRET} {n} and?", "answer": f"{SECRET} {n} is {n}"} for n in range(20)]
    data = write_rows(rows)

    def make(tracker: str, *words: str) -> Path:
        there = tmp_path / "tracked"
        environment = {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(there),
            "WANDB_CACHE_DIR": str(tmp_path / "cache"),
            "TRACKIO_DIR": str(there),
        }
        there.mkdir()
        done = cli(
            *("train", "--model", model_folder, "--dataset", data, "--output", tmp_path / "run"),
            *RUN,
            *("--monitoring.report_to", tracker, *words),
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert SECRET in done.stdout  # the terminal shows them in any case
        return tmp_path / "run" / "logs" if tracker == "tensorboard" else there

    return make


@pytest.mark.parametrize(
    "tracker",
    [pytest.param("tensorboard", marks=pytest.mark.long), needs("wandb"), needs("trackio")],
)
def test_without_tracker_texts_no_file_of_a_tracker_has_a_text_of_a_row(
    run: Callable[..., Path], tracker: str
) -> None:
    found = [path for path in run(tracker).rglob("*") if path.is_file()]
    assert found
    assert [path for path in found if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("backend", ["local", "sidecar"])
@pytest.mark.parametrize("tracker", [needs("wandb"), needs("trackio")])
def test_with_tracker_texts_each_has_a_table_of_every_preview_step(
    run: Callable[..., Path], tracker: str, backend: str
) -> None:
    words = ("--monitoring.tracker_texts", "true", "--preview-backend", backend)
    tables = {"wandb": wandb_tables, "trackio": trackio_tables}[tracker](run(tracker, *words))
    steps = {row["step"] for rows in tables for row in rows}
    # A sidecar is told the first and the last step in any case, and the last answers come late.
    assert steps == {0, 1, 2} if backend == "local" else {0, 2} <= steps
    for rows in tables:
        assert len(rows) == 2
        for row in rows:
            assert row["prompt"].startswith(SECRET)
            assert row["golden"].startswith(SECRET)
            assert isinstance(row["generated"], str)
            assert row["matches"] == "no"


def wandb_tables(folder: Path) -> list[list[dict[str, Any]]]:
    """Of the history of an offline run, in its order."""
    [path] = folder.rglob("*.wandb")
    tables = []
    for record in wandb_records(path):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if name in ("previews", "previews/path"):
                value = json.loads(item.value_json)
                where = value["path"] if isinstance(value, dict) else value
                table = json.loads((path.parent / "files" / where).read_text())
                rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
                tables.append(rows)
    return tables


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of W&B's own format: a log of framed pieces in blocks, after LevelDB's."""
    from wandb.proto import wandb_internal_pb2

    block, head = 32 * 1024, 7
    data, at, parts = path.read_bytes(), head, b""
    while at + head <= len(data):
        left = block - at % block
        if left < head:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + head])
        parts += data[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def trackio_tables(folder: Path) -> list[list[dict[str, Any]]]:
    """Of the only run of the only project."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "[p] = S.get_projects(); [r] = S.get_runs(p)\n"
        "print(json.dumps([log['previews']['_value'] for log in S.get_logs(p, r) "
        "if 'previews' in log]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found
