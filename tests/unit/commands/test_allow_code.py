"""Functions that the config of a run names are run only where somebody says so."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from trainer.commands.train import load_config
from trainer.config.flags import parse_flags
from trainer.errors import ConfigError
from trainer.views.run_reader import RunReader

CODE = "my_scores:good"


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose config names code, and a working folder without a config."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    scores = {"monitoring": {"scores": ["number", CODE]}}
    (folder / "config.resolved.json").write_text(json.dumps(scores))
    (folder / "mine.json").write_text(json.dumps(scores))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("--resume", "--output", "out"),
        ("--config", "out/config.resolved.json"),
        ("--config", "out/mine.json"),
    ],
)
def test_a_run_does_not_bring_its_code_along(run_folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{CODE}.*--allow-code"):
        load_config(parse_flags(words))
    allowed = load_config(parse_flags([*words, "--allow-code"]))
    assert allowed.config.monitoring.scores == ("number", CODE)
    own = load_config(parse_flags([*words, "--monitoring.scores", CODE]))
    assert own.config.monitoring.scores == (CODE,)


def test_ones_own_config_needs_nothing(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_folder.parent / "mine.json"
    own.write_text((run_folder / "mine.json").read_text())
    for words in (("--config", str(own)), ("--resume", "--output", "out", "--config", str(own))):
        assert load_config(parse_flags(words)).config.monitoring.scores == ("number", CODE)
    monkeypatch.setenv("TRAINER_MONITORING__SCORES", json.dumps([CODE]))
    assert load_config(parse_flags(["--resume", "--output", "out"])).config.monitoring.scores


def test_standard_scores_are_no_code(run_folder: Path) -> None:
    config = {"monitoring": {"scores": ["number", "regex:a:b", "json_schema:x.json"]}}
    (run_folder / "config.resolved.json").write_text(json.dumps(config))
    loaded = load_config(parse_flags(["--resume", "--output", "out"]))
    assert len(loaded.config.monitoring.scores) == 3


@pytest.mark.parametrize("scores", [["number"], ["number", CODE], [f"mine={CODE}"]])
def test_the_command_that_a_run_says_is_taken(run_folder: Path, scores: list[str]) -> None:
    config = {"monitoring": {"scores": scores}}
    (run_folder / "config.resolved.json").write_text(json.dumps(config))
    (run_folder / "run.json").write_text(json.dumps({"config": config}))
    status = {"schema_version": 1, "state": "failed", "phase": "failed", "step": 5, "pid": 1}
    error = {"type": "MemoryFullError", "message": "no memory"}
    times = {"started_at": 1.7e9, "updated_at": 1.7e9}
    (run_folder / "status.json").write_text(json.dumps({**status, **times, "error": error}))
    (run_folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    reader = RunReader(run_folder)
    reader.poll()
    said = reader.going_on()
    words = shlex.split(said.partition("continue with: ")[2])
    assert words[:2] == ["trainer", "train"], said
    assert list(load_config(parse_flags(words[2:])).config.monitoring.scores) == scores
    assert ("--allow-code" in words) == (scores != ["number"])
