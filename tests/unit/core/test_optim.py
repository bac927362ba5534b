"""Optimizers: who steps which parameter, exactness against torch's own, saving and loading."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from trainer.config.training_sections import Hyperparams
from trainer.core import optim
from trainer.core.optim import Fp32Muon, MuonAdamW, build_optimizer
from trainer.errors import ConfigError

MakeModel = Callable[..., Any]


def hyperparams(optimizer: str, **values: Any) -> Hyperparams:
    return Hyperparams.model_validate({"optimizer": optimizer, "learning_rate": 1e-2, **values})


def train(model: Any, optimizers: list[Any], steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        ids = torch.randint(0, 303, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def named(model: Any, optimizer: torch.optim.Optimizer, algorithm: str) -> set[str]:
    ids = {
        id(p) for g in optimizer.param_groups if g["algorithm"] == algorithm for p in g["params"]
    }
    return {name for name, p in model.named_parameters() if id(p) in ids}


def assert_same_weights(a: Any, b: Any) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def saved(optimizer: Any) -> Any:
    """The state after a round trip through a file that may hold plain values only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def lora(model: Any, **options: Any) -> Any:
    targets = options.pop("target_modules", "all-linear")
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=False)
    optimizer = MuonAdamW(model, lr=1e-2)
    muon, adamw = named(model, optimizer, "muon"), named(model, optimizer, "adamw")
    assert muon == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= adamw


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["tied", "untied", "frozen", "lora", "gpt2"])
def test_every_trainable_parameter_is_in_exactly_one_group(
    make_model: MakeModel, name: str, kind: str
) -> None:
    model = make_model(tie_word_embeddings=kind not in {"untied", "lora"})
    if kind == "frozen":
        model.model.layers[0].requires_grad_(False)
    if kind == "lora":
        model = lora(model, modules_to_save=["lm_head"])
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=303, n_embd=32, n_layer=1, n_head=2))
    groups = build_optimizer(model, hyperparams(name)).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_step_equals_muon_and_adamw_run_apart_bit_for_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: has_bf16)
    one, apart = make_model(), make_model()
    train(one, [MuonAdamW(one, lr=1e-2, weight_decay=0.1)], steps=5)
    matrices = [p for n, p in apart.named_parameters() if ".layers." in n and p.ndim == 2]
    norms = [p for p in apart.parameters() if p.ndim == 1]
    rates: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    muon = (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rates)
        if has_bf16
        else Fp32Muon(matrices, **rates)
    )
    embedding = {"params": [apart.lm_head.weight], "weight_decay": 0.1}
    adamw = torch.optim.AdamW(
        [embedding, {"params": norms, "weight_decay": 0.0}], lr=1e-2, fused=True
    )
    train(apart, [muon, adamw], steps=5)
    assert_same_weights(one, apart)
    assert not torch.equal(one.lm_head.weight, make_model().lm_head.weight)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_loaded_and_continued_equals_straight_through(
    make_model: MakeModel, name: str
) -> None:
    straight = make_model()
    optimizer = build_optimizer(straight, hyperparams(name, weight_decay=0.1))
    train(straight, [optimizer], steps=3)
    resumed = copy.deepcopy(straight)
    state = saved(optimizer)
    train(straight, [optimizer], steps=3, start=3)
    again = build_optimizer(resumed, hyperparams(name, weight_decay=0.1))
    again.load_state_dict(state)
    train(resumed, [again], steps=3, start=3)
    assert_same_weights(straight, resumed)


