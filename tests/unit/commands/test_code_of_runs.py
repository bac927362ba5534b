"""Code that the folder of somebody else's run names does not run unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.config import TrainerConfig
from trainer.core.finished import open_run
from trainer.errors import ConfigError
from trainer.monitoring.resuming import resume_command

CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Profile: pass\n"
PROFILE = {"profile": {"name": "theirs:Profile"}}
TRUST = {"model": {"trust_remote_code": True}}


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """A function that makes the folder of a run, which lies in the working folder with its code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = CODE.format(marker=str(tmp_path / "marker"))
    (tmp_path / "theirs.py").write_text(code)

    def make(config: dict[str, Any]) -> Path:
        model = tmp_path / "out" / "final_model"
        model.mkdir(parents=True)
        values = TrainerConfig.model_validate(config).model_dump(mode="json")
        record = {"config": values, "system_prompt": None, "state": "completed"}
        (model.parent / "run.json").write_text(json.dumps(record))
        (model.parent / "config.resolved.json").write_text(json.dumps(config))
        classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        (model / "config.json").write_text(
            json.dumps({"model_type": "theirs", "auto_map": classes})
        )
        (model / "code.py").write_text(code)
        return model.parent

    return make


@pytest.mark.parametrize("config", [PROFILE, TRUST], ids=["profile", "model code"])
@pytest.mark.parametrize("command", ["chat", "export", "train --resume --output"])
def test_the_code_of_a_run_runs_only_where_somebody_says_so(
    command: str,
    config: dict[str, Any],
    foreign: Callable[[Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = foreign({**config, "data": {"dataset_path": "rows.jsonl"}})
    code = main([*command.split(), str(run)])
    assert not (tmp_path / "marker").exists()
    error = capsys.readouterr().err
    if command == "export":  # files are copied
        assert code == 0, error
    else:
        assert code == 2, error
        assert "theirs:Profile" if config is PROFILE else "trust_remote_code" in error
        assert "--allow-code" in error


def test_a_run_is_opened_without_its_profile(
    foreign: Callable[[Any], Path], tmp_path: Path
) -> None:
    run = foreign(PROFILE)
    found = open_run(run)
    with pytest.raises(ConfigError, match=r"theirs:Profile.*--allow-code"):
        found.profile()
    assert not (tmp_path / "marker").exists()


def test_the_command_that_goes_on_allows_the_code_that_it_needs() -> None:
    assert resume_command("out", {}) == "trainer train --resume --output out"
    for config in (PROFILE, TRUST, {"monitoring": {"scores": ["mine:score"]}}):
        assert resume_command("out", config) == "trainer train --resume --allow-code --output out"
    for broken in (None, [], {"model": 1, "profile": {"name": 3}, "monitoring": "x"}):
        assert "--allow-code" not in resume_command("out", broken)
