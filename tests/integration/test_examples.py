"""The examples use the rooms' public faces only, and do what they say."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.monitoring import TrainingStatusReader

ROOT = Path(__file__).parents[2]
SCRIPT, OF_HF = (ROOT / "examples" / name for name in ("minimal_sft.py", "hf_trainer.py"))
FACES = {
    SCRIPT: ("config", "core", "data", "models", "preview"),
    OF_HF: ("config", "data", "models", "monitoring", "preview"),
}


def output_of(script: Path, tmp_path: Path, *words: str) -> str:
    """What a script prints; a failure shows why."""
    done = subprocess.run(
        [sys.executable, str(script), *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(tmp_path: Path, *words: str) -> list[tuple[int, float, str]]:
    """(step, loss, rest of the line) of each line that the flat loop prints."""
    found = []
    for line in output_of(SCRIPT, tmp_path, *words).splitlines():
        _, step, _, loss, rest = line.split(maxsplit=4)
        found.append((int(step.rstrip(":")), float(loss), rest))
    return found


def test_every_example_is_tested_here() -> None:
    assert set((ROOT / "examples").glob("*.py")) == set(FACES)


@pytest.mark.parametrize("script", FACES, ids=lambda path: path.stem)
def test_it_imports_from_the_faces_of_five_rooms_only(script: Path) -> None:
    tree = ast.parse(script.read_text())
    used = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer")
        for alias in node.names
    ]
    plain = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert not [name for name in plain if name.startswith("trainer")]
    assert {module for module, _ in used} == {f"trainer.{face}" for face in FACES[script]}
    for module, name in used:
        assert name in importlib.import_module(str(module)).__all__, f"{module}.{name}"


@pytest.mark.slow
def test_it_learns_the_generated_tasks_in_a_screen_of_code(tmp_path: Path) -> None:
    assert len(SCRIPT.read_text().splitlines()) < 100
    shown = run(tmp_path, "--steps", "20")
    assert [step for step, _, _ in shown] == [1, 10, 20]
    assert shown[-1][1] < 0.5 * shown[0][1]


@pytest.mark.slow
def test_it_goes_on_for_several_epochs_over_a_file_of_fewer_rows_than_a_batch(
    tmp_path: Path,
) -> None:
    rows = [{"question": f"max of {n} and 7?", "answer": str(max(n, 7))} for n in range(5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run(tmp_path, str(data), "--steps", "10")
    assert [step for step, _, _ in shown] == [1, 10]
    assert shown[1][1] < shown[0][1]
    assert "golden '7'" in shown[0][2]


@pytest.mark.slow
def test_a_plain_hf_trainer_is_watched_as_a_run_of_ours_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--steps", "20", "--output", str(folder))
    logged = [
        ast.literal_eval(line)
        for line in output_of(OF_HF, tmp_path, *words).splitlines()
        if line.startswith("{'loss'")
    ]
    reader = TrainingStatusReader(folder)
    status = reader.read()
    assert (status.state, status.step, status.total_steps) == ("completed", 20, 20)
    assert status.num_train_rows == 304  # 320, less what is held out
    assert status.last_checkpoint is not None
    assert Path(status.last_checkpoint.path).is_dir()
    steps = [line for line in reader.metrics() if line["type"] == "StepDone"]
    assert [line["step"] for line in steps] == list(range(1, 21))
    for line, log in zip(steps, logged, strict=True):
        assert line["train_loss"] == pytest.approx(float(log["loss"]), rel=1e-3)
        assert line["tokens_per_s"] > 0
        assert line["num_tokens"] > 0
        assert line["learning_rate"] == pytest.approx(float(log["learning_rate"]), rel=1e-3)
    previews = list(reader.previews())
    assert sorted({one.step for one in previews}) == [0, 10, 20]
    assert len(previews) == 9
    assert all(one.ok and one.golden_answer for one in previews)
    assert previews[0].text != previews[-1].text
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "report", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
