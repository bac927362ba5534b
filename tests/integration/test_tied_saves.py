"""N22: a tied head is saved once: final model, checkpoint, the base that a run keeps, merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.core.merging import export_merged
from trainer.core.training import save_final_model
from trainer.models import precision
from trainer.models.precision import DTYPES

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
TIED: dict[str, dict[str, Any]] = {
    "qwen3": SMALL,
    "qwen2": SMALL,
    "llama": SMALL,
    "mistral": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "phi3": SMALL,
    "granite": SMALL,
    "smollm3": SMALL,
    "olmo2": SMALL,
    "cohere": SMALL,
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "gpt_neox": SMALL,
}


def tied_model(family: str, dtype: torch.dtype, vocab_size: int = 303) -> Any:
    options = {**TIED[family], "vocab_size": vocab_size, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).to(dtype)


def content(folder: Path) -> tuple[set[str], int]:
    """Names of all tensors of a model folder, and the bytes of their files."""
    names: set[str] = set()
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
        size += path.stat().st_size
    return names, size


def check_saved_once(family: str, tokenizer: Any, tmp_path: Path, name: str = "bf16") -> None:
    """What an fp32 run saves in half precision is as large as the base in that dtype."""
    tied_model(family, DTYPES[name]).save_pretrained(tmp_path / "base")
    save_final_model(
        tied_model(family, torch.float32),
        tokenizer,
        tmp_path / "final",
        dtype=DTYPES[name],
        stop_ids=frozenset({2}),
        use_cache=True,
    )
    base, final = content(tmp_path / "base"), content(tmp_path / "final")
    assert final == base
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.dtype == DTYPES[name]


@pytest.mark.parametrize("family", TIED)
def test_n22_a_tied_head_is_saved_once(family: str, tokenizer: Any, tmp_path: Path) -> None:
    check_saved_once(family, tokenizer, tmp_path)


def test_n22_a_tied_head_is_saved_once_in_fp16(tokenizer: Any, tmp_path: Path) -> None:
    check_saved_once("qwen3", tokenizer, tmp_path, "fp16")


def test_mutant_n22_tensors_cast_one_by_one_is_killed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        precision, "cast_state", lambda state, dtype: {k: v.to(dtype) for k, v in state.items()}
    )
    with pytest.raises(AssertionError):
        check_saved_once("gemma3_text", tokenizer, tmp_path)


def test_tensors_that_share_no_memory_stay_apart() -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64)}
    state |= {"view": state["a"][:1], "same": state["a"]}
    cast = precision.cast_state(state, torch.bfloat16)
    assert cast["same"] is cast["a"]
    assert len({id(cast[name]) for name in ("a", "b", "view")}) == 3
    assert cast["n"].dtype == torch.int64


def test_a_sharded_save_holds_every_tensor_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tied_model("qwen3", torch.float32)
    save = model.save_pretrained
    monkeypatch.setattr(
        model, "save_pretrained", lambda *a, **k: save(*a, max_shard_size="16KB", **k)
    )
    options: dict[str, Any] = {"stop_ids": frozenset({2}), "use_cache": True}
    save_final_model(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16, **options)
    assert len(list((tmp_path / "final").glob("*.safetensors"))) > 1
    names, _ = content(tmp_path / "final")
    assert "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    wanted = model.bfloat16().float().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_bf16_run_writes_the_tied_head_nowhere_twice(
    mode: str, train: Callable[..., Any]
) -> None:
    from trainer.core.finished import open_run

    hyper = {"training_mode": mode, "fp_precision": "bf16", "max_steps": 1}
    quiet = {"inference_interval": 0, "micro_eval_interval": 0}
    result = train(mode, model_path="tiny", hyperparams=hyper, monitoring=quiet)
    assert result.success, result.error_message
    folders = [result.model_path, result.checkpoint_path]
    if mode == "lora":
        export_merged(open_run(result.output_dir), result.output_dir / "merged_model")
        folders += [result.output_dir / "base_model", result.output_dir / "merged_model"]
    for folder in folders:
        assert "lm_head.weight" not in content(folder)[0], folder
    if mode == "lora":
        assert content(folders[2]) == content(folders[3])  # base and merged


def test_adapters_on_a_tied_head_resume_without_a_copy_of_it(
    train: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    names = ("lm_head", "embed_tokens", "v_proj")
    options: dict[str, Any] = {
        "hyperparams": {"training_mode": "lora", "max_steps": 4},
        "monitoring": {"inference_interval": 0, "micro_eval_interval": 0},
        "lora": {"target_modules": names},
    }
    keep = {"checkpoint_interval": 2, "keep_checkpoints": 9}
    straight = train("straight", **options, output=keep)
    assert straight.success, straight.error_message
    found, _ = content(straight.output_dir / "checkpoints" / "step-00000002")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in found} == set(names)
    newest = straight.checkpoint_path
    again = straight.output_dir.parent / "again"
    shutil.copytree(straight.output_dir, again)
    shutil.rmtree(again / "checkpoints" / newest.name)
    shutil.rmtree(again / "final_model")
    resumed = train("again", **options, output={**keep, "resume": "latest"})
    assert resumed.success, resumed.error_message
    assert_same_weights(resumed.model_path, straight.model_path)
