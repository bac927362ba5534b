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
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
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
from trainer.core import proofs
from trainer.core.loss import supervised_loss
from trainer.core.proofs import (
    TrainingCollator,
    check_documents_apart,
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
from trainer.errors import ConfigError

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


# ---- N6 and the check at start


def check_start(model: Any, batch_size: int, collate: Any = None) -> None:
    check_documents_apart(model.eval(), batch_size=batch_size, collate=collate)


@pytest.mark.parametrize("attention", ["sdpa", "eager", *flash.NAMES])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_n6_the_check_at_start_accepts_what_keeps_documents_apart(
    calls: flash.Calls, attention: str, batch_size: int
) -> None:
    model = llama(attn_implementation=attention)
    assert takes_borders(model) is (attention in flash.NAMES)
    check_start(model, batch_size)
    assert bool(calls.varlen) is (attention in flash.NAMES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_n6_other_documents_leave_a_document_bit_equal(calls: flash.Calls, family: str) -> None:
    model = FAMILIES[family](attn_implementation="flash_attention_2").eval()
    logits = []
    for start in (5, 50):
        others = [torch.arange(start, start + n) for n in (9, 7, 4)]
        documents = [
            {"input_ids": ids, "labels": ids}
            for ids in (others[0], torch.arange(20, 31), *others[1:])
        ]
        packs = [join_documents(documents[:2]), join_documents(documents[2:])]
        batch = pack_collator(model, 0)(packs)
        del batch["labels"]
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[0, 9 : 9 + 11])
    assert torch.equal(*logits)


@pytest.mark.parametrize("attention", flash.NAMES)
def test_n6_the_check_at_start_refuses_packs_as_rows_at_the_runs_batch_size(
    calls: flash.Calls, attention: str
) -> None:
    model = llama(attn_implementation=attention)
    check_start(model, 1, PackCollator(0))
    with pytest.raises(ConfigError, match=f"see each other .attention {attention}, 2 packs"):
        check_start(model, 2, PackCollator(0))


def test_mutant_n6_a_check_of_one_pack_for_the_runs_batches_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = check_documents_apart

    def one_pack(model: Any, **options: Any) -> None:
        plain(model, **{**options, "batch_size": 1})

    monkeypatch.setitem(globals(), "check_documents_apart", one_pack)
    with pytest.raises(pytest.fail.Exception):
        test_n6_the_check_at_start_refuses_packs_as_rows_at_the_runs_batch_size(
            calls, "flash_attention_2"
        )


def test_a_position_that_does_not_begin_again_is_refused_for_what_it_is() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()

    def counts_on(packs: list[Any]) -> dict[str, Any]:
        batch = PackCollator(0)(packs)
        # Apart, as far as the mask goes, but one place further than alone.
        return {**batch, "position_ids": batch["position_ids"] + 1}

    with pytest.raises(ConfigError, match="different logits for a document in a pack"):
        check_start(model, 2, counts_on)


def test_a_model_that_takes_no_packs_is_refused_by_its_own_words(calls: flash.Calls) -> None:
    model = decoder(
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        attn_implementation="flash_attention_2",
    )
    with pytest.raises(ConfigError, match=r"does not take packed rows .*flash-linear-attention"):
        check_start(model, 2)


def test_a_model_without_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.forward

    def forward(
        self: Any, input_ids: Any, attention_mask: Any = None, use_cache: Any = None
    ) -> Any:
        return plain(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not take packed rows .*position"):
        check_start(llama(), 2)


def check_rounding(attention: str, weights_dtype: torch.dtype) -> None:
    """Rounding of bf16 is accepted, a leak under it is not."""
    model = llama(num_hidden_layers=8, hidden_size=256, attn_implementation=attention)
    model = model.to(weights_dtype).eval()
    rows_of_a_varlen_kernel = PackCollator(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_documents_apart(model)
        if attention in flash.NAMES:
            with pytest.raises(ConfigError, match="see each other"):
                check_documents_apart(model, collate=rows_of_a_varlen_kernel)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_compute_dtype_is_no_leak(
    calls: flash.Calls, attention: str, weights_dtype: torch.dtype
) -> None:
    check_rounding(attention, weights_dtype)


def test_mutant_n6_tolerance_of_the_weights_for_that_of_the_arithmetic_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "_compute_dtype", lambda model: model.dtype)
    with pytest.raises(ConfigError, match="rounding explains at most 1e-04"):
        check_rounding("flash_attention_2", torch.float32)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_real_kernel_keeps_the_documents_of_joined_packs_apart(batch_size: int) -> None:
    pytest.importorskip("flash_attn")
    model = llama(attn_implementation="flash_attention_2", dtype=torch.bfloat16).cuda()
    check_start(model, batch_size)
    with pytest.raises(ConfigError, match="see each other"):
        check_start(model, max(batch_size, 2), PackCollator(0))
