"""One thing is told in the singular, wherever a count may be 1."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from trainer.counts import counted
from trainer.monitoring.events import RunStarted
from trainer.views.words import start_words

ROOT = Path(__file__).parents[2]

NOUNS = (
    "rows|steps|prompts|tokens|entries|lines|characters|alerts|samples|values|notices|answers|"
    "previews|evaluations|checkpoints|files|batches|packs|sequences|questions|turns|texts"
)
AFTER = re.compile(rf" (?!of |on |in |by |per )(?:[a-z-]+ )?(?:{NOUNS})\b(?!/s)")

NEVER_ONE = {
    # (file, what is counted): why it is never 1
    ("views/verdicts.py", "len(losses)"): "one loss has words of its own",
    ("views/page/list_page.py", "len(LETTERS)"): "a constant",
    ("views/words.py", "1 + len(result.samples)"): "there are further samples",
}


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12345, "12,345 rows")]
)
def test_a_count_has_the_right_form_of_its_noun(count: int, words: str) -> None:
    assert counted(count, "row") == words


def test_a_noun_may_have_another_plural_and_a_verb_may_follow() -> None:
    assert [counted(n, "older entry", "older entries") for n in (1, 2)] == [
        "1 older entry",
        "2 older entries",
    ]
    assert [counted(n, "row repeats", "rows repeat") for n in (1, 2)] == [
        "1 row repeats",
        "2 rows repeat",
    ]


def test_the_start_of_a_run_of_one_row_a_step() -> None:
    ones = {"total_steps": 1, "num_train_rows": 1, "effective_batch_size": 1, "num_epochs": 1.0}
    event = RunStarted(
        **ones,
        model_name="tiny",
        start_step=0,
        num_validation_rows=0,
        context_window=64,
        output_dir="out",
    )
    assert "1 step of 1 row, 1 row and 0 held out" in start_words(event)


def plural_whatever_the_count(path: Path) -> list[str]:
    """Values in f-strings right before a noun in the plural, but for constants."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not (isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)):
                continue
            said = ast.unparse(value.value)
            is_constant = said.isupper() or said.rpartition(".")[2].isupper()
            is_counted = said.startswith("counted(")
            if AFTER.match(str(after.value)) and not (is_constant or is_counted):
                found.append(said)
    return found


@pytest.mark.parametrize("room", ["views", "monitoring", "commands", "scores"])
def test_what_people_read_takes_its_plurals_from_one_place(room: str) -> None:
    package = ROOT / "trainer"
    wrong = [
        f"{path.relative_to(package)}: {said}"
        for path in sorted((package / room).rglob("*.py"))
        for said in plural_whatever_the_count(path)
        if (str(path.relative_to(package)), said) not in NEVER_ONE
    ]
    assert wrong == []
