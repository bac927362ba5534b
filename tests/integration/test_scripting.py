"""run_job from a script: what is shown and written, and what of the user's takes part."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from trainer import run_job

ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {"hyperparams": {"max_steps": 3}, "monitoring": {"inference_interval": 2}}


FEW = "hyperparams={'max_steps': 2}, monitoring={'preview_max_tokens': 4}"


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def test_run_job_shows_what_the_command_shows_and_writes_the_report(
    job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, level = job(**SHORT), logging.getLogger("bitsandbytes").level
    result = run_job(config)
    out, err = capsys.readouterr()
    assert result.success, result.error_message
    for words in ("data card", "step 3/3", "previews at step 2", f"model: {result.model_path}"):
        assert words in out, out
    assert f"report: {config.output.output_dir}/report.html" in out
    assert (result.output_dir / "report.html").is_file()
    assert "Traceback" not in err
    card = (result.model_path / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| steps | 3 of 3 |" in card
    assert logging.getLogger("bitsandbytes").level == level  # nothing outlives the run
    again = run_job(config)
    assert (again.success, again.exit_code) == (False, 2)
    assert "error: " in capsys.readouterr().err


def test_run_job_is_silent_where_it_is_told_so_and_refuses_other_words(
    job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(job(**SHORT), display="off").success
    assert capsys.readouterr().out == ""
    refused = run_job(job("other", **SHORT), display="loud")  # type: ignore[arg-type]
    assert refused.exit_code == 2
    assert "display='loud' is not one of auto, rich" in str(refused.error_message)


class Losses:
    """An observer with one method, as the docs say."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def on_event(self, event: Any) -> None:
        self.kinds.append(type(event).__name__)
        if type(event).__name__ == "StepDone" and event.step == 2:
            raise ValueError("mine")


def test_a_view_of_ones_own_has_the_screen_to_itself(
    job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class View:
        def on_event(self, event: Any) -> None:
            if type(event).__name__ in ("RunStarted", "RunEnded"):
                print(f"mine: {type(event).__name__}")

    config = job(**SHORT)
    assert run_job(config, display=View()).success
    out, err = capsys.readouterr()
    assert out == "mine: RunStarted\nmine: RunEnded\n"
    assert err == ""
    assert not run_job(config, display=View()).success  # the folder is taken
    out, err = capsys.readouterr()
    assert out == "mine: RunEnded\n"
    assert err.startswith("error: ")


class Stop(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True


def test_an_observer_needs_one_method_and_a_callback_can_stop_the_run(
    job: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    losses = Losses()
    result = run_job(job(**SHORT), display=losses, observers=[losses], callbacks=[Stop()])
    assert (result.success, result.global_step) == (True, 2), result.error_message
    assert result.summary["ended_by"] == "callback"
    assert result.summary["stop_reason"] == "a callback asked to stop after step 2"
    assert losses.kinds[-1] == "RunEnded"
    assert losses.kinds.count("StepDone") == 4
    failures = [record.message for record in caplog.records if "Losses" in record.message]
    [failure] = failures
    assert failure.startswith("Losses failed on StepDone (mine); training goes on")
    kept = [path.name for path in (result.output_dir / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


def test_a_callback_that_raises_ends_the_run_and_what_is_none_is_refused(
    job: Callable[..., Any],
) -> None:
    class Broken(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("mine")

    result = run_job(job(**SHORT), display="off", callbacks=[Broken()])
    assert (result.exit_code, result.error_message) == (1, "ValueError: mine")
    refused = run_job(job("other", **SHORT), display="off", callbacks=[Losses()])  # type: ignore[list-item]
    assert refused.exit_code == 2
    assert "no instance of transformers.TrainerCallback" in str(refused.error_message)


@pytest.mark.slow
@pytest.mark.parametrize("display", ["off", "quiet"])
def test_a_failure_prints_nothing_where_display_is_off(
    qa_file: Path, tmp_path: Path, display: str
) -> None:
    code = f"""
from transformers import TrainerCallback
from trainer import create_default_config, run_job

class Broken(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise ValueError("mine")

config = create_default_config(
    model_path="tiny", dataset_path={str(qa_file)!r}, output_dir={str(tmp_path / "out")!r}, {FEW})
raise SystemExit(run_job(config, display={display!r}, callbacks=[Broken()]).exit_code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 1
    is_off = display == "off"
    assert (done.stdout == "") == is_off
    # What libraries print while the script itself imports them is not ours.
    assert ("ValueError: mine" in done.stderr) != is_off, done.stderr
    assert ("Traceback" in done.stderr) != is_off


@pytest.mark.slow
def test_every_snippet_of_scripting_md_and_of_the_readme_runs(
    qa_file: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [readme] = snippets("README.md")
    rows = qa_file.read_text(encoding="utf-8")
    for number, code in enumerate([readme, *snippets("docs/scripting.md")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "data.jsonl").write_text(rows, encoding="utf-8")
        code = code.replace('model_path="qwen3"', f"model_path={str(model_folder)!r}, {FEW}")
        code = code.replace('model_path="tiny"', f"model_path={str(model_folder)!r}")
        monkeypatch.chdir(folder)
        exec(compile(code, f"snippet {number}", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out, code
        assert json.loads((folder / "outputs" / "run.json").read_text())["state"] == "completed"
