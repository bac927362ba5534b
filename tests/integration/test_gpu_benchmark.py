"""`make gpu`: its stages run here on the CPU, and its wheels are enough for a Python with torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_wheels

ROOT = Path(__file__).parents[2]

TRAIN = """
import sys
from pathlib import Path
import trainer.cli, trainer.commands.serve, trainer.server.inference_process
from benchmarks.gpu_setup import Bench, REHEARSAL
from benchmarks.gpu_stages import ours

print(ours(Bench(Path(sys.argv[1]), REHEARSAL, True, None), "0.6B", "lora"))
"""


def test_the_page_has_the_place_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(gpu.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(gpu, "PAGE", page)
    stages: dict[str, Any] = {
        "0.6B full": {"status": "done", "figures": {"tokens_per_s": 12345, "peak_gib": 9.5}},
        "generation": {"status": "not run", "reason": gpu.NO_TIME},
    }
    machine = {"card": "H", "torch": "2", "python": "3", "cpu_cores": 1, "date": "today"}
    for _ in range(2):  # it replaces the table before it
        gpu.write_page({**machine, "packages": {"peft": "1", "trl": None}, "stages": stages})
    text = page.read_text(encoding="utf-8")
    assert text.count("| 0.6B full | 12,345 | 9.5 |") == 1
    assert "- generation: not run (no time left)" in text
    assert "Not run: no GPU" not in text
    assert "Ten minutes in all" in text


@pytest.mark.long
def test_a_rehearsal_writes_what_each_stage_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = ["--rehearse", "--only", "generation", "--work", str(tmp_path), "--out", str(out)]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["is_rehearsal"]
    (stage,) = found["stages"].values()
    assert stage["status"] == "done"
    assert all(rate > 0 for rate in stage["figures"]["new_tokens_per_s"].values())


@pytest.mark.slow
def test_a_stage_over_its_limit_and_one_that_fails_are_written_as_such(tmp_path: Path) -> None:
    runner = gpu.Runner(tmp_path, tmp_path / "site", ("--rehearse",))
    late = runner.run("snapshot", 0.2)
    assert (late["status"], late["reason"]) == ("failed", "over its limit of 0 s")
    wrong = runner.run("no such stage", 60)
    assert (wrong["status"], wrong["reason"]) == ("failed", "exit code 2")
    assert "invalid choice" in wrong["log"][-1]


def comes_with(name: str, found: set[str]) -> set[str]:
    """A distribution and what it requires, as far as it is installed."""
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:
        return found
    if gpu_wheels.plain(name) in found:
        return found
    found.add(gpu_wheels.plain(name))
    for line in requires:
        needed = re.match(r"[\w.-]+", line)
        if "extra ==" not in line and needed is not None:
            comes_with(needed[0], found)
    return found


@pytest.mark.slow
def test_torch_and_the_wheels_are_all_that_a_run_and_its_server_import(tmp_path: Path) -> None:
    groups = ("a training run", "previews from a sidecar", "where torch came without numpy")
    listed = [name for group in groups for name in gpu_wheels.WHEELS[group]]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in sorted(comes_with("torch", set()) | set(map(gpu_wheels.plain, listed))):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            place = Path(str(distribution(name).locate_file(top)))
            if place.exists() and not (bare / top).exists():
                (bare / top).symlink_to(place)
    done = subprocess.run(
        [sys.executable, "-S", "-c", TRAIN, str(tmp_path)],  # -S: without what is installed
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert "tokens_per_s" in done.stdout


# ---- the folder of wheels


@pytest.mark.parametrize(
    ("name", "python", "runs"),
    [
        ("a-1-py3-none-any.whl", "3.12", True),
        ("a-1-py312-none-any.whl", "3.12", True),
        ("a-1-py311-none-any.whl", "3.12", False),
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", "3.12", True),
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", "3.11", False),
        ("a-1-cp310-abi3-manylinux_2_28_x86_64.whl", "3.12", True),
        ("a-1-cp313-abi3-manylinux_2_28_x86_64.whl", "3.12", False),
    ],
)
def test_a_wheel_is_for_its_python(name: str, python: str, runs: bool) -> None:
    assert gpu_wheels.runs_on(Path(name), python) is runs


def test_what_does_not_fit_is_named_and_removed(tmp_path: Path) -> None:
    for name, size in {"first": 60, "second": 50, "third": 40}.items():
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(bytes(size))
    assert gpu_wheels.fit(tmp_path, ["first", "second", "third"], 100) == ["second (0.0 MiB)"]
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["first", "third"]


def test_only_what_this_python_lacks_or_has_otherwise_is_unpacked(tmp_path: Path) -> None:
    here = distribution("rich").version
    for name in (f"rich-{here}", "rich_not_here-1", "tqdm-0", "numpy-0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    names = [path.name.partition("-")[0] for path in gpu_wheels.lacking(tmp_path)]
    assert names == ["rich_not_here", "tqdm"]
    (tmp_path / "old-1-cp39-cp39-manylinux_2_28_x86_64.whl").touch()
    with pytest.raises(ValueError, match="make gpu-wheels GPU_PYTHON_VERSION="):
        gpu_wheels.lacking(tmp_path)


def test_wheels_of_trl_stay_packed_where_the_rest_of_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets-0-py3-none-any.whl").touch()
    assert len(gpu_wheels.lacking(tmp_path)) == 1
    monkeypatch.setattr(gpu_wheels, "TRL_NEEDS", ("pandas", "no_such_module"))
    assert gpu_wheels.lacking(tmp_path) == []


def test_every_wheel_has_its_version_in_the_constraints() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {gpu_wheels.plain(name) for name in re.findall(r"(?m)^([\w.-]+)==", text)}
    listed = [name for group in gpu_wheels.WHEELS.values() for name in group]
    assert {gpu_wheels.plain(name) for name in [*listed, *gpu_wheels.TOO_LARGE]} <= pinned
    assert len(set(listed)) == len(listed)
