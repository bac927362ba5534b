"""Trust items N20, N22, N24: what moves, what is saved, and what bf16 autocast computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core import TrainerEngine
from trainer.core.loss import supervised_loss
from trainer.core.training import save_final_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [40, 30, 20, 10, 9, 8, 7, 6]])


def check_n20(config: Any) -> None:
    """Everything that is meant to move moves, and nothing else."""
    engine = TrainerEngine()
    model, _ = engine.load_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    is_lora = config.hyperparams.training_mode == "lora"
    meant = {name for name in before if not is_lora or "lora_" in name}
    result = engine.run_job(config)
    assert result.success, result.error_message
    after = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == meant


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_n20_exactly_the_intended_parameters_move(
    job: Callable[..., Any], mode: str, optimizer: str
) -> None:
    hyper = {"training_mode": mode, "optimizer": optimizer, "max_steps": 3}
    check_n20(job(hyperparams=hyper, monitoring={"inference_interval": 0}))


def test_mutant_n20_a_frozen_adapter_is_killed(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.core.preparation as preparation

    add = preparation.add_lora

    def freeze_one(*args: Any, **options: Any) -> Any:
        model = add(*args, **options)
        next(p for p in model.parameters() if p.requires_grad).requires_grad = False
        return model

    monkeypatch.setattr(preparation, "add_lora", freeze_one)
    hyper = {"training_mode": "lora", "max_steps": 3}
    with pytest.raises(AssertionError):
        check_n20(job(hyperparams=hyper, monitoring={"inference_interval": 0}))


@pytest.mark.parametrize("is_tied", [True, False])
def test_n22_a_saved_model_says_the_same_bit_for_bit(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, is_tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(tie_word_embeddings=is_tied).eval()
    folder = save_final_model(
        model,
        tokenizer,
        tmp_path / "final",
        dtype=torch.float32,
        stop_ids=frozenset({2}),
        use_cache=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
    assert loaded.config.tie_word_embeddings == is_tied


def loss_and_gradient(model: Any, dtype: torch.dtype | None) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = supervised_loss(model, model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_n24(model: Any) -> None:
    dtypes: dict[str, torch.dtype] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, output, name=name: dtypes.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output).dtype
            )
        )
        for name, module in model.named_modules()
        if "norm" in name or "rotary" in name
    ]
    exact, gradient = loss_and_gradient(model, None)
    rough, rough_gradient = loss_and_gradient(model, torch.bfloat16)
    for hook in hooks:
        hook.remove()
    # What the norms and the rotation hand on; inside they compute in fp32.
    assert dtypes["model.norm"] == torch.float32
    assert dtypes["model.rotary_emb"] == torch.float32
    assert abs(rough - exact) <= 0.02 * exact
    assert torch.cosine_similarity(gradient, rough_gradient, dim=0) > 0.99


def test_n24_bf16_autocast_keeps_rotation_and_norms_in_fp32(make_model: Callable[..., Any]) -> None:
    check_n24(make_model())


def test_mutant_n24_rotation_in_bf16_is_killed(make_model: Callable[..., Any]) -> None:
    model = make_model()
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **options: tuple(
        part.bfloat16() for part in rotate(*args, **options)
    )
    with pytest.raises(AssertionError):
        check_n24(model)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_checkpointing_computes_again_and_changes_no_bit(
    job: Callable[..., Any], mode: str
) -> None:
    weights, forwards = [], []
    for is_on in (False, True):
        hyper = {"training_mode": mode, "gradient_checkpointing": is_on, "max_steps": 4}
        quiet = {"inference_interval": 0, "micro_eval_interval": 0}
        config = job(f"{mode}{is_on}", hyperparams=hyper, monitoring=quiet)
        engine = TrainerEngine()
        model, _ = engine.load_model(config)
        seen: list[bool] = []
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(True))
        assert engine.run_job(config).success
        forwards.append(len(seen))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))
    # Each of two blocks once more in each of 4 steps, and in the memory probe before them.
    assert forwards[1] - forwards[0] == 2 * (4 + 1)
