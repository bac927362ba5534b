"""What commands print: whole lines, YAML too, and nothing that is false here."""

from __future__ import annotations

import logging
import logging.handlers
import queue
from pathlib import Path

import pytest
import yaml

from trainer.child import quiet_libraries
from trainer.cli import main
from trainer.config import ConfigLoader
from trainer.config.flags import config_fields, parse_flags
from trainer.models import ALIASES


def test_off_a_terminal_each_row_of_a_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain"]) == 0
    out = capsys.readouterr().out
    for key in config_fields():
        assert any(key in line.split() for line in out.splitlines()), key
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for alias in ALIASES.values():
        assert any(alias.path in line and alias.note in line for line in out.splitlines())


def test_families_beyond_qwen_have_aliases() -> None:
    for family in ("llama", "gemma", "mistral", "phi", "smollm"):
        assert any(name.startswith(family) for name in ALIASES), family


def test_config_init_writes_yaml_that_is_the_same_as_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "init"]) == 0
    assert main(["config", "init", "--yaml"]) == 0
    assert "trainer train --config config.yaml" in capsys.readouterr().out
    assert yaml.safe_load(Path("config.yaml").read_text())
    assert (
        ConfigLoader.load(Path("config.yaml")).config
        == ConfigLoader.load(Path("config.json")).config
    )
    assert main(["config", "init", "mine.yml"]) == 0
    assert main(["config", "init", "--yaml", "mine.json"]) == 2
    assert main(["config", "init", "--toml"]) == 2


def test_display_is_a_flag_of_train_too() -> None:
    assert parse_flags(["--display", "plain"]).values == {"monitoring.display": "plain"}


def test_words_of_libraries_that_are_false_here_are_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_back = quiet_libraries()
    log, told = logging.getLogger("transformers.tokenization_utils_base"), queue.SimpleQueue()
    monkeypatch.setattr(log, "isEnabledFor", lambda level: True)  # whatever the verbosity is
    handler = logging.handlers.QueueHandler(told)
    log.addHandler(handler)
    log.warning("Running this sequence through the model will result in indexing errors")
    log.warning("something true")
    log.removeHandler(handler)
    put_back()
    assert told.get_nowait().message == "something true"
    assert told.empty()
    assert log.filters == []
