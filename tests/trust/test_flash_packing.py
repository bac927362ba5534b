"""N5 and N6 for every attention: packs of a batch train as their rows do alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.trust import flash
from tests.trust.reference import (
    IGNORED,
    decoder,
    distance,
    gradient,
    llama,
    ragged_rows,
    token_mean,
    weighted_mean,
    weighted_rows,
    weights,
)
from tests.trust.trainers import make_trainer
from trainer.core.loss import supervised_loss
from trainer.core.proofs import (
    TrainingCollator,
    pack_collator,
    takes_borders,
)
from trainer.data.batches import (
    JoinCollator,
    PackCollator,
    PadCollator,
    count_tokens,
    join_documents,
)

CAPACITY, NUM_ROWS = 48, 20
WINDOW = {"sliding_window": 5}
FAMILIES: dict[str, Callable[..., Any]] = {
    "grouped heads": llama,
    "every window": lambda **options: decoder(
        MistralForCausalLM, MistralConfig, **WINDOW, **options
    ),
    "some windows": lambda **options: decoder(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **{**WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        **options,
    ),
}


@pytest.fixture
def calls() -> Iterator[flash.Calls]:
    with flash.installed() as calls:
        yield calls


def trained(model: Any, rows: Any, **options: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the one step that the real trainer makes of all rows."""
    before = weights(model)
    trainer = make_trainer(model, rows, **options)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.last_step is not None
    assert trainer.last_step.num_tokens == sum(len(row[0]) for row in rows)
    return trainer.last_step.train_loss, before - weights(model)


