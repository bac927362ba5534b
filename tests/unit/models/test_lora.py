"""Adapters: what is trained is fp32, what is merged says the same, the base is found again."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.training_sections import LoraSection
from trainer.errors import ConfigError
from trainer.models.adapter_files import load_finished_model
from trainer.models.adapters import add_lora
from trainer.models.precision import resolve_precision

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CPU = torch.device("cpu")


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("more", [(), ("lm_head", "norm")])
def test_all_that_is_trained_is_fp32_on_a_half_precision_base(
    make_model: Callable[..., Any], more: tuple[str, ...]
) -> None:
    base = make_model(tie_word_embeddings=False).to(torch.bfloat16)
    model = add_lora(base, LoraSection(modules_to_save=more), seed=0)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    names = " ".join(trained(model))
    assert all(f"{name}.modules_to_save" in names for name in more)


def moved_share(model: Any, learning_rate: float = 2e-5) -> float:
    """Share of the trained weights that ten steps of AdamW change."""
    before = [p.detach().clone() for p in trained(model).values()]
    optimizer = torch.optim.AdamW(trained(model).values(), lr=learning_rate, weight_decay=0.0)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = list(zip(trained(model).values(), before, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for b in before)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_n25_updates_survive_the_dtype(make_model: Callable[..., Any], mode: Any) -> None:
    assert check_n25(make_model, mode, resolve_precision("bf16", mode, CPU).load_dtype) >= 0.95


def check_n25(make_model: Callable[..., Any], mode: str, dtype: torch.dtype) -> float:
    """Moved weights under the run's dtypes as a share of those that an fp32 run moves."""
    shares = []
    for load_dtype in (dtype, torch.float32):
        model = make_model(tie_word_embeddings=False).to(load_dtype)
        if mode == "lora":
            model = add_lora(model, LoraSection(modules_to_save=("lm_head",)), seed=0)
        shares.append(moved_share(model))
    return shares[0] / shares[1]


def test_mutant_n25_pure_bf16_is_killed(make_model: Callable[..., Any]) -> None:
    assert check_n25(make_model, "full", torch.bfloat16) < 0.95


@pytest.fixture
def adapter(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A run's folder with an adapter that was moved off zero, beside the base it saved."""
    run = tmp_path / "run"
    base = make_model(tie_word_embeddings=False)
    base.save_pretrained(run / "base_model")
    base.config._name_or_path = base.name_or_path = str(run / "base_model")
    model = add_lora(base, LoraSection(), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(trained(model).values()):
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(number)
            )
    model.save_pretrained(run / "final_model")
    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def check_n21(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_finished_model(adapter / "final_model")
    said = logits(model)
    assert (said - logits(load_finished_model(adapter / "final_model"))).abs().max() == 0
    plain = AutoModelForCausalLM.from_pretrained(adapter / "base_model", dtype=torch.float32)
    assert (said - logits(plain)).abs().max() > 1e-2  # the adapter says something
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert ((said - merged).norm() / said.norm()) < 2e-6


def test_n21_adapter_merged_and_reloaded_say_the_same(adapter: Path, tmp_path: Path) -> None:
    check_n21(adapter, tmp_path)


def test_mutant_n21_scale_left_out_is_killed(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(
        Linear, "get_delta_weight", lambda self, name: delta(self, name) / self.scaling[name]
    )
    with pytest.raises(AssertionError):
        check_n21(adapter, tmp_path)


def test_a_moved_run_finds_the_base_that_it_saved_itself(adapter: Path, tmp_path: Path) -> None:
    said = logits(load_finished_model(adapter / "final_model"))
    moved = tmp_path / "elsewhere" / "run"
    shutil.move(adapter, moved)
    assert torch.equal(said, logits(load_finished_model(moved / "final_model")))


def test_the_adapter_names_the_revision_of_its_base(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = add_lora(make_model(), LoraSection(), seed=0, revision="v1.2")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1.2"


def test_the_base_is_loaded_at_the_revision_that_was_trained(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.models.adapter_files as adapters

    path = adapter / "final_model" / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "revision": "v1.2"}))
    asked = []
    real = adapters.load_model

    def note(section: Any, **options: Any) -> Any:
        asked.append(section.revision)
        return real(section.model_copy(update={"revision": None}), **options)

    monkeypatch.setattr(adapters, "load_model", note)
    load_finished_model(adapter / "final_model")
    assert asked == ["v1.2"]


@pytest.fixture
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=303))


def test_all_linear_adapts_the_layers_of_gpt2(gpt2: Any) -> None:
    model = add_lora(gpt2, LoraSection(), seed=0)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(model)}
    assert adapted == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "lm_head"), ("wte", "c_fc")])
def test_layers_of_gpt2_are_adapted_by_name_without_a_warning(
    gpt2: Any, targets: tuple[str, ...], recwarn: pytest.WarningsRecorder
) -> None:
    model = add_lora(gpt2, LoraSection(target_modules=targets), seed=0)
    names = " ".join(trained(model))
    assert all(f"{target}.lora_" in names for target in targets)
    assert not [one for one in recwarn if "fan_in_fan_out" in str(one.message)]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"target_modules": ("q_proj",)}, "no module named q_proj.*c_attn, c_fc, c_proj, lm_head"),
        ({"target_modules": ("c_atn",)}, "Did you mean c_attn"),
        ({"target_modules": ("ln_1",)}, "ln_1 is a LayerNorm, which takes no adapter"),
        ({"modules_to_save": ("nope",)}, "modules_to_save: the model has no module named nope"),
        (
            {"target_modules": ("wte", "c_fc"), "modules_to_save": ("wte",)},
            "in target_modules and in modules_to_save",
        ),
    ],
)
def test_wrong_names_are_answered_with_those_that_exist(
    gpt2: Any, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        add_lora(gpt2, LoraSection(**section), seed=0)


def test_layers_are_chosen_by_number_in_gpt2_and_beside_experts(gpt2: Any) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=303,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        )
    )
    for model, targets, layers in (
        (gpt2, "all-linear", (1,)),
        (moe, "all-linear", (0, 2)),
        (moe, ("q_proj",), (2,)),
    ):
        section = LoraSection(layers_to_transform=layers, target_modules=targets)
        names = list(trained(add_lora(copy.deepcopy(model), section, seed=0)))
        found = {int(re.findall(r"\.(?:h|layers)\.(\d+)\.", name)[0]) for name in names}
        assert found == set(layers)
        assert not any("lm_head" in name for name in names)


def test_all_linear_of_some_layers_is_all_linear_there(make_model: Callable[..., Any]) -> None:
    whole = set(trained(add_lora(make_model(), LoraSection(), seed=0)))
    part = set(trained(add_lora(make_model(), LoraSection(layers_to_transform=(0,)), seed=0)))
    assert part == {name for name in whole if ".layers.0." in name}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"modules_to_save": ("wte",)}, "requested `ensure_weight_tying`"),
        ({"target_modules": ("wte",)}, "none of transformer.wte, lm_head is in lora.modules"),
    ],
)
def test_a_tie_that_peft_would_not_keep_is_an_error(
    gpt2: Any, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        add_lora(gpt2, LoraSection(ensure_weight_tying=True, **section), seed=0)
