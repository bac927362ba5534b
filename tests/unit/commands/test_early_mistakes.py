"""Mistakes that names and files tell are told before any library is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

USUAL = {"--model": "tiny", "--dataset": "rows.jsonl"}

MISTAKES = {
    "dataset": (["--dataset", "absent.jsonl"], "absent.jsonl"),
    "validation": (["--data.validation_path", "absent.jsonl"], "absent.jsonl"),
    "weights": (["--data.weights", "1", "--data.weights", "2"], "data.weights has 2 numbers"),
    "tracker": (["--monitoring.report_to", "wandb_"], "Did you mean 'wandb'?"),
    "package": (["--monitoring.report_to", "dvclive"], "pip install dvclive"),
    "score": (["--monitoring.scores", "nubmer"], "nubmer"),
    "metric": (
        [
            *("--hyperparams.early_stopping_metric", "score.f1", "--monitoring.scores", "exact"),
            *("--hyperparams.early_stopping_patience", "2", "--monitoring.num_score_prompts", "20"),
        ],
        "names no score of this run",
    ),
    "model": (["--model", "./absent"], "there is no such folder"),
    "a file": (["--model", "rows.jsonl"], "this is a file; give the folder of a model"),
    "profile": (["--profile", "absent:Class"], "cannot import"),
    "gguf": (["--model", "./absent.gguf"], "there is no such .gguf file"),
    "canaries": (["--monitoring.canary_set", "absent.txt"], "absent.txt"),
    "output": (["--output", "held"], "holds a run already"),
    "resume": (["--resume", "--output", "absent"], "holds no run"),
    "notify": (["--monitoring.notify", "nowhere"], "monitoring.notify"),
}

SCRIPT = """
import contextlib, io, json, sys
from trainer.cli import main
said = {}
for name, words in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
        code = main(words)
    loaded = sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))
    said[name] = [code, err.getvalue(), loaded]
print(json.dumps(said))
"""


def _command(words: list[str]) -> list[str]:
    usual = [word for flag in USUAL if flag not in words for word in (flag, USUAL[flag])]
    return ["train", *usual, *words]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Mistake -> exit code, what was printed, and the libraries loaded by then."""
    here = tmp_path_factory.mktemp("here")
    (here / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (here / "held").mkdir()
    (here / "held" / "run.json").write_text("{}")
    commands = {name: _command(words) for name, (words, _) in MISTAKES.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {name: tuple(values) for name, values in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_no_library_was_loaded_for_it(
    name: str, said: dict[str, tuple[int, str, list[str]]]
) -> None:
    code, text, loaded = said[name]
    assert code == 2, text
    assert MISTAKES[name][1] in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert loaded == []


def test_the_names_of_trackers_are_those_of_transformers() -> None:
    from transformers.integrations import integration_utils as hf

    from trainer.monitoring.tracking import PACKAGES, TRACKERS

    assert sorted(TRACKERS) == sorted(hf.INTEGRATION_TO_CALLBACK)
    assert set(TRACKERS) >= PACKAGES
