"""Imports run one way, and light commands load no torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trainer"
ORDER = [
    "errors",
    "config",
    "profiles",
    "models",
    "data",
    "preview",
    "monitoring",
    "core",
    "commands",
    "cli",
]
SPECIAL = {
    "server": {"errors", "config", "profiles", "models", "data", "preview", "server"},
    "monitor": {"errors", "config", "monitoring", "monitor"},
    "demo": {"errors", "config", "models", "profiles", "demo"},
}
MONITOR_MODULES = {"trainer.preview.base", "trainer.preview.http", "trainer.preview.remote"}
ONLY_FROM_COMMANDS = {"demo", "server", "monitor", "cli"}


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


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed(part: str) -> set[str]:
    if part in SPECIAL:
        return SPECIAL[part]
    if part == "commands":
        return {*ORDER[:-1], *SPECIAL}
    return set(ORDER[: ORDER.index(part) + 1])


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE] + [
    PACKAGE / "errors.py"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    for module in imported_modules(path):
        target = module.split(".")[1]
        if part == "monitor" and module in MONITOR_MODULES:
            continue
        assert target in allowed(part), f"{path.name} of {part} imports {module}"


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
        "import trainer.monitor.live.server, trainer.commands.monitor",
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
