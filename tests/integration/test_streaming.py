"""`data.streaming`: rows are trained while they are read, each once a pass, and resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT
from tests.integration.test_resume_exact import KEEP, QUIET, check_same_state
from trainer import files
from trainer.core import TrainerEngine
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.data import stream_reader, stream_rows
from trainer.data.stream_rows import StreamedDataset

NUM_ROWS = 150


def row(number: int) -> dict[str, str]:
    return {"question": f"what is {number}?", "answer": f"it is {number}. " * (number % 4 + 1)}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [row(number) for number in range(NUM_ROWS)])


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file is many pieces, few of which are there at a time."""
    monkeypatch.setattr(stream_reader, "PIECE", 8)
    monkeypatch.setattr(stream_rows, "MIN_AHEAD", 8)


@pytest.fixture
def stream(
    job: Callable[..., Any], rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, dict[int, list[str]]]]:
    """A function that runs a job on streamed rows and returns its result and each step's rows."""
    compute = SupervisedTrainer.compute_loss

    def run(name: str = "out", **options: Any) -> tuple[Any, dict[int, list[str]]]:
        seen: dict[int, list[str]] = {}

        def noted(self: Any, model: Any, inputs: dict[str, Any], *a: Any, **k: Any) -> Any:
            texts = self._tokenizer.batch_decode(inputs["input_ids"])
            names = [text.split("what is ")[1].split("?")[0] for text in texts]
            seen.setdefault(self.state.global_step + 1, []).extend(names)
            return compute(self, model, inputs, *a, **k)

        monkeypatch.setattr(SupervisedTrainer, "compute_loss", noted)
        options.setdefault("dataset_path", str(rows_file))
        data = {"streaming": True, "shuffle_buffer": 24, **options.pop("data", {})}
        monitoring = {**QUIET, **options.pop("monitoring", {})}
        config = job(name, data=data, monitoring=monitoring, **options)
        return TrainerEngine().run_job(config), seen

    return run


def in_order(seen: dict[int, list[str]]) -> list[str]:
    return [name for step in sorted(seen) for name in seen[step]]


def done(found: tuple[Any, dict[int, list[str]]]) -> dict[int, list[str]]:
    result, seen = found
    assert result.success, result.error_message
    return seen


