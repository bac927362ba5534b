"""Drift from the weights before training: whoever answers, after a resume, and without a trace."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import Server, running_server
from trainer.views.facts import DRIFT_KL, alerts_of
from trainer.views.report import charts_of, render_report
from trainer.views.run_reader import RunReader

pytestmark = pytest.mark.slow
CHART = "drift from the answers before training"


@pytest.fixture
def canaries(write_rows: Callable[..., Path]) -> dict[str, Any]:
    rows = ['"what is two plus two?"', {"prompt": "who?"}, {"question": "the quick brown fox?"}]
    return {"canary_set": str(write_rows(rows, "canaries.jsonl")), "inference_interval": 5}


@pytest.fixture
def server(model_folder: Path) -> Iterator[Server]:
    with running_server("--model", str(model_folder)) as found:
        yield found


def drifts(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("type") == "DriftMeasured"]


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("full", "sidecar"),
        pytest.param("lora", "remote_3090", marks=pytest.mark.long),
        pytest.param("lora", "sidecar", marks=pytest.mark.long),
        pytest.param("full", "remote_3090", marks=pytest.mark.long),
    ],
)
def test_sidecar_and_server_measure_what_the_training_process_measures(
    train: Callable[..., Any],
    assert_same_weights: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    canaries: dict[str, Any],
    patient: None,
    mode: str,
    backend: str,
) -> None:
    hyper = {"training_mode": mode}
    plain = train("plain", hyperparams=hyper, monitoring={"inference_interval": 0})
    more: dict[str, Any] = {}
    if backend == "remote_3090":
        port = request.getfixturevalue("server").port
        more = {"remote_3090_host": "127.0.0.1", "remote_3090_port": port}
    local: list[dict[str, Any]] = []
    for name, options in (("local", {}), (backend, more)):
        asked = {**canaries, **options, "preview_backend": name}
        result = train(name, hyperparams=hyper, monitoring=asked)
        assert result.success, result.error_message
        assert_same_weights(plain.model_path, result.model_path)
        found = drifts(tmp_path / name)
        assert [one["step"] for one in found] == [0, 5, 10, 12]
        assert (found[0]["kl"], found[0]["num_changed"]) == (0.0, 0)
        assert all(one["kl"] > 1e-3 for one in found[1:])
        local = local or found
        for one, other in zip(found, local, strict=True):
            assert one["kl"] == pytest.approx(other["kl"], abs=1e-4)
            assert one["num_changed"] == other["num_changed"]
        status = json.loads((tmp_path / name / "status.json").read_text())
        assert status["drift"]["kl"] == found[-1]["kl"]
        summary = result.summary["previews"]["drift"]
        assert (summary["step"], summary["kl"]) == (12, found[-1]["kl"])
        assert summary["s_per_preview_step"] > 0
        assert summary["num_prompts"] == 3
        reader = RunReader(tmp_path / name)
        reader.poll()
        assert [chart.title for chart in charts_of(reader)].count(CHART) == 1
        assert CHART in render_report(reader)


def test_a_resumed_run_measures_against_the_same_answers(
    train: Callable[..., Any], job: Callable[..., Any], tmp_path: Path, canaries: dict[str, Any]
) -> None:
    whole = train("whole", monitoring=canaries)
    output = {"checkpoint_interval": 5, "keep_checkpoints": 9}
    train("out", monitoring=canaries, output=output)
    base = (tmp_path / "out" / "drift_base.json").read_bytes()
    again = {**output, "resume": str(tmp_path / "out" / "checkpoints" / "step-00000005")}
    result = train("out", monitoring=canaries, output=again)
    assert result.success, result.error_message
    assert (tmp_path / "out" / "drift_base.json").read_bytes() == base
    reader = RunReader(tmp_path / "out")
    reader.poll()
    found = [(one.step, one.kl) for one in reader.metrics.drifts]
    assert found == [(one["step"], one["kl"]) for one in drifts(tmp_path / "whole")]
    assert whole.success
    # Answers of the weights before training cannot be had later: that is said, and nothing is made
    # up.
    (tmp_path / "out" / "drift_base.json").unlink()
    result = train("out", monitoring=canaries, output=again)
    assert result.success
    notices = json.loads((tmp_path / "out" / "status.json").read_text())["notices"]
    assert any("only step 0 could give them" in one["text"] for one in notices)
    assert not (tmp_path / "out" / "drift_base.json").exists()


def test_what_fails_is_said_once_and_costs_the_figure_only(
    train: Callable[..., Any],
    assert_same_weights: Any,
    tmp_path: Path,
    canaries: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = train("plain", monitoring={"inference_interval": 0})

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("trainer.preview.measure_drift.drift_from", fail)
    result = train("out", monitoring=canaries)
    assert_same_weights(plain.model_path, result.model_path)
    assert [one["step"] for one in drifts(tmp_path / "out")] == [0]
    notices = json.loads((tmp_path / "out" / "status.json").read_text())["notices"]
    assert ["no such kernel" in one["text"] for one in notices].count(True) == 1
    assert result.summary["previews"]["failed"] == 0


EMOJI = ["😀", "🚀", "🌞", "🎉", "🐱", "🍕"]


def test_emoji_only_answers_raise_drift_and_the_alert_and_a_rate_of_1e_9_does_not(
    train: Callable[..., Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The base is no random one: it was taught what the canaries ask."""
    taught = [{"question": f"what is {n}?", "answer": f"it is {n}."} for n in range(10, 90)]
    learn = {"max_steps": 90, "learning_rate": 1e-2, "batch_size": 8}
    base = train(
        "base",
        dataset_path=str(write_rows(taught, "taught.jsonl")),
        hyperparams=learn,
        monitoring={"inference_interval": 0},
    )
    assert base.train_loss < 1
    draw = random.Random(0)
    emoji = [
        {"question": f"say something about {n}", "answer": "".join(draw.choices(EMOJI, k=3))}
        for n in range(80)
    ]
    canaries = write_rows(taught[::8], "canaries.jsonl")
    asked = {"canary_set": str(canaries), "inference_interval": 20}

    def tune(name: str, **hyper: Any) -> tuple[list[dict[str, Any]], list[str]]:
        result = train(
            name,
            model_path=str(base.model_path),
            dataset_path=str(write_rows(emoji, "emoji.jsonl")),
            hyperparams={"max_steps": 20, "batch_size": 8, **hyper},
            monitoring=asked,
        )
        assert result.success, result.error_message
        reader = RunReader(tmp_path / name)
        reader.poll()
        return drifts(tmp_path / name), [one.text for one in alerts_of(reader)]

    found, alerts = tune("emoji")
    assert found[-1]["kl"] > 2 * DRIFT_KL
    assert found[-1]["num_changed"] == found[-1]["num_prompts"] == 10
    assert any(text.startswith("drift of ") for text in alerts)
    found, alerts = tune("still", learning_rate=1e-9)
    assert found[-1]["kl"] < 1e-4
    assert found[-1]["num_changed"] == 0
    assert not any("drift" in text for text in alerts)
