"""Imports run one way, and light commands load no torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trainer"
GROUND = {"counts", "errors", "files", "net", "exchange", "guard", "child"}
DATA = {*GROUND, "config", "profiles", "models"}
MONITORING = {*DATA, "data", "preview", "scores", "publish"}
# A room and what it may import; a name with a dot is one module of a room.
ROOMS: dict[str, set[str]] = {
    "counts": set(),
    "errors": set(),
    "child": set(),
    "files": {"errors"},
    "net": {"errors", "files"},
    "exchange": {"errors", "files", "net"},
    "guard": {"errors", "files", "net"},
    "config": GROUND,
    "profiles": {*GROUND, "config"},
    "models": {*GROUND, "config", "profiles"},
    "data": DATA,
    "preview": {*DATA, "data"},
    "scores": {*DATA, "data", "preview"},
    "publish": {*DATA, "data", "preview"},
    "monitoring": MONITORING,
    "core": {*MONITORING, "monitoring"},
    "server": {*DATA, "preview", "publish.wire", "publish.identity", "publish.weight_file"},
    "views": {*GROUND, "monitoring", "preview.base", "scores.figures", "scores.statistics"},
    "job": {*MONITORING, "monitoring", "core", "views"},
    "commands": {*MONITORING, "monitoring", "core", "server", "views", "job"},
}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return {name for name in found if name.startswith("trainer.")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def broken_rule(room: str, module: str) -> str | None:
    """What is wrong with `room` importing a module of the package; None where it may."""
    target, inner = module.split(".")[1], ".".join(module.split(".")[1:3])
    if target == room or target in ROOMS[room] or inner in ROOMS[room]:
        return None
    return f"{room} may not import {module}"


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) in ROOMS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_of_its_line_in_the_table(path: Path) -> None:
    room = room_of(path)
    broken = [broken_rule(room, module) for module in sorted(imported_modules(path))]
    assert [rule for rule in broken if rule] == []


def test_every_room_has_its_line_in_the_table() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms - set(ROOMS) == {"__init__", "__main__", "cli"}


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("core", "trainer.views.report"),
        ("views", "trainer.core.engine"),
        ("views", "trainer.preview.local"),
        ("server", "trainer.publish.lane"),
        ("server", "trainer.core"),
        ("data", "trainer.preview.base"),
        ("files", "trainer.config.schema"),
        ("monitoring", "trainer.views.words"),
    ],
)
def test_the_table_refuses_what_no_room_may(room: str, module: str) -> None:
    assert broken_rule(room, module) == f"{room} may not import {module}"


def names_run_at_import(path: Path) -> set[str]:
    """Modules of the package that a file needs when it runs; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle, also inside functions; [] where none do."""
    left = dict(graph)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_files_import_each_other_in_a_circle() -> None:
    paths = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    graph = {
        name: (names_run_at_import(path) & set(paths)) - {name} for name, path in paths.items()
    }
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]


NOT_IMPORTED = {
    "tensorboard": "what transformers' Trainer writes report_to=tensorboard with",
    "httptools": "uvicorn's HTTP parser",
    "uvloop": "uvicorn's event loop",
}
"""Requirements that other packages import for us."""


def test_every_requirement_is_imported_by_the_program() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    required = {re.split(r"[>=<;\[ ]", text)[0] for text in project["dependencies"]}
    names = {"PyYAML": "yaml", "prometheus-client": "prometheus_client"}
    imported = {
        name.split(".")[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    unused = {name for name in required if names.get(name, name) not in imported}
    assert unused == set(NOT_IMPORTED)


def test_nobody_imports_the_command_line() -> None:
    importers = [path for path in FILES if "trainer.cli" in imported_modules(path)]
    assert importers == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    [
        "import trainer.config",
        "from trainer.profiles import get_profile; get_profile('regime3')",
        "from trainer.monitoring import TrainingStatusReader",
        "from trainer.cli import main; main(['--help'])",
        "from trainer.cli import main; main(['config', 'explain'])",
        "from trainer.cli import main; main(['models'])",
        "from trainer.cli import main; main(['watch', '.'])",
        "from trainer.cli import main; main(['report', '.'])",
        "from trainer.cli import main; main(['train', '--model', 'tiny', '--dataset', 'absent'])",
        "import trainer.core.early_checks, trainer.commands.train",
        "import trainer.views.page.site, trainer.commands.monitor",
        "import trainer.core, trainer.data, trainer.models, trainer.preview",
    ],
)
def test_what_needs_no_torch_loads_none(code: str, tmp_path: Path) -> None:
    probe = "; import sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + probe],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


SAME_NAMES = {
    "notify": {"monitoring", "views"},  # the run's side, and the process that tells
    "report": {"commands", "views"},  # `trainer report`, and the report that it writes
    "watch": {"commands", "views"},  # `trainer watch`, and how a run is watched
}
"""Modules of one name in several rooms: two sides of one thing, as a command and what it shows."""


def rooms_by_name(names: Iterable[str]) -> dict[str, set[str]]:
    """Name -> the rooms that have a module of it, for names that more than one has."""
    found: dict[str, set[str]] = {}
    for name in names:
        *room, stem = name.split(".")[1:]
        found.setdefault(stem, set()).add(".".join(room))
    return {stem: rooms for stem, rooms in found.items() if len(rooms) > 1}


def test_modules_of_one_name_are_two_sides_of_one_thing() -> None:
    modules = [module_name(path) for path in PACKAGE.rglob("*.py") if not path.stem.startswith("_")]
    assert rooms_by_name(modules) == SAME_NAMES


def test_a_name_that_two_rooms_use_is_found() -> None:
    names = ["trainer.a.card", "trainer.b.card", "trainer.b.page.card", "trainer.b.run"]
    assert rooms_by_name(names) == {"card": {"a", "b", "b.page"}}
