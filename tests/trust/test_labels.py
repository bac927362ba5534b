"""N8 and N12: the stop is trained, padding is not, and truncation is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.data_section import DataSection
from trainer.data import batches, encode
from trainer.data.batches import EncodedDataset, PadCollator
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError
from trainer.profiles import get_profile


def row(answer: str, question: str = "hi") -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_padding(tokenizer: Any, pad_id: int) -> None:
    """The stop of every row is trained once, and no padded place is, whatever the pad id."""
    encoder = RowEncoder(tokenizer, 128)
    examples = [encoder.encode(row(text)) for text in ("a", "the quick brown fox " * 3)]
    data = EncodedDataset(examples)
    batch = PadCollator(pad_id)([data[0], data[1]])
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (batch["labels"] == stop).sum(dim=1).tolist() == [1, 1]
    assert not (batch["labels"][batch["attention_mask"] == 0] != IGNORE_INDEX).any()
    assert batch["attention_mask"].sum(dim=1).tolist() == data.lengths


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_n8_the_stop_is_trained_and_padding_is_not(
    make_tokenizer: Callable[..., Any], pad: str, side: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    check_padding(tokenizer, tokenizer.pad_token_id)


def test_mutant_n8_mask_by_id_is_killed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = batches.PadCollator.__call__

    def by_id(self: Any, rows: Any) -> Any:
        batch = original(self, rows)
        is_pad = batch["input_ids"] == self.pad_id
        batch["labels"] = torch.where(is_pad, IGNORE_INDEX, batch["labels"])
        return batch

    monkeypatch.setattr(batches.PadCollator, "__call__", by_id)
    with pytest.raises(AssertionError):
        check_padding(tokenizer, tokenizer.eos_token_id)


LENGTHS = (1, 5, 40, 80)


def prepared(tokenizer: Any, path: Path, truncation: str, policy: str = "skip") -> RunData:
    return prepare_data(
        DataSection(dataset_path=str(path), validation_split=0, on_bad_row=policy),  # type: ignore[arg-type]
        profile=get_profile("plain"),
        encoder=RowEncoder(tokenizer, 64, truncation=truncation),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=2,
    )


def check_truncation(tokenizer: Any, path: Path, truncation: str) -> None:
    """Rows in = rows trained + rows reported; each trained row has a token the loss sees."""
    data = prepared(tokenizer, path, truncation)
    card = data.card
    assert card.num_rows == len(LENGTHS) + 1
    assert card.num_train_rows + card.num_rejected + card.num_dropped == card.num_rows
    for index in range(len(data.train)):
        labels = data.train[index]["labels"]
        assert (labels[1:] != IGNORE_INDEX).any()
        assert len(labels) <= 64
    full = {"error": (0, 3, 0), "drop": (0, 0, 3), "keep_start": (2, 1, 0), "keep_end": (3, 0, 0)}
    assert (card.num_truncated, card.num_rejected, card.num_dropped) == full[truncation]


@pytest.fixture
def long_rows(write_rows: Callable[..., Path]) -> Path:
    """Two short rows, two with a long answer, one with a long question."""
    rows = [{"question": "q", "answer": "b " * count} for count in LENGTHS]
    return write_rows([*rows, {"question": "b " * 80, "answer": "c"}])


@pytest.mark.parametrize("truncation", ["error", "drop", "keep_start", "keep_end"])
def test_n12_truncation_is_counted_and_leaves_no_row_untrained(
    tokenizer: Any, long_rows: Path, truncation: str
) -> None:
    check_truncation(tokenizer, long_rows, truncation)


def test_n12_keep_end_keeps_the_stop_and_keep_start_the_prompt(tokenizer: Any) -> None:
    messages = row("b " * 80)
    whole = RowEncoder(tokenizer, 2048).encode(messages)
    start = RowEncoder(tokenizer, 64, truncation="keep_start").encode(messages)
    end = RowEncoder(tokenizer, 64, truncation="keep_end").encode(messages)
    assert start.input_ids == whole.input_ids[:64]
    assert start.prompt_ids == whole.prompt_ids
    assert end.input_ids == whole.input_ids[-64:]
    assert end.labels[1:] == whole.labels[-63:]
    assert end.labels[0] == IGNORE_INDEX


def test_n12_the_prompt_of_a_row_cut_at_its_start_is_that_of_the_first_answer_kept(
    tokenizer: Any,
) -> None:
    messages = [*row("b " * 80), *row("the fox", "again")]
    example = RowEncoder(tokenizer, 64, truncation="keep_end").encode(messages)
    assert (example.prompt, example.golden_answer) == ("again", "the fox")
    assert tokenizer.decode(example.prompt_ids).endswith("again<|im_end|>\n<|im_start|>assistant\n")


def test_mutant_n12_labels_all_ignored_is_killed(
    tokenizer: Any, long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(ids: Any, labels: Any, max_length: int, how: str) -> Any:
        return ids[:max_length], labels[:max_length]

    monkeypatch.setattr(encode, "cut", careless)
    with pytest.raises(AssertionError):
        check_truncation(tokenizer, long_rows, "keep_start")


def test_error_names_the_length_and_what_to_do(tokenizer: Any) -> None:
    with pytest.raises(BadRowError, match="max_length is 64; raise it"):
        RowEncoder(tokenizer, 64, truncation="error").encode(row("b " * 80))
