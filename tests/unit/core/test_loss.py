"""Loss and gradients on supervised positions equal plain PyTorch on full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.core.loss import compare_with_own_loss, supervised_loss


def ragged_batch(seed: int = 0, vocab: int = 128) -> dict[str, torch.Tensor]:
    """Five right-padded rows of 6-32 tokens, about half of them trained."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [32, 6, 17, 24, 9]
    ids = torch.randint(3, vocab, (5, 32), generator=generator)
    mask = torch.arange(32)[None] < torch.tensor(lengths)[:, None]
    labels = ids.clone()
    labels[torch.rand(5, 32, generator=generator) < 0.5] = -100
    labels[~mask] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


def reference(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token-mean cross-entropy over full logits, row by row and without padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels, mask in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        logits = model(ids[None, :length]).logits[0]
        for position in range(length - 1):
            target = int(labels[position + 1])
            if target != -100:
                total = total - F.log_softmax(logits[position], -1)[target]
                count += 1
    return total / count


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_loss_and_gradients_equal_plain_pytorch_in_fp64(make_model: Callable[..., Any]) -> None:
    model = make_model(vocab_size=128, tie_word_embeddings=False).double()
    batch = ragged_batch()
    ours, plain = supervised_loss(model, model, batch), reference(model, batch)
    assert abs(ours.item() - plain.item()) <= 1e-6 * plain.item()
    ours_grad, plain_grad = gradients(model, ours), gradients(model, plain)
    assert (ours_grad - plain_grad).norm() <= 1e-6 * plain_grad.norm()


def test_gradients_equal_finite_differences() -> None:
    # GPT-2, because it computes in fp64 throughout; Qwen3's norms go through fp32.
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    batch = ragged_batch()
    gradients(model, supervised_loss(model, model, batch))
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.grad is not None]
    for _ in range(20):
        parameter = parameters[int(torch.randint(len(parameters), (1,), generator=generator))]
        at = int(torch.randint(parameter.numel(), (1,), generator=generator))
        flat, grad = parameter.data.view(-1), float(parameter.grad.view(-1)[at])
        with torch.no_grad():
            losses = []
            for shift in (1e-5, -2e-5, 1e-5):
                flat[at] += shift
                losses.append(float(supervised_loss(model, model, batch)))
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(grad, rel=1e-4, abs=1e-7)


def test_a_batch_without_supervised_tokens_has_zero_loss_and_gradient(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(vocab_size=128)
    batch = ragged_batch()
    batch["labels"][:] = -100
    loss = supervised_loss(model, model, batch, 7)
    assert loss.item() == 0.0
    assert gradients(model, loss).abs().max() == 0.0


def test_lora_models_give_the_same_loss_as_their_own_forward(
    make_model: Callable[..., Any],
) -> None:
    from peft import LoraConfig, get_peft_model

    for options in (
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        base = make_model(vocab_size=128, tie_word_embeddings=False)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            check = compare_with_own_loss(model, ragged_batch(), torch.float32)
        assert check.is_equal, options


def test_a_head_that_is_called_in_another_way_falls_back_to_full_logits(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(vocab_size=128).double()
    batch = ragged_batch()
    expected = supervised_loss(model, model, batch).item()
    model.get_output_embeddings = lambda: None
    assert supervised_loss(model, model, batch).item() == pytest.approx(expected, rel=1e-12)


def test_a_model_that_adds_to_its_loss_is_noticed(make_model: Callable[..., Any]) -> None:
    model = make_model(vocab_size=128).eval()
    own = type(model).forward

    class Heavier(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = own(self, *args, **kwargs)
            if output.loss is not None:
                output.loss = output.loss + 0.1
            return output

    with torch.no_grad():
        assert compare_with_own_loss(model, ragged_batch(), torch.float32).is_equal
        model.__class__ = Heavier
        assert not compare_with_own_loss(model, ragged_batch(), torch.float32).is_equal
