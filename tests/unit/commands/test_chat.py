"""`trainer chat` and other small commands: odd values are refused, a full context is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.commands.chat import _talk
from trainer.preview.local import LocalPreviewBackend


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max-new-tokens", "0"], "'0' is not a whole number (1 or more)"),
        (["--temperature", "-1"], "'-1' is not a number (0 or more)"),
        (["--temperature", "nan"], "'nan' is not a number"),
        (["--seed", "x"], "'x' is not a whole number"),
    ],
)
def test_an_odd_value_is_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", ".", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_device_that_does_not_exist_is_one_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.config import create_default_config

    config = create_default_config(model_path="m", dataset_path="d", output_dir="o")
    record = {"config": config.model_dump(mode="json"), "system_prompt": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    model_folder.rename(tmp_path / "final_model")
    assert main(["chat", str(tmp_path), "--device", "gpu"]) == 2
    assert "'gpu' is not one of auto, cpu" in capsys.readouterr().err


def test_a_full_context_is_told_and_the_turn_forgotten(
    make_model: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = LocalPreviewBackend(
        model=make_model(vocab_size=len(tokenizer)),
        tokenizer=tokenizer,
        max_new_tokens=2,
        temperature=0.0,
        max_length=60,
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" + "fox " * 80 + "\nhi\n"))
    assert _talk(backend, is_terminal=False) == 0
    said = capsys.readouterr().out
    assert "tokens so far, and the model's context is 60; /reset" in said
    assert said.count("cut at the limit") == 2
