"""Rows padded at their ends go without an attention mask where the model is proved to need none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.trust.reference import decoder, distance, lfm2, llama, ragged_rows, token_mean, weights
from tests.trust.trainers import make_trainer
from trainer.core.proofs import TrainingCollator, needs_mask, needs_no_mask
from trainer.data.batches import PadCollator


def gpt2(**options: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **options)).eval()


def opt(**options: Any) -> Any:
    """Positions counted over the mask."""
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.0}
    return decoder(OPTForCausalLM, OPTConfig, **sizes, **options).eval()


def sees_later_tokens(**options: Any) -> Any:
    return llama(is_causal=False, **options).eval()


def has_no_mask(model: Any, batch_size: int) -> bool:
    with torch.no_grad():
        return needs_no_mask(model, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("make", [llama, gpt2, opt, lfm2])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_rows_padded_at_the_end_need_no_mask_where_tokens_see_earlier_ones_only(
    make: Callable[..., Any], batch_size: int, name: str
) -> None:
    assert has_no_mask(make(attn_implementation=name).eval(), batch_size)


def test_a_model_that_sees_later_tokens_keeps_its_mask() -> None:
    assert not has_no_mask(sees_later_tokens(), 4)


def test_a_model_that_looks_at_its_mask_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, **named: Any) -> Any:
        output = plain(self, input_ids=input_ids, attention_mask=attention_mask, **named)
        if attention_mask is None:  # such as a mean over a row that leaves out its padding
            output.logits = output.logits + input_ids.float().mean(dim=1)[:, None, None]
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert not has_no_mask(llama().eval(), 4)


def step(model: Any, *, with_mask: bool, rows: Any) -> tuple[float, torch.Tensor]:
    trainer = make_trainer(model, rows, batch_size=4, accumulation=2)
    trainer.data_collator = TrainingCollator(PadCollator(0), with_mask=with_mask)
    before = weights(model)
    trainer.train()
    assert trainer.last_step is not None
    assert trainer.last_step.num_tokens == sum(len(ids) for ids, _ in rows)
    return trainer.last_step.train_loss, before - weights(model)


def check_without_mask(make: Callable[..., Any]) -> None:
    """Loss and gradient of the real trainer are those with a mask."""
    rows = ragged_rows(8)
    loss, change = step(make(dtype=torch.float64), with_mask=False, rows=rows)
    expected, with_mask = step(make(dtype=torch.float64), with_mask=True, rows=rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert distance(change, with_mask) <= 1e-6


@pytest.mark.parametrize("make", [llama, opt])
def test_padded_rows_train_alike_without_a_mask(make: Callable[..., Any]) -> None:
    check_without_mask(make)
    rows = ragged_rows(8)
    loss, _ = step(make(dtype=torch.float64), with_mask=False, rows=rows)
    assert loss == pytest.approx(token_mean(make(dtype=torch.float64), rows).item(), rel=1e-6)


def test_mutant_no_mask_whatever_the_model_is_killed() -> None:
    with pytest.raises(AssertionError):
        check_without_mask(sees_later_tokens)


def test_a_router_loss_and_an_own_forward_keep_the_mask() -> None:
    trainer = make_trainer(llama(), ragged_rows(4), batch_size=2)
    assert not needs_mask(trainer)
    trainer.router = 0.1
    assert needs_mask(trainer)
    trainer.router, trainer.use_own_forward = 0.0, True
    assert needs_mask(trainer)
