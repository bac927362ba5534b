"""The documents name files, commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer import __version__
from trainer.cli import COMMANDS
from trainer.config.flags import build_parser, config_fields

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KNOWN_FLAGS = {
    word for action in build_parser("trainer train")._actions for word in action.option_strings
}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = re.findall(r"`((?:tests|benchmarks|examples|trainer|core)/[\w/.-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_commands_and_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = set(re.findall(r"`?trainer ([a-z]+) (?=[-\w./])", text)) - {"elsewhere"}
    assert commands & set(COMMANDS) or path.name != "README.md"
    dotted = set(re.findall(r"--([a-z_]+\.[a-z_0-9]+)", text))
    assert dotted - set(config_fields()) == set()


def test_the_readme_begins_with_what_a_stranger_needs() -> None:
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:32])
    for word in ("make demo", "make test", "pip install -e", "trainer train", "run_job"):
        assert word in head


def test_flags_in_the_readmes_table_of_commands_are_known() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if "trainer train" in line:
            assert set(re.findall(r"--[a-z][a-z-]*(?=[ `]|$)", line)) <= KNOWN_FLAGS, line


def test_the_changelog_has_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
