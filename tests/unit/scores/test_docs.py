"""The worked score of docs/scores.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trainer.scores.functions import ScoreFunction
from trainer.scores.standard import PLAIN, WITH_ARGUMENT

TEXT = (Path(__file__).parents[3] / "docs" / "scores.md").read_text(encoding="utf-8")


def test_the_worked_score_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "my_scores.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    def score(completion: str, answer: Any) -> float | None:
        given = {"completion": completion, "golden_answer": "", "prompt": "", "messages": []}
        function = ScoreFunction("my_scores:close_enough", {})
        [found] = function.score([{**given, "row": {"answer": answer}}], 0)
        return found

    assert score("200 km", "200") == 1
    assert score("202 km", 200) == pytest.approx(0.9)
    assert [score("no idea", "200"), score("9", "200"), score("1", 0)] == [0, 0, None]


def test_every_standard_score_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)(?::[A-Z]+)?` \| ", TEXT, flags=re.MULTILINE)
    assert rows == [
        "exact",
        "contains",
        "f1",
        "rouge_l",
        "number",
        "json",
        "json_schema",
        "regex",
        "tool_calls",
    ]
    assert set(rows) == {*PLAIN, *WITH_ARGUMENT}
