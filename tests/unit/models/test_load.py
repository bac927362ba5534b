"""Names that people give for models, and what is refused before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.schema import LockedSection
from trainer.config.training_sections import LoraSection, ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.models import ALIASES, nearest_alias, resolve_alias
from trainer.models.adapters import add_lora
from trainer.models.load import (
    check_locked,
    check_vocabulary,
    load_model,
    load_tokenizer,
    read_model_config,
)


def test_aliases_stand_for_hub_ids_and_other_names_for_themselves() -> None:
    assert resolve_alias("Qwen3") == "Qwen/Qwen3-0.6B"
    assert resolve_alias("owner/name") == "owner/name"
    assert nearest_alias("qwen33") == "qwen3"
    assert all(alias.path for alias in ALIASES.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./absent", "there is no such folder"),
        ("./absent.gguf", "no such .gguf file"),
        ("qwen33", "Did you mean --model qwen3"),
        ("nobody/nothing", "not in the local cache"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        load_tokenizer(ModelSection(model_path=name), offline=True)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"holds notes\.txt"):
        load_model(ModelSection(model_path=str(tmp_path)), dtype=torch.float32)


def test_a_folder_loads_in_the_dtype_that_is_asked_for(model_folder: Path) -> None:
    section = ModelSection(model_path=str(model_folder))
    assert load_model(section, dtype=torch.bfloat16).dtype == torch.bfloat16
    eager = section.model_copy(update={"attn_implementation": "eager"})
    assert load_model(eager, dtype=torch.float32).config._attn_implementation == "eager"


def test_the_tiny_model_depends_on_its_seed_alone() -> None:
    section = ModelSection(model_path="tiny")
    one, two, other = (
        load_model(section, dtype=torch.float32, seed=seed).get_input_embeddings().weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_locked_values_that_differ_are_all_named(model_folder: Path) -> None:
    section = ModelSection(model_path=str(model_folder))
    config = read_model_config(section)
    locked = LockedSection(architecture="LlamaForCausalLM", context_length=1, vocab_size=2)
    with pytest.raises(ConfigError) as caught:
        check_locked(locked, section, config)
    for name in ("architecture", "context_length", "vocab_size"):
        assert f"locked.{name}" in str(caught.value)
    check_locked(LockedSection(architecture="Qwen3ForCausalLM"), section, config)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(ModelError, match="embedding has 64 rows"):
        check_vocabulary(make_model(vocab_size=64), tokenizer)


def test_a_lora_target_that_is_not_there_is_named(make_model: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"no module named nope\. Layers that take an adapter: down_proj"
    ):
        add_lora(make_model(), LoraSection(target_modules=("nope",)), seed=0)
