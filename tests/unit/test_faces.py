"""The public faces of the rooms: every name that one lists can be had, and is listed for types."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACES = ["", ".config", ".core", ".data", ".models", ".monitoring", ".preview", ".profiles"]
LAZY = [face for face in FACES if face not in (".config", ".profiles")]


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_can_be_had(face: str) -> None:
    module = importlib.import_module(f"trainer{face}")
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("face", LAZY)
def test_type_checkers_are_told_the_names_and_homes_that_a_lazy_face_loads(face: str) -> None:
    module = importlib.import_module(f"trainer{face}")
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(told) == set(module.__all__) - {"__version__"}
    for name, home in told.items():
        assert getattr(importlib.import_module(str(home)), name) is getattr(module, name)


def test_the_names_for_scripts_are_documented() -> None:
    text = (ROOT / "docs" / "engine.md").read_text()
    for face in (".data", ".models", ".preview"):
        for name in importlib.import_module(f"trainer{face}").__all__:
            assert f"`{name}" in text, f"trainer{face}.{name}"
