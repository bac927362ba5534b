"""Run by tests: imports everything once, and forks the processes of one run after the other.

`forked_runs.py FOLDER` reads FOLDER/cases.json, {name: Case}; each process prints into
FOLDER/NAME-RANK.txt, and FOLDER/codes.json gets {name: [exit code of each rank]}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 150


@dataclass(frozen=True)
class Case:
    """One run of `trainer train`."""

    words: list[str]
    world: int = 1
    env: dict[str, str] = field(default_factory=dict)
    rooms: list[int] | None = None
    """Bytes that each rank finds on its device."""


@dataclass(frozen=True)
class Ended:
    """How it went."""

    codes: list[int]
    texts: list[str]
    """What each rank printed."""


def run_cases(folder: Path, cases: dict[str, Case]) -> dict[str, Ended]:
    """Run all cases in processes forked from one that has imported everything."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps({k: asdict(v) for k, v in cases.items()}))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *other_paths()])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S * len(cases),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    return {
        name: Ended(codes[name], [_log(folder, name, n).read_text() for n in range(case.world)])
        for name, case in cases.items()
    }


def other_paths() -> list[str]:
    """What PYTHONPATH names beside this checkout."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _log(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}.txt"


def main(folder: Path) -> None:
    import torch

    import trainer.core.engine
    from benchmarks.ranks import run_ranks
    from trainer.cli import main as trainer_main
    from trainer.core import dry_run, strategy

    assert trainer.core.engine  # imported before processes are forked
    torch.set_num_threads(1)
    codes = {}
    for name, values in json.loads((folder / "cases.json").read_text()).items():
        case = Case(**values)

        def work(rank: int, case: Case = case) -> int:
            os.environ.update(case.env)
            if case.rooms is not None:
                room = case.rooms[rank]
                for module in (strategy, dry_run):
                    module.device_memory = lambda device: room  # type: ignore[assignment]
            return trainer_main(case.words)

        def log(rank: int, name: str = name) -> Path:
            return _log(folder, name, rank)

        codes[name] = run_ranks(case.world, work, log, timeout_s=TIMEOUT_S)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
