"""An adapter is trained on as it was built, from exactly its weights, and on its own base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file

from trainer.config.training_sections import LoraSection, ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.models.adapter_files import describe_base, save_adapter
from trainer.models.adapters import add_lora
from trainer.models.load import load_model, read_model_config
from trainer.models.train_on import (
    adapter_of,
    adapter_options,
    base_section,
    load_base,
    train_on,
)
from trainer.publish.identity import adapter_config, adapter_tensors

BUILT = {"r": 3, "alpha": 7.0, "dropout": 0.1, "use_rslora": True}


@pytest.fixture
def base(make_model: Callable[..., Any], tmp_path: Path) -> Any:
    folder = tmp_path / "base"
    make_model(tie_word_embeddings=False).save_pretrained(folder)
    return load_model(ModelSection(model_path=str(folder)), dtype=torch.float32)


@pytest.fixture
def adapter(base: Any, tmp_path: Path) -> Path:
    """With weights that bf16 cannot hold."""
    record = describe_base(base)
    model = add_lora(base, LoraSection(**BUILT, modules_to_save=("lm_head",)), seed=0)
    model.base_record = record
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def begin(folder: Path, dtype: torch.dtype = torch.float32, **given: Any) -> tuple[Any, Any]:
    section = ModelSection(model_path=str(folder))
    assert adapter_of(section) == folder
    where = base_section(section)
    options = adapter_options(LoraSection(**given), folder, read_model_config(where))
    model, record = load_base(
        section, dtype=dtype, seed=0, offline=False, device=torch.device("cpu")
    )
    assert record["name"] == where.model_path
    return train_on(model, folder, options, seed=1), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_begins_with_exactly_the_adapters_weights(
    adapter: Path, dtype: torch.dtype
) -> None:
    before = torch.get_rng_state()
    model, _ = begin(adapter, dtype)
    assert torch.equal(before, torch.get_rng_state())
    found, saved = adapter_tensors(model), load_file(adapter / "adapter_model.safetensors")
    assert len(found) == len(saved)
    for name, value in saved.items():
        mine = found[name.replace("lm_head.", "lm_head.modules_to_save.")]
        assert mine.dtype == torch.float32
        assert mine.requires_grad
        assert torch.equal(mine, value), name
    assert sum(one.requires_grad for one in model.parameters()) == len(found)
    assert model.peft_config["default"].base_model_name_or_path == model.config._name_or_path


def test_the_adapter_says_how_it_is_built(adapter: Path) -> None:
    _, options = begin(adapter)
    assert (options.r, options.alpha, options.dropout) == (3, 7.0, 0.1)
    assert options.use_rslora
    assert options.modules_to_save == ("lm_head",)
    model, options = begin(adapter, dropout=0.25, neftune_alpha=2.0)
    assert (options.dropout, options.neftune_alpha) == (0.25, 2.0)
    assert model.peft_config["default"].lora_dropout == 0.25


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"r": 16}, r"lora\.r=16 \(the adapter: 3\)"),
        ({"alpha": 32}, r"lora\.alpha=32\.0 \(the adapter: 7\.0\)"),
        ({"use_rslora": False}, r"lora\.use_rslora=False"),
        ({"use_dora": True}, r"lora\.use_dora=True"),
        ({"target_modules": ("q_proj",)}, r"lora\.target_modules=\('q_proj',\)"),
        ({"modules_to_save": ()}, r"lora\.modules_to_save=\(\)"),
    ],
)
def test_an_option_that_says_something_else_is_refused_where_it_was_given(
    adapter: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(adapter, **given)


def test_an_option_that_says_the_same_is_none(adapter: Path) -> None:
    same = {"r": 3, "target_modules": "all-linear", "modules_to_save": ("lm_head",)}
    begin(adapter, **same)
    begin(adapter, **{**same, **begin(adapter)[1].model_dump()})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LoraConfig(r=2, bias="all", target_modules=["q_proj"]), "bias='all'"),
        (LoraConfig(r=2, target_modules=r".*\.q_proj"), "target_modules='.*q_proj'"),
        (LoraConfig(r=2, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(r=2, lora_bias=True), "lora_bias=True"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    base: Any, tmp_path: Path, kind: Any, words: str
) -> None:
    kind.base_model_name_or_path = str(tmp_path / "base")
    kind.save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match=words):
        begin(tmp_path / "odd")


def test_ranks_and_scales_of_single_modules_are_kept_and_told(base: Any, tmp_path: Path) -> None:
    patterns: Any = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **patterns)
    get_peft_model(base, config).save_pretrained(tmp_path / "odd")
    model, _ = begin(tmp_path / "odd")
    sent = adapter_config(model)
    assert sent.ranks == {f"model.layers.{n}.self_attn.q_proj": 5 for n in (0, 1)}
    assert sent.alphas == {"model.layers.0.mlp.up_proj": 3}


def test_another_base_or_none_is_refused(
    adapter: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model(tie_word_embeddings=False, seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="is not the base that this adapter was trained on"):
        begin(adapter)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="base_model_name_or_path") as refused:
        begin(adapter)
    assert "--base" not in str(refused.value)


def test_weights_of_another_shape_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4}))
    with pytest.raises(ModelError, match="does not fit"):
        begin(adapter)


def test_weights_that_are_not_there_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    saved = json.loads(path.read_text())
    more = [*saved["target_modules"], "embed_tokens"]
    path.write_text(json.dumps({**saved, "target_modules": more}))
    with pytest.raises(ModelError, match="on one side only"):
        begin(adapter)
