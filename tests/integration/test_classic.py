"""UltimateTrainer: the classic object, step by step and all at once."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The class as `core/train.py` exports it."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("classic_train", ROOT / "core" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UltimateTrainer


def arguments(dataset: Path, output: Path) -> argparse.Namespace:
    return argparse.Namespace(
        dataset=str(dataset),
        model="tiny",
        output=str(output),
        max_steps=2,
        batch_size=4,
        quiet=True,
        resume=None,
    )


def test_the_steps_can_be_taken_one_by_one(classic: Any, qa_file: Path, tmp_path: Path) -> None:
    trainer = classic(arguments(qa_file, tmp_path / "out"))
    model, tokenizer = trainer.load_model()
    data = trainer.prepare_dataset()
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    assert len(data.train) + len(data.validation or ()) == 40
    assert trainer.setup_live_monitor()
    assert trainer.setup_training().model is model
    result = trainer.run()
    assert result.success, result.error_message
    assert result.global_step == 2
    assert (tmp_path / "out" / "final_model" / "config.json").is_file()


def test_run_alone_is_enough_and_words_are_taken_too(
    classic: Any, qa_file: Path, tmp_path: Path
) -> None:
    words = ["--dataset", str(qa_file), "--model", "tiny", "--output", str(tmp_path / "words")]
    result = classic([*words, "--max-steps", "1", "--quiet"]).run()
    assert result.success, result.error_message
