"""The worked profile of docs/profiles.md, taken from the page, installed and trained with."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "profiles.md"


def block(language: str) -> str:
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return str(text)


def install(site: Path) -> None:
    """What pip would write: the module, and a dist-info with the entry points of the page."""
    project = tomllib.loads(block("toml"))["project"]
    (site / f"{project['name']}.py").write_text(block("python"))
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    [(group, points)] = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_the_worked_profile_fits_in_thirty_lines() -> None:
    assert len(block("python").splitlines()) <= 30


@pytest.mark.slow
def test_the_worked_profile_trains_as_an_installed_entry_point(
    cli: Callable[..., Any], model_folder: Path, qa_file: Path, tmp_path: Path
) -> None:
    import trainer

    site = tmp_path / "site"
    site.mkdir()
    install(site)
    out = tmp_path / "out"
    words = ["train", "--model", model_folder, "--dataset", qa_file, "--profile", "capitals"]
    words += ["--output", out, "--hyperparams.max_steps", "2", "--hyperparams.batch_size", "2"]
    words += ["--monitoring.preview_max_tokens", "8", "--profile.options", "mark=STOP"]
    paths = f"{Path(trainer.__file__).parents[1]}:{site}"
    done = cli(*words, env={"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    card = json.loads((out / "run.json").read_text())["data_card"]
    assert card["profile"] == "capitals"
    assert card["profile_report"] == {"answers in capitals": 40}
    answer = "".join(text for text, is_trained in card["sample"] if is_trained)
    assert answer.startswith(tuple("0123456789"))
    assert "PLUS" in answer
    assert "STOP" in answer