def check_packed_as_alone(
    batch_size: int,
    *,
    attention: str = "flash_attention_2",
    family: str = "grouped heads",
    weighted: bool = False,
    capacity: int | None = CAPACITY,
    **options: Any,
) -> None:
    """Loss and gradient of packed (or joined) rows are those of rows alone, from full logits."""
    rows: Any = weighted_rows(NUM_ROWS) if weighted else ragged_rows(NUM_ROWS)
    plain = FAMILIES[family](dtype=torch.float64, attn_implementation="sdpa")
    expected = (weighted_mean if weighted else token_mean)(plain, rows)
    model = FAMILIES[family](dtype=torch.float64, attn_implementation=attention)
    cut = {"batch_size": batch_size, "accumulation": -(-NUM_ROWS // batch_size)}
    loss, change = trained(model, rows, capacity=capacity, **cut, **options)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert distance(change, gradient(plain, expected)) <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_n5_packs_as_rows_train_as_their_rows_alone(attention: str, batch_size: int) -> None:
    check_packed_as_alone(batch_size, attention=attention)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("attention", flash.NAMES)
@pytest.mark.parametrize("capacity", [CAPACITY, None])
def test_n5_joined_packs_and_rows_train_as_their_rows_alone(
    calls: flash.Calls, capacity: int | None, attention: str, batch_size: int
) -> None:
    check_packed_as_alone(batch_size, attention=attention, capacity=capacity)
    assert calls.varlen
    assert not calls.rows
    # The borders come with the batch: no layer looks for them, which would wait for the device.
    assert not calls.searches


@pytest.mark.parametrize("family", ["every window", "some windows"])
@pytest.mark.parametrize("capacity", [CAPACITY, None])
def test_n5_windows_end_at_the_documents_of_joined_packs(
    calls: flash.Calls, capacity: int | None, family: str
) -> None:
    check_packed_as_alone(2, family=family, capacity=capacity)
    assert calls.varlen


@pytest.mark.parametrize("capacity", [CAPACITY, None])
def test_n5_joined_packs_with_recomputed_activations_and_weights(
    calls: flash.Calls, capacity: int | None
) -> None:
    check_packed_as_alone(2, weighted=True, capacity=capacity, gradient_checkpointing=True)
    assert calls.varlen


def test_joined_rows_are_the_batch_that_padded_ones_are(calls: flash.Calls) -> None:
    rows: Any = weighted_rows(4)
    rows[1] = ([7], [IGNORED], [0.0])  # a blank
    items = [
        {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "loss_weights": torch.tensor(counts),
        }
        for ids, labels, counts in rows
    ]
    model = llama(dtype=torch.float64, attn_implementation="flash_attention_2")
    padded = TrainingCollator(PadCollator(0))(items)
    joined = TrainingCollator(pack_collator(model, 0))(items)
    assert joined["input_ids"].shape == (1, sum(len(row[0]) for row in rows))
    assert joined["num_tokens"] == padded["num_tokens"] == joined["input_ids"].numel() - 1
    assert len(joined["supervised"]) == len(padded["supervised"])
    one, other = (supervised_loss(model, model, batch) for batch in (padded, joined))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)
    assert distance(gradient(model, one), gradient(model, other)) <= 1e-6


def test_a_model_that_takes_no_borders_finds_them_in_the_one_row(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, position_ids: Any, use_cache: Any = None) -> Any:
        return plain(self, input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    model = llama(attn_implementation="flash_attention_2")
    batch = pack_collator(model, 0)(packs_of(2))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    joined = supervised_loss(model, model, batch)
    assert calls.searches
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", plain)
        rows = ragged_rows(4, longest=20)
        assert joined.item() == pytest.approx(token_mean(llama(), rows).item(), rel=1e-6)


def packs_of(count: int) -> list[dict[str, Any]]:
    rows = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        for ids, labels in ragged_rows(2 * count, longest=20)
    ]
    return [join_documents(rows[2 * n : 2 * n + 2]) for n in range(count)]


# ---- mutants


def test_mutant_n5_rows_that_are_not_joined_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: packs stay rows, and positions alone say where documents begin."""
    monkeypatch.setattr("tests.trust.trainers.pack_collator", lambda model, pad: PackCollator(pad))
    check_packed_as_alone(1)  # which is right, and all that the check at start used to see
    with pytest.raises(AssertionError):
        check_packed_as_alone(2)


def test_mutant_n5_a_mask_of_ones_beside_packs_as_rows_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collate = PackCollator.__call__

    def with_mask(self: PackCollator, packs: list[Any]) -> dict[str, Any]:
        batch = collate(self, packs)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(PackCollator, "__call__", with_mask)
    for attention in ("sdpa", "eager"):
        with pytest.raises(AssertionError):
            check_packed_as_alone(2, attention=attention)


def test_mutant_n5_rows_joined_to_one_document_are_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_document(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.cat([row["input_ids"] for row in rows])
        return join_documents(
            [{"input_ids": ids, "labels": torch.cat([r["labels"] for r in rows])}]
        )

    collate = JoinCollator.__call__
    monkeypatch.setattr(
        JoinCollator, "__call__", lambda self, rows: collate(self, [one_document(rows)])
    )
    check_packed_as_alone(1, capacity=None)
    with pytest.raises(AssertionError):
        check_packed_as_alone(2, capacity=None)


def change_batches(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    collate = JoinCollator.__call__
    monkeypatch.setattr(
        JoinCollator,
        "__call__",
        lambda self, packs: (batch := collate(self, packs)) and {**batch, **change(batch)},
    )


def test_mutant_n5_borders_off_by_one_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_late(batch: dict[str, Any]) -> dict[str, Any]:
        borders = batch["cu_seq_lens_q"].clone()
        borders[1:-1] += 1
        return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}

    change_batches(monkeypatch, one_late)
    with pytest.raises(AssertionError):
        check_packed_as_alone(2)


def test_mutant_n5_borders_of_packs_for_those_of_documents_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole_row(batch: dict[str, Any]) -> dict[str, Any]:
        length = batch["input_ids"].shape[1]
        ends = torch.tensor([0, length], dtype=torch.int32)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": length,
            "max_length_k": length,
        }

    change_batches(monkeypatch, whole_row)
    with pytest.raises(AssertionError):
        check_packed_as_alone(1)


def test_mutant_n5_longest_document_too_short_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(batch: dict[str, Any]) -> dict[str, Any]:
        longest = batch["max_length_q"] // 2  # one less would cut a token that predicts nothing
        return {"max_length_q": longest, "max_length_k": longest}

    change_batches(monkeypatch, shorter)
    with pytest.raises(AssertionError):
        check_packed_as_alone(2)


# ---- the batch


def test_joined_packs_carry_borders_and_count_as_their_documents_do() -> None:
    documents = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (5, 3, 4, 1, 2)]
    packs = [join_documents(documents[:2]), join_documents(documents[2:])]
    batch = JoinCollator(with_borders=True)(packs)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 0, 1]]
    assert batch["labels"].tolist() == [
        [-100, 1, 2, 3, 4, -100, 1, 2, -100, 1, 2, 3, -100, -100, 1]
    ]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12, 13, 15]
    assert batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 13, 15]
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 5)
    assert int(count_tokens(batch)) == 14  # a row of one token is a blank


def test_the_name_of_the_attention_is_that_of_the_language_model(calls: flash.Calls) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32}
    vision = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    config = Gemma3Config(text_config=text, vision_config=vision)
    config._attn_implementation = {"text_config": "flash_attention_2", "vision_config": "sdpa"}
    assert takes_borders(Gemma3ForConditionalGeneration(config))
    config._attn_implementation = {"text_config": "sdpa", "vision_config": "flash_attention_2"}
    assert not takes_borders(Gemma3ForConditionalGeneration(config))
