"""examples/minimal_sft.py uses the rooms' public faces only, and trains."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "minimal_sft.py"
FACES = ("config", "core", "data", "models", "preview")


def run(tmp_path: Path, *words: str) -> list[tuple[int, float, str]]:
    """(step, loss, rest of the line) of each line that the script prints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        _, step, _, loss, rest = line.split(maxsplit=4)
        found.append((int(step.rstrip(":")), float(loss), rest))
    return found


def test_it_imports_from_the_faces_of_five_rooms_only() -> None:
    tree = ast.parse(SCRIPT.read_text())
    used = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer")
        for alias in node.names
    ]
    plain = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert not [name for name in plain if name.startswith("trainer")]
    assert {module for module, _ in used} == {f"trainer.{face}" for face in FACES}
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
