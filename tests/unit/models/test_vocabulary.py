"""A padding token beyond the embedding is padded with something else and never read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.training_sections import ModelSection
from trainer.core import TrainerEngine
from trainer.errors import ModelError
from trainer.models.load import check_vocabulary, harmless_pad_id, load_model


@pytest.fixture
def padded(make_tokenizer: Callable[..., Any]) -> Any:
    """A tokenizer whose padding token has an id of its own, behind all others."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pad_id_beyond_the_embedding_fits(
    padded: Any, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    rows = padded.pad_token_id
    check_vocabulary(make_model(vocab_size=rows), padded)
    assert harmless_pad_id(padded, rows) == padded.eos_token_id
    assert harmless_pad_id(padded, rows + 1) == rows
    assert harmless_pad_id(padded, 1) == 0
    assert harmless_pad_id(tokenizer, rows) == tokenizer.pad_token_id


@pytest.mark.parametrize("role", ["eos_token", "unk_token"])
def test_a_token_that_is_more_than_padding_must_be_in_the_embedding(
    padded: Any, make_model: Callable[..., Any], role: str
) -> None:
    setattr(padded, role, "<pad>")
    with pytest.raises(ModelError, match="they do not belong together"):
        check_vocabulary(make_model(vocab_size=max(padded.get_vocab().values())), padded)


def test_a_second_token_beyond_is_refused(padded: Any, make_model: Callable[..., Any]) -> None:
    padded.add_tokens(["<extra>"])
    with pytest.raises(ModelError, match="they do not belong together"):
        check_vocabulary(make_model(vocab_size=padded.pad_token_id), padded)


def run(model: Path, rows: Path, out: Path, **more: Any) -> Any:
    from trainer.config import create_default_config

    config = create_default_config(
        model_path=str(model),
        dataset_path=str(rows),
        output_dir=str(out),
        hyperparams={"max_steps": 2, "batch_size": 4, "fp_precision": "fp32", **more},
        monitoring={"preview_max_tokens": 4, "report_to": ()},
        environment={"num_threads": 1},
    )
    return TrainerEngine().run_job(config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_run_with_such_a_pad_id_trains_what_any_other_trains(
    padded: Any,
    tokenizer: Any,
    make_model: Callable[..., Any],
    qa_file: Path,
    tmp_path: Path,
) -> None:
    vocab = padded.pad_token_id
    one = save(make_model(vocab_size=vocab), padded, tmp_path / "beyond")
    config = json.loads((one / "config.json").read_text())  # as such models come
    (one / "config.json").write_text(json.dumps({**config, "pad_token_id": vocab}))
    two = save(make_model(vocab_size=vocab), tokenizer, tmp_path / "within")
    results = [run(folder, qa_file, tmp_path / f"{folder.name}-out") for folder in (one, two)]
    assert all(result.success for result in results), results[0].error_message
    found, wanted = (weights(Path(result.model_path)) for result in results)
    assert found["model.embed_tokens.weight"].shape[0] == vocab  # not resized in silence
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    for line in (tmp_path / "beyond-out" / "previews.jsonl").open():
        assert json.loads(line)["error_message"] is None


@pytest.mark.parametrize(
    "row",
    [
        {"question": "what is <pad>?", "answer": "a token"},
        {"prompt": "what is ", "completion": "<pad>"},
        {"text": "once upon <pad> a time"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_a_row_that_spells_such_a_token_out_is_refused(
    row: dict[str, str],
    padded: Any,
    make_model: Callable[..., Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = save(make_model(vocab_size=padded.pad_token_id), padded, tmp_path / "m")
    good = dict.fromkeys(row, "hi")
    result = run(folder, write_rows([good, row, good, good]), tmp_path / "out")
    assert result.exit_code == 2
    assert "<pad>" in str(result.error_message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pad", [303, 32000, -400])
def test_a_config_whose_pad_id_is_beyond_loads(
    pad: int, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model(vocab_size=303).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    model = load_model(ModelSection(model_path=str(tmp_path)), dtype=torch.float32)
    assert model.config.pad_token_id is None
