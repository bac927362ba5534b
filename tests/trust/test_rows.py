"""N10, N11, N15: one BOS everywhere, no token and no row lost in silence, a split by content."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trust.oracle import FAMILIES
from tests.trust.reference import llama
from tests.trust.trainers import make_trainer
from trainer.config.data_section import DataSection
from trainer.data import batches, encode, sides
from trainer.data.batches import EpochOrder
from trainer.data.dataset import RunData, pack_training_rows, prepare_data
from trainer.data.encode import RowEncoder
from trainer.preview.local import LocalPreviewBackend
from trainer.profiles import get_profile

[LLAMA3] = [family for family in FAMILIES if family.name == "llama3"]


def prepared(path: Path, tokenizer: Any, *, length: int = 128, seed: int = 1, **data: Any) -> Any:
    return prepare_data(
        DataSection(dataset_path=str(path), **{"cache": False, "validation_split": 0.25, **data}),
        profile=get_profile("plain"),
        encoder=RowEncoder(tokenizer, length, truncation=data.get("truncation", "keep_start")),
        system_prompt="be brief",
        is_prompt_configured=True,
        seed=seed,
        num_preview=4,
    )


# ---- N10


def with_own_bos() -> Any:
    """Llama 3 style, whose tokenizer writes a BOS before every text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = LLAMA3.tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def check_one_bos(path: Path) -> None:
    """N10: rows trained, rows held out and previews begin alike, with one BOS."""
    tokenizer = with_own_bos()
    data = prepared(path, tokenizer)
    backend = LocalPreviewBackend(
        model=llama(vocab_size=len(tokenizer)), tokenizer=tokenizer, system_prompt="be brief"
    )
    for part in (data.train, data.validation):
        for index in range(len(part)):
            ids = part[index]["input_ids"].tolist()
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
    rows = [data.validation[i]["input_ids"].tolist() for i in range(len(data.validation))]
    for held in data.preview_prompts:
        assert tuple(backend.render(held.prompt)) == held.prompt_token_ids
        assert any(
            tuple(row[: len(held.prompt_token_ids)]) == held.prompt_token_ids for row in rows
        )


def test_n10_one_bos_in_training_evaluation_and_preview(qa_file: Path) -> None:
    check_one_bos(qa_file)