def test_without_its_state_neither_part_continues_equally(make_model: MakeModel) -> None:
    straight = make_model()
    optimizer = MuonAdamW(straight, lr=1e-2)
    train(straight, [optimizer], steps=3)
    fresh = copy.deepcopy(straight)
    train(straight, [optimizer], steps=1, start=3)
    train(fresh, [MuonAdamW(fresh, lr=1e-2)], steps=1, start=3)
    moved = [
        n
        for (n, p), q in zip(straight.named_parameters(), fresh.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert {"lm_head.weight", "model.embed_tokens.weight"} & set(moved)
    assert any(".layers." in n for n in moved)


def test_a_scheduler_acts_on_both_parts(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = MuonAdamW(model, lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    before = copy.deepcopy(model)
    train(model, [optimizer], steps=1)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert all(
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )
    frozen = copy.deepcopy(model)
    train(model, [optimizer], steps=1, start=1)
    assert_same_weights(model, frozen)


def test_a_scheduler_still_acts_after_loading_a_state(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = MuonAdamW(model, lr=1e-2)
    optimizer.load_state_dict(saved(optimizer))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    train(model, [optimizer], steps=1)
    assert_same_weights(model, before)


def test_a_copied_optimizer_steps_its_own_copy(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = MuonAdamW(model, lr=1e-2)
    train(model, [optimizer], steps=2)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    train(model, [optimizer], steps=1, start=2)
    train(model_copy, [optimizer_copy], steps=1, start=2)
    assert_same_weights(model, model_copy)


def test_accelerate_wraps_it_without_changing_a_step(make_model: MakeModel) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, in one process
    plain, wrapped = make_model(), make_model()
    train(plain, [MuonAdamW(plain, lr=1e-2)], steps=3)
    prepared, optimizer = Accelerator(cpu=True).prepare(wrapped, MuonAdamW(wrapped, lr=1e-2))
    train(prepared, [optimizer], steps=3)
    assert_same_weights(plain, wrapped)


def test_hf_trainer_accepts_it_as_a_factory(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to=[], save_strategy="no"
    )
    ids = list(range(3, 15))
    rows = [{"input_ids": ids, "labels": ids}] * 16
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(lambda: MuonAdamW, {"lr": 1e-2}),
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, MuonAdamW)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0] * 3
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    assert [name for (name, p), q in pairs if torch.equal(p, q)] == []


def test_the_closure_is_called_once_and_its_loss_returned(make_model: MakeModel) -> None:
    model, calls = make_model(), []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        model(input_ids=torch.arange(9)[None]).logits.sum().backward()
        return 1.5

    assert MuonAdamW(model, lr=1e-2).step(closure) == 1.5
    assert calls == [1]


def test_muon_trains_adapters_and_nothing_else(make_model: MakeModel) -> None:
    model = lora(make_model())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(model, hyperparams("muon"))
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon"]
    ids = torch.arange(3, 27).reshape(2, 12)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert saved(optimizer)["state"].keys() == set(range(len(optimizer.param_groups[0]["params"])))


def test_adapters_of_the_head_go_to_adamw(make_model: MakeModel) -> None:
    model = lora(make_model(tie_word_embeddings=False), target_modules=["q_proj", "lm_head"])
    optimizer = MuonAdamW(model, lr=1e-2)
    adamw = named(model, optimizer, "adamw")
    assert len(adamw) == 2
    assert all("lm_head" in name for name in adamw)


def test_muon_without_a_matrix_to_train_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"hyperparams\.optimizer=muon .* use adamw"):
        build_optimizer(model, hyperparams("muon"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_are_not_decayed(make_model: MakeModel, name: str) -> None:
    model = make_model(attention_bias=True)
    optimizer = build_optimizer(model, hyperparams(name, weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for key, parameter in model.named_parameters():
        is_plain = "norm" in key or key.endswith("bias")
        assert decay[id(parameter)] == (0.0 if is_plain else 0.1), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_configs_values_reach_the_groups(make_model: MakeModel, name: str) -> None:
    values = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    optimizer = build_optimizer(make_model(), hyperparams(name, **values))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    adamw = [g for g in optimizer.param_groups if g.get("algorithm", "adamw") == "adamw"]
    assert all((g["betas"], g["eps"], g["fused"]) == ((0.8, 0.95), 1e-6, True) for g in adamw)
    assert adamw


class HeadNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 8))  # one row per attention head


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.ones(2, 8, 8))
        self.up_proj_bias = torch.nn.Parameter(torch.ones(2, 8))


def test_norms_and_biases_of_two_dimensions_are_not_decayed_and_not_for_muon() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), HeadNorm(), Experts())
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.1)
    groups = [
        ({n for n, p in model.named_parameters() if any(p is q for q in g["params"])}, g)
        for g in optimizer.param_groups
    ]
    found = [(names, group["algorithm"], group["weight_decay"]) for names, group in groups]
    assert found == [
        ({"0.weight"}, "muon", 0.1),
        ({"2.up_proj"}, "adamw", 0.1),
        ({"1.weight", "2.up_proj_bias"}, "adamw", 0.0),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8_bit_adamw_keeps_matrices_in_8_bits_and_embeddings_in_32(make_model: MakeModel) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes leaves parameters below 4096 elements in 32 bits.
    model = make_model(hidden_size=128, intermediate_size=128, head_dim=32).cuda()
    optimizer = build_optimizer(model, hyperparams("adamw_8bit"))
    ids = torch.arange(12, device="cuda")[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert optimizer.state[model.model.layers[0].mlp.up_proj.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32
    assert saved(optimizer).keys() == {"state", "param_groups"}
