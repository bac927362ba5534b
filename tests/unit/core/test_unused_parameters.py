"""Whether DDP must look for parameters that get no gradient is found by one pass over a row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as t

from tests.trust.reference import decoder, llama, ragged_rows
from tests.trust.trainers import dataset, make_trainer
from trainer.core.checks import has_unused_parameters
from trainer.models.precision import keep_vectors_wide

ROWS = ragged_rows(4, seed=1)


def found(model: Any) -> bool:
    trainer = make_trainer(model, ROWS, batch_size=2)
    state = torch.random.get_rng_state()
    is_found = has_unused_parameters(trainer, dataset(ROWS))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(one.grad is None for one in model.parameters())
    return is_found


def test_a_model_that_uses_all_of_its_parameters_has_none() -> None:
    assert not found(llama(tied=True))


def test_one_that_no_text_goes_through_is_found() -> None:
    model = llama()
    model.vision = torch.nn.Linear(4, 4)
    assert found(model)
    model.vision.requires_grad_(False)
    assert not found(model)


def test_weights_of_two_dtypes_are_passed_through_as_training_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama().bfloat16()
    keep_vectors_wide(model)
    trainer = make_trainer(model, ROWS, batch_size=2)
    in_bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    monkeypatch.setattr(trainer.accelerator, "autocast", in_bf16)
    assert not has_unused_parameters(trainer, dataset(ROWS))


def test_experts_are_taken_to_be_left_out_now_and_then() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert found(decoder(t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, **sizes))


def test_what_does_not_fit_now_is_told_where_the_longest_rows_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()

    def forward(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(model, "forward", forward)
    assert found(model)
