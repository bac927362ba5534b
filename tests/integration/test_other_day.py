"""A run whose chat template prints the date is the same run on another day."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_templates

from trainer.cli import main
from trainer.models import chat_template

pytestmark = pytest.mark.slow
DATED = (
    "{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}{%- for m in messages -%}"
    "{{- '<|im_start|>' + m['role'] + '\n' -}}{%- if m['role'] == 'assistant' -%}"
    "{% generation %}{{- m['content'] + '<|im_end|>' -}}{% endgeneration %}{{- '\n' -}}"
    "{%- else -%}{{- m['content'] + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class Later(dt.datetime):
    """A clock of another day."""

    @classmethod
    def now(cls, tz: Any = None) -> Later:
        return cls(2031, 12, 3)


def train(model: Path, rows: Path, out: Path, *more: str) -> int:
    words = f"train --dataset {rows} --model {model} --output {out} --fp32 --batch-size 4"
    options = "--data.validation_split 0.2 --data.cache false --monitoring.preview_max_tokens 2"
    return main([*words.split(), *options.split(), *more])


def check_resume(model: Path, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continued on another day, the run has the same rows, prompts and date."""
    (model / "chat_template.jinja").write_text(DATED)
    assert train(model, rows, out, "--max-steps", "1") == 0
    begun = json.loads((out / "run.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(chat_templates, "datetime", Later)
        assert train(model, rows, out, "--max-steps", "2", "--resume") == 0
    ended = json.loads((out / "run.json").read_text())
    for key in ("date", "data_fingerprint"):
        assert begun[key] == ended[key]
    assert begun["data_card"]["sample"] == ended["data_card"]["sample"]
    assert (out / "final_model" / "chat_template.jinja").read_text() == DATED


def test_a_run_is_resumed_on_another_day(
    model_folder: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resume(model_folder, qa_file, tmp_path / "out", monkeypatch)


def test_mutant_rows_under_the_date_of_the_day_is_killed(
    model_folder: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "FUNCTION", "nothing")
    with pytest.raises(AssertionError):
        check_resume(model_folder, qa_file, tmp_path / "out", monkeypatch)
