"""Trackers of transformers: when they start, what they are told, and that they end with the run."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils as hf

from trainer import run_job

SECRET = "zebra"


class Recording(TrainerCallback):  # type: ignore[misc]
    """A tracker as transformers has them, which writes down what it is told."""

    logged: ClassVar[list[tuple[int, dict[str, Any]]]]
    begun: ClassVar[list[Any]]
    ended: ClassVar[list[Any]]
    problem: ClassVar[Exception | None] = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.problem is not None:
            raise self.problem
        self.begun.append((args, kwargs["model"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append((state.global_step, logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(threading.current_thread())


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setitem(hf.INTEGRATION_TO_CALLBACK, "recording", Recording)
    names = [*hf.get_available_reporting_integrations(), "recording"]
    monkeypatch.setattr(hf, "get_available_reporting_integrations", lambda: names)
    for name in ("logged", "begun", "ended"):
        monkeypatch.setattr(Recording, name, [], raising=False)
    return Recording


def options(**monitoring: Any) -> dict[str, Any]:
    more = {"report_to": ("recording",), "inference_interval": 2, "micro_eval_interval": 2}
    return {
        "hyperparams": {"max_steps": 4},
        "monitoring": {**more, "preview_prompts": (SECRET,), **monitoring},
        "profile": {"system_prompt": SECRET},
    }


def test_a_tracker_is_told_name_config_and_every_figure_under_its_step(
    job: Callable[..., Any], tracker: type[Recording]
) -> None:
    result = run_job(job(**options(scores=("f1",))), display="off")
    assert result.success, result.error_message
    [(arguments, model)] = tracker.begun
    assert arguments.run_name == "out"
    told = arguments.to_dict()
    assert (told["hyperparams.max_steps"], told["environment.num_threads"]) == (4, 1)
    assert SECRET not in str(told)
    assert model.config.model_type == "qwen3"
    steps: dict[str, list[int]] = {}
    for step, logs in tracker.logged:
        for name in logs:
            steps.setdefault(name, []).append(step)
    assert steps["eval_loss"] == [2, 4]
    assert steps["eval_preview_accuracy"] == [0, 2, 4]
    assert steps["eval_previews/score.f1"] == [0, 2, 4], steps
    lines = (Path(result.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["type"] == "StepDone"]
    of_steps = {row["step"]: row["train_loss"] for row in rows}
    found = {step: logs["loss"] for step, logs in tracker.logged if "loss" in logs}
    assert found == {step: pytest.approx(of_steps[step], rel=1e-5) for step in (1, 2, 4)}
    assert len(tracker.ended) == 1


def test_a_tracker_that_cannot_start_is_one_error_before_the_weights_are_loaded(
    job: Callable[..., Any],
    tracker: type[Recording],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracker, "problem", RuntimeError("no key\nfor this host"))
    config = job(**options())
    result = run_job(config)
    assert result.exit_code == 2
    out, err = capsys.readouterr()
    assert "loading the tokenizer" in out
    assert f"loading {config.model.model_path}" not in out
    assert "names recording, which cannot start (RuntimeError: no key for this host)" in err
    assert "Traceback" not in err
    assert not Path(config.output.output_dir).exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_validation_losses_and_previews_by_their_steps(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    for name in ("first", "second"):
        assert run_job(job(name, **options(report_to=("trackio",))), display="off").success
    found: dict[str, dict[str, list[int]]] = {}
    for path in (tmp_path / "tracked").rglob("*.db"):
        with sqlite3.connect(path) as db:
            for run, step, metrics in db.execute("select run_name, step, metrics from metrics"):
                for key in json.loads(metrics):
                    found.setdefault(run, {}).setdefault(key, []).append(step)
    assert sorted(found) == ["first", "second"]
    for steps in found.values():
        assert steps["eval/loss"] == [2, 4]
        assert steps["eval/preview_accuracy"] == [0, 2, 4]