@pytest.mark.slow
def test_each_pass_has_every_training_row_once_and_no_held_out_row(
    stream: Callable[..., Any],
) -> None:
    steps = {"max_steps": 72}  # 288 of two times about 120 rows
    seen = in_order(done(stream(hyperparams=steps, data={"group_by_length": False})))
    size = len(set(seen))
    assert NUM_ROWS // 10 < NUM_ROWS - size < NUM_ROWS // 3  # a fifth is held out, by hash
    first, second = seen[:size], seen[size : 2 * size]
    assert sorted(first) == sorted(second) == sorted(set(seen))
    assert first != second
    assert first != sorted(first, key=int)
    # Groups of like length are made of the rows of a pool: six steps, as large as the buffer.
    grouped = in_order(done(stream("grouped", hyperparams=steps)))
    assert grouped != seen
    for begin in range(0, len(seen), 24):
        assert sorted(grouped[begin : begin + 24]) == sorted(seen[begin : begin + 24])


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", [pytest.param(2, marks=pytest.mark.long), 30, pytest.param(55, marks=pytest.mark.long)]
)
def test_a_resume_in_any_pass_is_the_uninterrupted_run_bit_for_bit(
    stream: Callable[..., Any], at: int
) -> None:
    options: dict[str, Any] = {"hyperparams": {"max_steps": 60, "warmup_steps": 3}}
    keep = {**KEEP, "keep_checkpoints": 60}
    straight, seen = stream("straight", output=keep, **options)
    assert straight.success, straight.error_message
    again = straight.output_dir.parent / "again"
    shutil.copytree(
        straight.output_dir, again, ignore=shutil.ignore_patterns("final_model", ".lock")
    )
    for path in (again / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > at:
            shutil.rmtree(path)
    result, rest = stream("again", output={**keep, "resume": "latest"}, **options)
    assert result.success, result.error_message
    assert rest == {step: rows for step, rows in seen.items() if step > at}
    check_same_state(straight.checkpoint_path, result.checkpoint_path)


@pytest.mark.slow
def test_a_dry_run_and_an_inspection_read_the_first_rows_only_and_leave_nothing_running(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    lines = [json.dumps(row(number)) for number in range(NUM_ROWS)]
    lines[140] = "{"  # behind what is read
    file = tmp_path / "late.jsonl"
    file.write_text("\n".join(lines))
    data = {"streaming": True, "shuffle_buffer": 24, "validation_split": 0}
    monitoring = {**QUIET, "num_eval_samples": 2}
    config = job(dataset_path=str(file), data=data, monitoring=monitoring)
    for card in (
        TrainerEngine().dry_run(config).data.card,
        TrainerEngine().inspect_data(config).card,
    ):
        assert card.num_rows == 24
        assert "24 rows are read before the first step, the others while training" in card.streaming
    assert not [one for one in threading.enumerate() if one.name == "row stream"]
    result = TrainerEngine().run_job(
        job(dataset_path=str(file), data=data, monitoring=monitoring, hyperparams={"max_steps": 99})
    )
    assert not result.success
    assert result.exit_code == 2
    assert f"{file}:141" in str(result.error_message)
    assert 20 < result.global_step < 36
    assert not [one for one in threading.enumerate() if one.name == "row stream"]


@pytest.mark.slow
def test_the_end_of_a_run_tells_what_was_read_and_what_was_left_out(
    stream: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [row(number) for number in range(NUM_ROWS)]
    rows[100]["answer"] = ""
    file = write(tmp_path / "bad.jsonl", rows)
    result, _ = stream(
        dataset_path=str(file),
        hyperparams={"max_steps": 50},
        monitoring={"inference_interval": 25, "prompt_snapshot_interval": 1},
        data={"on_bad_row": "skip"},
    )
    assert result.success, result.error_message
    read = json.loads((result.output_dir / "run.json").read_text())["stream"]
    assert read["num_read"] == NUM_ROWS
    assert read["rows_per_pass"] + read["num_held_out"] == NUM_ROWS - 1
    assert sum(read["rejected"].values()) == 1
    assert f"{file}:101" in read["errors"][0]
    status = json.loads((result.output_dir / "status.json").read_text())
    assert not status["num_epochs"]
    assert "what is" in json.dumps(status)


# ---- kill -9


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_step(step: int) -> None:
    training_step = SupervisedTrainer.training_step

    def dying(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step + 1 == step:
            die()
        return training_step(self, *args, **named)

    SupervisedTrainer.training_step = dying  # type: ignore[method-assign]


def dies_in_save(step: int) -> None:
    def before(operation: str, path: Path) -> None:
        if f"step-{step:08d}" in str(path):  # its files are written, and not yet sealed
            die()

    files.before_operation = before


def dies_in_reader(step: int) -> None:
    keep = StreamedDataset._keep

    def dying(self: Any, piece: Any) -> bool:
        if piece.before.number > 4 * step:
            die()
        return keep(self, piece)

    StreamedDataset._keep = dying  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(dies_in_reader, marks=pytest.mark.long),
        dies_in_step,
        pytest.param(dies_in_save, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(
    stream: Callable[..., Any], spoil: Callable[[int], None]
) -> None:
    options: dict[str, Any] = {
        "hyperparams": {"max_steps": 40},
        "output": {"checkpoint_interval": 5, "keep_checkpoints": 9},
    }
    straight, _ = stream("straight", **options)
    child = os.fork()
    if child == 0:
        try:
            spoil(30)
            stream("killed", **options)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    options["output"]["resume"] = "latest"
    result, rest = stream("killed", **options)
    assert result.success, result.error_message
    assert 1 < min(rest) <= 31
    check_same_state(straight.checkpoint_path, result.checkpoint_path)


# ---- several processes


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_share_the_rows_of_one_and_go_on_with_them(
    job: Callable[..., Any], rows_file: Path, tmp_path: Path
) -> None:
    def launch(name: str, world: int, folder: str, **output: Any) -> dict[str, Any]:
        config = job(
            folder,
            dataset_path=str(rows_file),
            data={"streaming": True, "shuffle_buffer": 24},
            hyperparams={"max_steps": 40, "batch_size": 4 // world},
            monitoring=QUIET,
            output={"checkpoint_interval": 10, "keep_checkpoints": 9, **output},
            environment={"device": "cpu"},
        )
        return {"name": name, "world": world, "config": config.model_dump(mode="json")}

    launches = [
        launch("one", 1, "one"),
        {**launch("two", 2, "two"), "keep": 10},
        launch("again", 2, "two", resume="latest"),
    ]
    (tmp_path / "launches.json").write_text(json.dumps(launches))
    script = Path(__file__).with_name("streamed_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(words, check=True, timeout=500, cwd=ROOT, env=environment)

    def rows_of(name: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads((tmp_path / f"{name}.json").read_text())
        return found

    one, two = rows_of("one-0"), [rows_of("two-0"), rows_of("two-1")]
    for step, rows in one.items():
        assert len(two[0][step]) == len(two[1][step]) == 2
        assert sorted(two[0][step] + two[1][step]) == sorted(rows)
    for rank in (0, 1):
        later = {step: rows for step, rows in two[rank].items() if int(step) > 10}
        assert rows_of(f"again-{rank}") == later
