"""N6 and the check at start: no document of a pack sees another, whatever the attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from tests.trust import flash
from tests.trust.reference import decoder, llama
from tests.trust.test_flash_packing import FAMILIES
from trainer.core import proofs
from trainer.core.proofs import check_documents_apart, pack_collator, takes_borders
from trainer.data.batches import PackCollator, join_documents
from trainer.errors import ConfigError


@pytest.fixture
def calls() -> Iterator[flash.Calls]:
    with flash.installed() as calls:
        yield calls


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_real_kernel_keeps_the_documents_of_joined_packs_apart(batch_size: int) -> None:
    pytest.importorskip("flash_attn")
    model = llama(attn_implementation="flash_attention_2", dtype=torch.bfloat16).cuda()
    check_start(model, batch_size)
    with pytest.raises(ConfigError, match="see each other"):
        check_start(model, max(batch_size, 2), PackCollator(0))
