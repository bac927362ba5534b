"""docs/data.md names every key and speaker that the code knows, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.data.layouts import FORMATS, REFUSED_KEYS, SAME
from trainer.data.turn_flags import FLAG_BEGINNINGS, ROW_FLAGS, TURN_FLAGS
from trainer.data.turns import CONTENT_KEYS, ROLES, TURN_KEYS

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"### {title}\n")[1].split("\n##")[0]


def tables(title: str) -> list[list[list[set[str]]]]:
    """Tables of a section: for each row its cells, each as the set of its `words`."""
    found: list[list[list[set[str]]]] = [[]]
    for line in section(title).splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            found[-1].append([set(re.findall(r"`([^`]+)`", cell)) for cell in cells])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def first_words(table: list[list[set[str]]]) -> set[str]:
    return set().union(*(row[0] for row in table))


def test_the_keys_of_every_format_are_those_that_each_takes() -> None:
    [common] = tables("Keys of every format")
    [own] = tables("Keys of each format")
    assert first_words(common) == ROW_FLAGS | {*SAME, "system", "tools"}
    described: dict[str, set[str]] = {}
    for name, keys, _ in own:
        [format_name] = name
        described.setdefault(format_name, set()).update(keys)
    assert set(described) == set(FORMATS)
    for name, keys in described.items():
        assert keys | first_words(common) == FORMATS[name].takes, name


def test_the_keys_and_speakers_of_turns_are_those_of_the_code() -> None:
    keys, speakers = tables("Keys of turns")
    assert first_words(keys) == TURN_KEYS | TURN_FLAGS
    assert first_words(speakers) == set(ROLES)
    words = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool's result"}
    lines = section("Keys of turns").splitlines()
    for name, role in ROLES.items():
        assert any(re.match(rf"\|.*`{name}`.*\| (the|a) {words[role]}", line) for line in lines), (
            name
        )


def test_the_keys_that_make_a_bad_row_are_those_of_the_code() -> None:
    [table] = tables("Keys that make a bad row")
    lines = [line for line in section("Keys that make a bad row").splitlines() if "`" in line]
    rows = {
        key for line, row in zip(lines, table, strict=True) if "| rows" in line for key in row[0]
    }
    turns = {
        key for line, row in zip(lines, table, strict=True) if "turns |" in line for key in row[0]
    }
    assert rows - {"label", "false", *FLAG_BEGINNINGS} == set(REFUSED_KEYS)
    assert turns - {"final", "function_call", *FLAG_BEGINNINGS} == CONTENT_KEYS
    assert set(FLAG_BEGINNINGS) <= rows & turns


@pytest.mark.parametrize("flag", sorted(TURN_FLAGS))
def test_each_flag_is_explained_where_training_is(flag: str) -> None:
    assert f"`{flag}`" in section("What is trained")
