"""Runs are compared by the prompts that they have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.preview.base import PreviewResult
from trainer.views.page.compare_page import common_answers
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
