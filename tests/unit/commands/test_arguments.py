"""Numbers on the command line: one rule for every command, one line for every mistake."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trainer.commands.arguments
from trainer.cli import main

COMMANDS = Path(trainer.commands.arguments.__file__).parent

COUNT = (
    "0",
    "-1",
    "1.5",
    "x",
    "",
    " 3 ",
    "\uff11",
    "\u00b2",
    "1_000",
    "+3",
    "0x10",
    "nan",
    "9" * 5000,
)
FROM_ZERO = tuple(word for word in COUNT if word != "0")
PORT = (*FROM_ZERO, "70000", "65536")
SEED = (*FROM_ZERO, str(2**32))
NUMBER = ("-1", "x", "", " 3 ", "\uff11", "1_000", "nan", "inf", "1e999", "-0.5")

OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("chat", ".", "--max-new-tokens"): COUNT,
    ("chat", ".", "--seed"): SEED,
    ("chat", ".", "--step"): COUNT,
    ("chat", ".", "--temperature"): NUMBER,
    ("data", "inspect", "x.jsonl", "--rows"): FROM_ZERO,
    ("demo", "--early-stopping"): COUNT,
    ("demo", "--seed"): SEED,
    ("demo", "--steps"): COUNT,
    ("export", ".", "--step"): COUNT,
    ("monitor", ".", "--port"): PORT,
    ("serve", "--keep-weights"): COUNT,
    ("serve", "--port"): PORT,
    ("serve", "--request-timeout"): COUNT,
    ("serve", "--threads"): COUNT,
    ("serve", ".", "--step"): COUNT,
}


@pytest.mark.parametrize(
    ("words", "bad"),
    [(words, bad) for words, values in OPTIONS.items() for bad in values],
    ids=lambda value: ascii(value[:12]) if isinstance(value, str) else " ".join(value),
)
def test_a_bad_number_is_one_line_that_says_what_was_given_and_the_rule(
    words: tuple[str, ...],
    bad: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, bad]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    command = " ".join(word for word in words[:2] if word not in (".", words[-1]))
    assert line.startswith(f"error: trainer {command}: argument {words[-1]}: ")
    shown = repr(bad) if len(bad) < 50 else repr(bad)[:20]
    assert shown in line
    assert " is not a " in line or " is neither " in line
    assert line.endswith(f"; see `trainer {command} --help`.")
    assert len(line) < 250
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["best", "7", "007"])
def test_a_step_is_best_or_a_number(given: str) -> None:
    assert trainer.commands.arguments.step_of_run(given) in ("best", "7")


@pytest.mark.parametrize(("given", "value"), [("0.5", 0.5), ("1e-3", 0.001), (".5", 0.5), ("2", 2)])
def test_a_number_may_be_written_in_every_usual_way(given: str, value: float) -> None:
    assert trainer.commands.arguments.number(0)(given) == value


def test_every_option_with_a_type_is_tested_here_or_is_a_path() -> None:
    """A command that reads numbers by a rule of its own does not go unseen."""
    found = set()
    for path in sorted(COMMANDS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            kinds = [ast.unparse(word.value) for word in node.keywords if word.arg == "type"]
            if node.func.attr == "add_argument" and kinds and kinds != ["Path"]:
                assert kinds[0].split("(")[0] in ("whole_number", "number", "port", "step_of_run")
                found.add((path.stem, ast.literal_eval(node.args[0])))
    weights_flags = {(words[0], "--step") for words in OPTIONS if words[-1] == "--step"}
    assert found - {("arguments", "--step")} | weights_flags == {
        (words[0], words[-1]) for words in OPTIONS
    }
