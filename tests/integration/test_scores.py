"""Runs with scores: bad ones change nothing, and figures are where people look for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.monitoring import TrainingStatusReader
from trainer.views.report import render_report
from trainer.views.run_reader import RunReader

ROOT = Path(__file__).parents[2]
BAD = ("raises", "hangs", "exits", "forks_and_stays", "prints")


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of the unit tests can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "unit" / "scores"))


def scores_of(folder: Path) -> list[dict[str, Any]]:
    metrics = TrainingStatusReader(folder).metrics()
    return [line for line in metrics if line["type"] == "ScoresDone"]


@pytest.mark.slow
def test_bad_scores_leave_training_bit_identical(
    train: Callable[..., Any], assert_same_weights: Any, tmp_path: Path
) -> None:
    scores = ["exact", *(f"rewards:{name}" for name in BAD), "rewards:is_short"]
    plain = train("plain", monitoring={"inference_interval": 0})
    scored = train("scored", monitoring={"scores": scores, "score_timeout": 1.0})
    assert scored.success, scored.error_message
    assert_same_weights(plain.model_path, scored.model_path)
    lines = scores_of(tmp_path / "scored")
    assert [line["step"] for line in lines] == [0, 5, 10, 12]
    values = {"exact", "forks_and_stays", "prints", "is_short"}
    for line in lines:
        names = {figure["name"] for figure in line["figures"]}
        assert names == {"golden_probability", "golden_logprob", *(f"score.{n}" for n in values)}
    notices = json.loads((tmp_path / "scored" / "status.json").read_text())["notices"]
    told = {name for name in BAD for one in notices if one["text"].startswith(f"score {name}:")}
    assert told == {"raises", "hangs", "exits"}
    log = tmp_path / "scored" / "logs" / "scores.log"
    assert log.stat().st_size <= 2 * 2**20


@pytest.mark.slow
def test_an_evaluation_set_is_answered_at_steps_of_its_own(
    train: Callable[..., Any], assert_same_weights: Any, tmp_path: Path
) -> None:
    asked = {"scores": ["number", "f1"], "num_eval_samples": 2, "num_score_prompts": 5}
    asked |= {"num_preview_samples": 3, "preview_temperature": 0.7}
    final = {"final_eval_prompts": 8, "report_to": ["tensorboard"]}
    often = {"checkpoint_interval": 8}
    plain = train("plain", monitoring={"inference_interval": 0})
    whole = train("out", monitoring={**asked, **final}, output=often)
    assert whole.success, whole.error_message
    assert_same_weights(plain.model_path, whole.model_path)
    folder = tmp_path / "out"
    reader = TrainingStatusReader(folder)
    previews, evaluations = list(reader.previews()), list(reader.evaluations())
    assert sorted({one.step for one in previews}) == [0, 4, 5, 8, 10, 12]
    assert [one.step for one in evaluations] == [s for s in (0, 4, 8, 12) for _ in range(5)]
    assert not {one.prompt_id for one in previews} & {one.prompt_id for one in evaluations}
    assert all(set(one.scores) == {"number", "f1"} for one in [*previews, *evaluations])
    counts = whole.summary["previews"]
    assert (counts["asked"], counts["evaluation"]["asked"]) == (12, 20)
    assert counts["evaluation"]["done"] == 20
    by_source = {line["source"]: line for line in scores_of(folder)}
    figures = {figure["name"]: figure for figure in by_source["evaluation"]["figures"]}
    assert list(figures) == ["golden_probability", "golden_logprob", "score.number", "score.f1"]
    number = figures["score.number"]
    assert (number["step"], number["num_prompts"], number["first"]["step"]) == (12, 5, 0)
    right = [one.scores["number"] for one in evaluations if one.step == 12]
    assert number["mean"] == pytest.approx(sum(map(float, right)) / 5)  # type: ignore[arg-type]
    _figures_are_shown(folder, whole.summary["final_evaluation"])

    resumed = train(
        "out",
        monitoring={**asked, **final},
        output={**often, "resume": str(folder / "checkpoints" / "step-00000008")},
    )
    assert resumed.success, resumed.error_message
    assert_same_weights(plain.model_path, resumed.model_path)
    again = [(one.step, one.prompt_id, one.text) for one in reader.evaluations()]
    assert again == [(one.step, one.prompt_id, one.text) for one in evaluations]
    again_samples = [(one.step, one.text, one.samples) for one in reader.previews()]
    assert again_samples == [(one.step, one.text, one.samples) for one in previews]
    assert {len(one.samples) for one in previews} == {2}
    last = scores_of(folder)[-1]
    assert (last["source"], last["step"]) == ("evaluation", 12)
    assert last["figures"] == by_source["evaluation"]["figures"]


def _figures_are_shown(folder: Path, final: dict[str, Any]) -> None:
    """On page, report, status and TensorBoard."""
    names = [figure["name"] for figure in final["figures"]]
    assert names == ["golden_probability", "golden_logprob", "score.number", "score.f1"]
    assert {figure["num_prompts"] for figure in final["figures"]} == {8}
    status = json.loads((folder / "status.json").read_text())
    assert [one["name"] for one in status["evaluation_scores"]] == names
    passes = [f"{verdict}.pass@{k}" for verdict in ("match", "score.number") for k in (1, 2, 3)]
    assert [one["name"] for one in status["preview_scores"]] == [*names, *passes]
    reader = RunReader(folder)
    reader.poll()
    page = render_report(reader)
    for words in (
        "golden token probability",
        "number, evaluation prompts",
        "f1, final evaluation",
        "number pass@3",
        "further samples (2)",
    ):
        assert words in page
    assert re.search(r"number, evaluation prompts</th><td>[\d.]+ -&gt; [\d.]+ % at step 12", page)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    curve = events.Scalars("previews/golden_probability")
    assert [point.step for point in curve] == [0, 4, 5, 8, 10, 12]
    assert curve[-1].value > curve[0].value
    assert len(events.Scalars("previews/match.pass@3")) == 6
    assert [point.step for point in events.Scalars("evaluation/score.number")] == [0, 4, 8, 12]
