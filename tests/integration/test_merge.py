"""N21: what `trainer export --merge` writes says what the adapter says, or nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainer.cli import main
from trainer.config.training_sections import LoraSection, ModelSection
from trainer.core import merging
from trainer.core.finished import open_run
from trainer.core.merging import export_merged
from trainer.errors import ConfigError, OutputError
from trainer.models import adapters
from trainer.models.adapter_files import describe_base, save_adapter
from trainer.models.adapters import add_lora
from trainer.models.load import add_tokens, grow_embeddings, load_model

IDS = torch.tensor([[5, 60, 7, 80, 9, 110, 250, 3]])
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SMALL,
    "llama": SMALL,
    "gemma3_text": {**SMALL, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SMALL,
    "phi": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "pad_token_id": 0},
    "qwen3_moe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
TARGETS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ("lm_head",)},
    "embedding": {"target_modules": ("EMBEDDING",)},
    "both": {"target_modules": ("lm_head", "EMBEDDING")},
    "all-linear": {},
    "saved head": {"modules_to_save": ("lm_head",)},
}


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """A function that saves a small model of a family, its head tied to the embedding or not."""

    def make(family: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
        from transformers import AutoConfig

        folder = tmp_path / f"{family}-{tied}"
        options = {**FAMILIES[family], "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def adapter_on(
    base: Path, folder: Path, tokenizer: Any, *, tokens: Sequence[str] = (), **section: Any
) -> Path:
    """An adapter whose weights were moved off zero, as a run saves it, with rows for tokens."""
    model = load_model(ModelSection(model_path=str(base)), dtype=torch.float32)
    name = "wte" if base.name.startswith("gpt2") else "embed_tokens"
    for key, names in section.items():
        if isinstance(names, bool):
            continue
        section[key] = tuple(name if one == "EMBEDDING" else one for one in names)
    record = describe_base(model)
    ids = []
    if tokens:
        tokenizer = copy.deepcopy(tokenizer)
        add_tokens(tokenizer, tokens)
        ids = tokenizer.convert_tokens_to_ids(list(tokens))
        grow_embeddings(model, ids)
    adapted = add_lora(model, LoraSection(**section), seed=0, token_ids=ids)
    adapted.base_record = record
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    save_adapter(adapted, folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def check_merge(adapter: Path) -> Any:
    """Plain PEFT on the adapter and plain transformers on the merged folder say the same."""
    merged = adapter / "merged_model"
    report = export_merged(open_run(adapter), merged)
    said = logits(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert (said - logits(plain)).abs().max() < 1e-5
    assert report.merged < 1e-5
    return plain


CASES = [("qwen3", tied, target) for tied in (True, False) for target in TARGETS]
CASES += [(name, True, key) for name in ("gpt2", "gemma3_text") for key in list(TARGETS)[:3]]


@pytest.mark.parametrize(("family", "tied", "target"), CASES)
def test_n21_a_merge_says_what_the_adapter_says(
    family: str, tied: bool, target: str, base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    folder = base(family, tied=tied)
    plain = check_merge(adapter_on(folder, tmp_path / "a", tokenizer, **TARGETS[target]))
    assert plain.config.tie_word_embeddings == (tied and target == "all-linear")


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_n21_other_families_too(
    family: str, base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    check_merge(adapter_on(base(family), tmp_path / "a", tokenizer, **TARGETS["both"]))


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"use_rslora": True, "target_modules": ["lm_head", "v_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]},
    ],
    ids=["dora", "rslora", "experts"],
)
def test_n21_adapters_made_by_plain_peft_are_merged_too(
    more: dict[str, Any], base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    family = "qwen3_moe" if "target_parameters" in more else "qwen3"
    model = AutoModelForCausalLM.from_pretrained(base(family))
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **more))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape)
    adapted.save_pretrained(tmp_path / "a")  # without tokenizer and base.json
    check_merge(tmp_path / "a")


TOKENS = ("<<x>>", "<<y>>")
ENDS = [("qwen3", True), ("qwen3", False), ("llama", False), ("gemma3_text", True), ("gpt2", True)]


@pytest.mark.parametrize(("family", "tied"), ENDS)
def test_n21_rows_of_added_tokens_are_merged_too(
    family: str, tied: bool, base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    """In embedding and head; the base on disk has none of them."""
    folder = base(family, tied=tied)
    adapter = adapter_on(folder, tmp_path / "a", tokenizer, tokens=TOKENS, use_dora=True)
    plain = check_merge(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    rows = [value for name, value in sorted(saved.items()) if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2)
    assert plain.config.tie_word_embeddings == tied
    head, embedding = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    for weight, wanted in zip((head, embedding), rows if not tied else rows * 2, strict=True):
        assert torch.equal(weight[-2:], wanted)
    assert len(embedding) == len(tokenizer) + 2


def test_rows_that_the_base_has_to_spare_are_used(
    base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    few = copy.deepcopy(tokenizer)
    add_tokens(few, ["<<u>>", "<<v>>", "<<w>>"])  # the model was made for these, and gets them anew
    folder = base("llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(few), mean_resizing=False)
    model.save_pretrained(folder)
    adapter = adapter_on(folder, tmp_path / "a", tokenizer, tokens=TOKENS)
    export_merged(open_run(adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == len(few)


def test_mutant_n21_a_head_without_its_new_rows_is_killed(
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    adapter = adapter_on(base("qwen3", tied=False), tmp_path / "a", tokenizer, tokens=TOKENS)
    merge = TrainableTokensLayer.merge

    def embedding_only(self: Any, *args: Any, **options: Any) -> None:
        if isinstance(self.base_layer, torch.nn.Embedding):
            merge(self, *args, **options)

    monkeypatch.setattr(TrainableTokensLayer, "merge", embedding_only)
    refused(adapter, tmp_path, "would say something else than the adapter")


@pytest.mark.parametrize(
    ("family", "section", "words"),
    [
        ("phi", {}, "rows of single tokens cannot be trained in the head of a PhiForCausalLM"),
        ("qwen3", {"target_modules": ("lm_head",)}, "lora.target_modules or .* has lm_head"),
        ("qwen3", {"modules_to_save": ("embed_tokens",)}, "embed_tokens; leave it out there"),
    ],
)
def test_rows_that_cannot_be_trained_alone_are_refused(
    family: str,
    section: dict[str, Any],
    words: str,
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    folder = base(family, tied=family != "phi")
    with pytest.raises(ConfigError, match=words):
        adapter_on(folder, tmp_path / "a", tokenizer, tokens=TOKENS, **section)


def test_rounding_to_the_runs_dtype_is_said(
    base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    adapter = adapter_on(base("qwen3", dtype=torch.bfloat16), tmp_path / "a", tokenizer)
    report = export_merged(open_run(adapter), tmp_path / "merged")
    assert report.dtype == torch.bfloat16
    assert 1e-4 < report.rounded < 0.1
    assert "rounding to bfloat16 moves them by" in report.words()


def refused(adapter: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        export_merged(open_run(adapter), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_mutant_n21_one_tensor_merged_twice_is_killed(
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = adapter_on(base("qwen3"), tmp_path / "a", tokenizer, **TARGETS["head"])
    monkeypatch.setattr(adapters, "_untie_adapted", lambda model: None)
    refused(adapter, tmp_path, "would say something else than the adapter")


def test_mutant_n21_merge_without_scale_is_killed(
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    adapter = adapter_on(base("gpt2"), tmp_path / "a", tokenizer)
    monkeypatch.setattr(
        Linear, "get_delta_weight", lambda self, name: delta(self, name) / self.scaling[name]
    )
    refused(adapter, tmp_path, "would say something else than the adapter")


def test_mutant_n22_stale_tie_flag_is_killed(
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = adapter_on(base("gemma3_text"), tmp_path / "a", tokenizer, **TARGETS["embedding"])
    write = merging.write_model

    def with_stale_flag(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        write(model, tokenizer, folder, **options)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    monkeypatch.setattr(merging, "write_model", with_stale_flag)
    refused(adapter, tmp_path, "loaded again, says something else")


def test_weights_that_fp16_cannot_hold_are_not_written(
    base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    folder = base("llama", dtype=torch.float16)
    adapter = adapter_on(folder, tmp_path / "a", tokenizer, target_modules=("q_proj",))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e8}))
    refused(adapter, tmp_path, "rounding the merged weights")


@pytest.mark.parametrize("target", ["head", "both"])
def test_an_adapter_holds_no_copy_of_the_embedding(
    target: str, base: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    adapter = adapter_on(base("qwen3"), tmp_path / "a", tokenizer, **TARGETS[target])
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118


def test_a_merge_prints_what_was_compared(
    base: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = adapter_on(base("qwen3"), tmp_path / "a", tokenizer)
    assert main(["export", str(adapter), "--merge", "--output", str(tmp_path / "merged")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "merged and adapter differ by" in printed
    assert "loaded again it is the same" in printed
