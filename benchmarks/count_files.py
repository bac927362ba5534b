"""How much of the house a reader meets: files that `trainer train` can import, that a run enters.

    python benchmarks/count_files.py            the static closure, and files and lines by room
    python benchmarks/count_files.py --entered  also the files that `trainer demo` enters

The closure follows every import of `trainer.commands.train`, those inside functions and those for
type checkers too. A file is entered when one of its functions is called, as `sys.setprofile` sees
it in the demo's process and all its threads: what only runs while a module is imported is not.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trainer"
START = "trainer.commands.train"


def file_of(module: str) -> Path | None:
    """The source file of a module of the package; None for a name in a module."""
    path = ROOT.joinpath(*module.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


def imports_of(path: Path) -> set[str]:
    """Every name that a file imports, as `module` and `module.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "trainer"}


def closure(start: str) -> set[Path]:
    """Files that importing `start` can lead to; a module brings its packages along."""
    seen: set[Path] = set()
    left = [start]
    while left:
        name = left.pop()
        path = file_of(name)
        if "." in name:
            left.append(name.rpartition(".")[0])
        if path is not None and path not in seen:
            seen.add(path)
            left += imports_of(path)
    return seen


def num_lines(paths: set[Path]) -> int:
    """Lines of all files together."""
    return sum(path.read_bytes().count(b"\n") for path in paths)


def room_of(path: Path) -> str:
    """The room that a file is in; the ground floor's files are one room."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "ground"


def files_entered() -> set[Path]:
    """Files of the package in which a demo with local previews runs a function."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    from trainer.cli import main

    with tempfile.TemporaryDirectory() as folder:
        threading.setprofile(note)
        sys.setprofile(note)
        code = main(["demo", "--steps", "40", "--output", str(Path(folder) / "run")])
        sys.setprofile(None)
        threading.setprofile(None)
    if code:
        raise SystemExit(code)
    return {path for path in map(Path, entered) if PACKAGE in path.parents}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--entered", action="store_true", help="run the demo and count its files")
    options = parser.parse_args()
    every = set(PACKAGE.rglob("*.py"))
    reached = closure(START)
    rooms = Counter(room_of(path) for path in every)
    print(f"{'room':<12}{'files':>7}{'lines':>8}")
    for room, count in sorted(rooms.items()):
        lines = num_lines({path for path in every if room_of(path) == room})
        print(f"{room:<12}{count:>7}{lines:>8}")
    print(f"{'all':<12}{len(every):>7}{num_lines(every):>8}")
    print(f"closure of {START}: {len(reached)} files, {num_lines(reached)} lines")
    if options.entered:
        found = files_entered()
        print(f"trainer demo, local previews: {len(found)} files entered")


if __name__ == "__main__":
    main()
