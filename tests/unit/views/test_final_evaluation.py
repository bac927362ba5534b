"""The final evaluation: its score, by kind of prompt, and the wrong rows, on page and report."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.preview.base import PreviewResult, to_json_line
from trainer.views.headline import headline_of
from trainer.views.report import render_report

MakeRun = Callable[..., Any]


def end_with_evaluation(run: Any, answers: list[tuple[str, str, str]], **counts: int) -> None:
    """End a run that answered (prompt, golden, generated)."""
    results = [
        PreviewResult(
            step=9,
            prompt=prompt,
            golden_answer=golden,
            text=said,
            matches=golden == said,
            prompt_id=f"validation-{nth}",
        )
        for nth, (prompt, golden, said) in enumerate(answers)
    ]
    lines = [json.dumps(to_json_line(result)) + "\n" for result in results]
    (run.folder / "final_evaluation.jsonl").write_text("".join(lines))
    matched = sum(result.matches is True for result in results)
    found = {"exact_match": 0.0, "matched": matched, "num_prompts": len(results), **counts}
    run.end("completed", 9, summary={"final_evaluation": found})


def symbolic(wrong: str) -> list[tuple[str, str, str]]:
    rows = [(f"{word} of {n} and 2?", str(n), str(n)) for word in ("max", "min") for n in range(4)]
    return [(prompt, golden, "17" if prompt == wrong else said) for prompt, golden, said in rows]


def test_score_and_kinds_of_prompts_are_named(made_up_run: MakeRun) -> None:
    run = made_up_run()
    end_with_evaluation(run, symbolic("min of 3 and 2?"))
    final = run.read().final_evaluation
    assert final.score_words == "87.5 % (7/8)"
    assert final.by_word_words == "max 100 % (4/4), min 75 % (3/4)"
    assert [one.prompt for one in final.wrong] == ["min of 3 and 2?"]
    found = headline_of(run.reader.previews, [], final)
    assert found.rest == "Final evaluation: 87.5 % (7/8) right."


def test_the_report_has_the_wrong_rows(made_up_run: MakeRun) -> None:
    run = made_up_run()
    end_with_evaluation(run, symbolic("min of 3 and 2?"))
    text = html.unescape(re.sub(r"<[^>]+>", "", render_report(run.read())))
    assert "87.5 % (7/8) of the held-out prompts" in text
    assert "min 75 % (3/4)" in text
    assert "min of 3 and 2?" in text
    assert "max of 3 and 2?" not in text


def test_prompts_of_no_kind_are_not_grouped(made_up_run: MakeRun) -> None:
    run = made_up_run()
    rows = [("what is it?", "a", "a"), ("who are you?", "b", "c"), ("why not?", "d", "d")]
    end_with_evaluation(run, rows)
    assert run.read().final_evaluation.by_word == ()


def test_a_damaged_or_missing_file_of_answers_leaves_the_score(made_up_run: MakeRun) -> None:
    run = made_up_run()
    end_with_evaluation(run, symbolic(""), matched=5, num_prompts=8)
    path: Path = run.folder / "final_evaluation.jsonl"
    path.write_text('{"step": 1}\nnot json\n[]\n')
    assert run.read().final_evaluation.score_words == "62.5 % (5/8)"
    assert run.reader.final_evaluation.wrong == ()
    path.unlink()
    again = type(run.reader)(run.folder)
    again.poll()
    assert again.final_evaluation.score_words == "62.5 % (5/8)"


def test_a_run_that_goes_on_has_none(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.step(3)
    assert run.read().final_evaluation is None
