"""Runs are compared by the prompts that they have in common."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.monitoring.events import RunEnded
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewResult
from trainer.scores.statistics import difference_of
from trainer.views.comparing import common_answers
from trainer.views.run_reader import RunReader


def run_of(folder: Path, prompts: dict[str, str], files: dict[str, str] | None) -> RunReader:
    """A run with one answer to each prompt, given by its id."""
    folder.mkdir()
    lines = [PreviewResult(step=1, prompt_id=key, prompt=p, text="4") for key, p in prompts.items()]
    (folder / "previews.jsonl").write_text("".join(f"{x.model_dump_json()}\n" for x in lines))
    (folder / "run.json").write_text(json.dumps({"data_files_sha256": files} if files else {}))
    reader = RunReader(folder)
    reader.poll()
    return reader


PLAIN = {"validation-3": "1+1?", "validation-5": "2+2?", "user-0": "Who are you?"}
FILES = {"rows.jsonl": "aa", "more.jsonl": "bb"}


@pytest.mark.parametrize(
    ("prompts", "files", "common"),
    [
        # A profile adds an instruction; the same file lies elsewhere.
        (
            {"validation-3": "Think. 1+1?", "validation-9": "Think. 3+3?", "user-0": "Why?"},
            {"x/rows.jsonl": "aa", "x/more.jsonl": "bb"},
            [("1+1?", "Think. 1+1?")],
        ),
        ({"user-0": "Who are you?", "user-1": "1+1?"}, FILES, [("Who are you?", "Who are you?")]),
        # Row 3 of other files, or of these in another order, is another row.
        ({"validation-3": "5+5?", "validation-4": "2+2?"}, {"a": "cc"}, [("2+2?", "2+2?")]),
        ({"validation-3": "5+5?"}, {"more.jsonl": "bb", "rows.jsonl": "aa"}, []),
        ({"validation-3": "5+5?", "validation-4": "2+2?"}, None, [("2+2?", "2+2?")]),
    ],
)
def test_prompts_of_one_row_are_common_whatever_a_profile_makes_of_them(
    prompts: dict[str, str], files: Any, common: list[tuple[str, str]], tmp_path: Path
) -> None:
    readers = [run_of(tmp_path / "a", PLAIN, FILES), run_of(tmp_path / "b", prompts, files)]
    found = [tuple(one.prompt for one in answers) for answers in common_answers(readers)]
    assert found == common


def scored_run(folder: Path, *, rate: float, right: int) -> Path:
    """A run whose final evaluation has so many right answers of 20, and one to a row of its own."""
    folder.mkdir()
    answers = [
        PreviewResult(
            step=7,
            prompt_id=f"validation-{number}",
            prompt=f"what is {number}?",
            golden_answer="4",
            text="4",
            matches=number < right,
            golden_probability=0.1 + 0.02 * right + 0.001 * number,
        )
        for number in [*range(20), 100 + right]
    ]
    (folder / "final_evaluation.jsonl").write_text(
        "".join(f"{one.model_dump_json()}\n" for one in answers)
    )
    manifest = {
        "config": {"hyperparams": {"learning_rate": rate, "batch_size": 8}},
        "data_files_sha256": {"rows.jsonl": "aa"},
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    writer = TrainingStatusWriter(None, run_dir=folder)
    score = {"matched": right, "num_prompts": 21, "figures": []}
    writer.on_event(RunEnded(state="completed", step=7, summary={"final_evaluation": score}))
    writer.close()
    return folder


def test_runs_are_compared_prompt_by_prompt_with_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        str(scored_run(tmp_path / name, rate=rate, right=right))
        for name, rate, right in [("a", 1e-3, 4), ("b", 2e-3, 14)]
    ]
    assert main(["compare", *runs]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "hyperparams.learning_rate 0.001 0.002" in text
    assert "batch_size" not in text
    assert "20 of final evaluation match B 20.0 % 70.0 % +50.0 %" in text
    assert "clearly above A" in text
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [match, golden] = found["scores"]
    interval, is_clear = difference_of([1.0] * 14 + [0.0] * 6, [1.0] * 4 + [0.0] * 16)
    assert interval == pytest.approx((match["low"], match["high"]))
    assert (match["num_prompts"], match["is_clear"]) == (20, is_clear)
    assert golden["difference"] == pytest.approx(0.2)
    assert found["config"] == {"hyperparams.learning_rate": {"A": 0.001, "B": 0.002}}
    assert main(["compare", *runs, "--csv"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["score"] for line in lines] == ["match", "golden_probability"]
    assert float(lines[0]["difference"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("names", "words"), [(["a"], "got 1 run"), (["a", "a"], "given twice"), (["a", "no"], "no")]
)
def test_what_cannot_be_compared_is_one_error(
    names: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_run(tmp_path / "a", rate=1e-3, right=4)
    assert main(["compare", *(str(tmp_path / name) for name in names)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
