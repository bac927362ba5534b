"""N27: a model that has learned eight rows by heart says them, here and on a server, and stops."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.serving import running_server
from trainer.config import create_default_config
from trainer.core import TrainerEngine
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, Example
from trainer.models.adapter_files import load_finished_model
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.http import Remote3090Backend
from trainer.preview.local import LocalPreviewBackend

pytestmark = pytest.mark.slow
ANSWERS = [
    "red",
    "blue and green",
    "a dozen eggs",
    "7",
    "the quick brown fox",
    "no",
    "yes, twice",
    "it rains in Oslo",
]
LIMIT, NUM_STEPS = 40, 100


@pytest.fixture
def recite(
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_model: Callable[..., Any],
    tokenizer: Any,
) -> Callable[[str], Any]:
    """A function that trains a 2-layer model on eight rows until it knows them."""
    folder = tmp_path / "untrained"
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = write_rows([{"question": f"say {n}", "answer": a} for n, a in enumerate(ANSWERS)])

    def run(name: str) -> Any:
        return TrainerEngine().run_job(
            create_default_config(
                model_path=str(folder),
                dataset_path=str(rows),
                output_dir=str(tmp_path / name),
                hyperparams={
                    "batch_size": 8,
                    "max_steps": NUM_STEPS,
                    "learning_rate": 2e-2,
                    "fp_precision": "fp32",
                },
                data={"validation_split": 0, "cache": False},
                monitoring={
                    "inference_interval": 1000,
                    "num_eval_samples": 8,
                    "preview_max_tokens": LIMIT,
                    "preview_temperature": 0,
                    "report_to": (),
                },
                environment={"num_threads": 1, "device": "cpu"},
            )
        )

    return run


def last_previews(result: Any) -> list[PreviewResult]:
    lines = (result.output_dir / "previews.jsonl").read_text().splitlines()
    found = [PreviewResult.model_validate(json.loads(line)) for line in lines]
    return [preview for preview in found if preview.step == result.global_step]


def check_recites(result: Any) -> None:
    """Each answer comes out whole, and nothing behind it."""
    assert result.success, result.error_message
    previews = last_previews(result)
    assert sorted(p.text for p in previews) == sorted(ANSWERS)
    assert all(p.text == p.golden_answer and p.matches for p in previews)
    assert {p.finish_reason for p in previews} == {"stop"}


def test_n27_greedy_previews_recite_here_and_on_a_server_byte_for_byte(
    recite: Callable[[str], Any],
) -> None:
    result = recite("right")
    check_recites(result)
    previews = last_previews(result)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.model_path)
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "temperature": 0.0}
    local = LocalPreviewBackend(
        model=load_finished_model(result.model_path, dtype=torch.float32),
        tokenizer=tokenizer,
        **options,
    )
    requests = [
        PreviewRequest(prompt=p.prompt, prompt_token_ids=tuple(local.render(p.prompt)))
        for p in previews
    ]
    with running_server("--model", str(result.model_path)) as server:
        remote = Remote3090Backend(host="127.0.0.1", port=server.port, **options)
        theirs = remote.preview_batch(requests, NUM_STEPS)
    ours = local.preview_batch(requests, NUM_STEPS)
    expected = [preview.raw_text for preview in previews]
    assert [r.error_message for r in theirs] == [None] * 8
    assert [r.raw_text for r in ours] == expected
    assert [r.raw_text.encode() for r in theirs] == [text.encode() for text in expected]
    assert [r.finish_reason for r in theirs] == ["stop"] * 8


def test_mutant_n27_eos_masked_is_killed(
    recite: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = RowEncoder._example

    def without_stop(self: Any, *args: Any) -> Example:
        example = make(self, *args)
        ends = self.template.end_ids
        labels = [IGNORE_INDEX if label in ends else label for label in example.labels]
        return dataclasses.replace(example, labels=labels)

    monkeypatch.setattr(RowEncoder, "_example", without_stop)
    with pytest.raises(AssertionError):
        check_recites(recite("broken"))