def test_mutant_n10_preview_rendered_then_tokenized_is_killed(
    qa_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render_turns(self: Any, turns: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    monkeypatch.setattr(LocalPreviewBackend, "render_turns", render_turns)
    with pytest.raises(AssertionError):
        check_one_bos(qa_file)


# ---- N11

LENGTHS = (1, 3, 8, 20, 40, 60, 80, 5, 11, 33)


@pytest.fixture
def ragged_file(write_rows: Callable[..., Path]) -> Path:
    return write_rows([{"question": "q", "answer": "b " * count} for count in LENGTHS])


def check_tokens(path: Path, tokenizer: Any, truncation: str) -> None:
    """N11: all tokens of the file = those of the rows kept + those the card says were cut."""
    data = prepared(path, tokenizer, length=64, truncation=truncation, validation_split=0)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    whole = tokenizer.apply_chat_template(
        [[*turns, {"role": "assistant", "content": "b " * count}] for count in LENGTHS],
        return_dict=True,
    )["input_ids"]
    kept = [len(data.train[i]["input_ids"]) for i in range(len(data.train))]
    assert len(kept) + data.card.num_dropped == len(LENGTHS)
    assert sum(kept) + data.card.num_cut_tokens == sum(map(len, whole))
    assert data.card.num_tokens == sum(kept)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
def test_n11_tokens_in_are_tokens_out_and_reported_cuts(
    ragged_file: Path, tokenizer: Any, truncation: str
) -> None:
    check_tokens(ragged_file, tokenizer, truncation)


def check_once_per_epoch(data: RunData) -> None:
    """N11: in each of two epochs the real loop sees every row once, in two different orders."""
    is_packed = isinstance(data.train, batches.PackedDataset)
    rows = data.train.rows if is_packed else data.train  # type: ignore[attr-defined]
    expected = Counter(tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows)))
    trainer = make_trainer(
        llama(vocab_size=len(data.encoder.tokenizer), max_position_embeddings=128),
        [([3, 4], [3, 4])],
        batch_size=2,
        num_epochs=2,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
    )
    trainer.train_dataset = data.train
    trainer.order = EpochOrder(data.train.lengths, group_size=2, seed=3)
    trainer.data_collator = batches.PackCollator(0) if is_packed else trainer.data_collator
    seen: list[tuple[int, ...]] = []
    compute = trainer.compute_loss

    def noting(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.extend(documents(inputs))
        return compute(model, inputs, *rest, **named)

    trainer.compute_loss = noting  # type: ignore[method-assign]
    trainer.train()
    half = len(seen) // 2
    assert Counter(seen[:half]) == expected
    assert Counter(seen[half:]) == expected
    assert seen[:half] != seen[half:]


def documents(inputs: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The rows of a batch, packed or padded, without padding."""
    found = []
    for row, ids in enumerate(inputs["input_ids"]):
        if "attention_mask" in inputs:
            found.append(tuple(ids[inputs["attention_mask"][row].bool()].tolist()))
            continue
        positions = inputs["position_ids"][row].tolist()
        starts = [i for i, p in enumerate(positions) if p == 0 and positions[i + 1 : i + 2] == [1]]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            length = 1 + next(
                (n for n in range(end - start - 1) if positions[start + n + 1] != n + 1),
                end - start - 1,
            )
            found.append(tuple(ids[start : start + length].tolist()))
    return found


@pytest.mark.parametrize("is_packed", [False, True])
def test_n11_every_row_is_trained_once_per_epoch(
    qa_file: Path, tokenizer: Any, is_packed: bool
) -> None:
    data = prepared(qa_file, tokenizer)
    check_once_per_epoch(pack_training_rows(data) if is_packed else data)


def test_mutant_n11_overflow_dropped_is_killed(
    qa_file: Path, ragged_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = batches.best_fit_decreasing
    data = prepared(qa_file, tokenizer)
    monkeypatch.setattr(batches, "best_fit_decreasing", lambda *args: fit(*args)[:-1])
    with pytest.raises(AssertionError):
        check_once_per_epoch(pack_training_rows(data))


def test_mutant_n11_tokens_cut_in_silence_is_killed(
    ragged_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = encode.RowEncoder._example

    def silent(self: Any, *args: Any) -> Any:
        return dataclasses.replace(example(self, *args), num_removed=0)

    monkeypatch.setattr(encode.RowEncoder, "_example", silent)
    with pytest.raises(AssertionError):
        check_tokens(ragged_file, tokenizer, "keep_start")


# ---- N15


def check_split(path: Path, tokenizer: Any) -> None:
    """N15: no content is on both sides, and neither order nor restart moves a row over."""
    data = prepared(path, tokenizer)
    sides = [
        {tuple(part[i]["input_ids"].tolist()) for i in range(len(part))}
        for part in (data.train, data.validation)
    ]
    assert not sides[0] & sides[1]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[::-1]) + "\n")
    again = prepared(path, tokenizer)
    held = {tuple(again.validation[i]["input_ids"].tolist()) for i in range(len(again.validation))}
    assert held == sides[1]


@pytest.fixture
def repeated_file(write_rows: Callable[..., Path]) -> Path:
    """Every third row says what an earlier one says."""
    return write_rows([{"question": f"{n % 20}?", "answer": f"it is {n % 20}"} for n in range(30)])


def test_n15_no_content_is_on_both_sides_of_the_split(repeated_file: Path, tokenizer: Any) -> None:
    check_split(repeated_file, tokenizer)


def test_n15_another_seed_holds_out_other_rows(repeated_file: Path, tokenizer: Any) -> None:
    one, two = (prepared(repeated_file, tokenizer, seed=seed) for seed in (1, 2))
    assert one.validation.fingerprint() != two.validation.fingerprint()


def test_mutant_n15_split_by_position_is_killed(
    repeated_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_position(section: Any, rows: Any, seed: int) -> Any:
        numbers = np.arange(len(rows))
        return numbers[7:], numbers[:7], "by position"

    monkeypatch.setattr(sides, "split_rows", by_position)
    with pytest.raises(AssertionError):
        check_split(repeated_file, tokenizer)
