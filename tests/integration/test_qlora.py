"""QLoRA: adapters on a base that is quantized to nf4, from the first step to the merged model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.previews.test_published import (
    KEY,
    previews,
    remote,
    shown,
)
from tests.integration.serving import running_server
from tests.integration.test_resume_exact import check_same_state, resumed
from trainer.cli import main
from trainer.core.finished import open_run
from trainer.core.merging import export_merged
from trainer.errors import OutputError
from trainer.models.quantized import quantization_of

pytest.importorskip("bitsandbytes")
QLORA = {"training_mode": "qlora"}


@pytest.fixture
def plain(tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A plain model whose matrices are wide enough for blocks of 64."""
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    make_model(vocab_size=len(tokenizer), **size).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.slow
def test_a_sidecar_gets_the_quantized_base_and_says_what_local_previews_say(
    precision: str,
    train: Callable[..., Any],
    plain: Path,
    tmp_path: Path,
    patient: None,
) -> None:
    options: dict[str, Any] = {
        "model_path": str(plain),
        "hyperparams": {**QLORA, "fp_precision": precision},
    }
    local = train("local", **options)
    result = train("sidecar", monitoring={"preview_backend": "sidecar"}, **options)
    assert result.success, result.error_message
    rows = previews(tmp_path / "sidecar")
    assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
    assert len({row["weights_id"] for row in rows}) == 4
    if precision == "fp32":
        assert shown(tmp_path / "sidecar") == shown(tmp_path / "local")
    [one], [other] = (run.model_path.glob("*model.safetensors") for run in (local, result))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_server_that_quantizes_its_own_copy_is_sent_adapters_only(
    train: Callable[..., Any],
    plain: Path,
    tmp_path: Path,
    patient: None,
) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    flags = ("--model", str(plain), "--api-key-file", str(tmp_path / "keys"))
    options = {"model_path": str(plain), "hyperparams": QLORA}
    with running_server(*flags, "--quantize", "nf4") as server:
        result = train("remote", monitoring=remote(server, tmp_path), **options)
    assert result.success, result.error_message
    rows = previews(tmp_path / "remote")
    assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
    [saved] = result.model_path.glob("*model.safetensors")
    sent = result.summary["previews"]["bytes_sent"]
    assert sent == pytest.approx(4 * saved.stat().st_size, rel=0.1)
    with running_server(*flags) as server:
        result = train("refused", monitoring=remote(server, tmp_path), **options)
    assert result.exit_code == 2
    assert "--quantize nf4" in str(result.error_message)


@pytest.mark.long
def test_a_server_with_other_bits_is_sent_the_base_once(
    train: Callable[..., Any],
    plain: Path,
    make_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    patient: None,
) -> None:
    torch.manual_seed(5)
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    make_model(vocab_size=len(tokenizer), **size, seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "keys").write_text(f"{KEY}\n")
    flags = ("--model", str(tmp_path / "other"), "--api-key-file", str(tmp_path / "keys"))
    with running_server(*flags, "--quantize", "nf4") as server:
        result = train(
            "remote",
            monitoring=remote(server, tmp_path),
            model_path=str(plain),
            hyperparams=QLORA,
        )
    rows = previews(tmp_path / "remote")
    assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
    assert result.success, result.error_message


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    train: Callable[..., Any], plain: Path
) -> None:
    monitoring = {"inference_interval": 4, "micro_eval_interval": 3}
    straight, again = resumed(
        train, 5, model_path=str(plain), hyperparams=QLORA, monitoring=monitoring
    )
    last = "checkpoints/step-00000012"
    check_same_state(straight.output_dir / last, again.output_dir / last)


def test_the_built_in_model_trains_chats_and_is_merged(
    train: Callable[..., Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(model_path="tiny", hyperparams={**QLORA, "max_steps": 2})
    assert result.success, result.error_message
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 1 plus 1?\n"))
    assert main(["chat", str(result.output_dir), "--max-new-tokens", "3"]) == 0
    assert "no answer" not in capsys.readouterr().out
    assert main(["export", str(result.output_dir), "--merge"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained on a quantized base" in said
    assert "the base alone is" in said
    merged = open_run(result.output_dir / "merged_model")
    assert quantization_of(merged.model_config()) is None


@pytest.mark.slow
def test_the_merged_model_is_as_far_from_training_as_quantization_moves_the_base(
    train: Callable[..., Any], plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(model_path=str(plain), hyperparams=QLORA)
    report = export_merged(open_run(result.output_dir), result.output_dir / "one")
    assert report.quantization is not None
    moved, base = report.quantization
    assert 0.001 < moved < 2 * base
    assert report.merged < 1e-4
    monkeypatch.setattr("trainer.core.merging.MAX_QUANTIZATION", 0.01)
    with pytest.raises(OutputError, match="something else than in training"):
        export_merged(open_run(result.output_dir), result.output_dir / "two")
    assert not (result.output_dir / "two").exists()


def test_another_base_of_the_same_embeddings_is_found_out(
    train: Callable[..., Any], plain: Path, cli: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file, save_file

    result = train(model_path=str(plain), hyperparams={**QLORA, "max_steps": 1})
    record = json.loads((result.model_path / "base.json").read_text())
    assert record["quantized"]["while_loading"]
    path = plain / "model.safetensors"
    weights = {
        name: value if "embed" in name or "lm_head" in name else value + 0.05
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    done = cli("export", result.output_dir, "--merge")
    assert done.returncode == 2
    assert "is not the base that this adapter was trained on" in done.stderr


def family_config(name: str, vocab_size: int) -> Any:
    """Two layers of each family that quantizes in its own way."""
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if name == "gpt2":  # its layers are stored (in, out)
        names = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return t.GPT2Config(vocab_size=vocab_size, eos_token_id=2, pad_token_id=0, **names)
    if name == "gemma3":
        return t.Gemma3TextConfig(**sizes, head_dim=16, sliding_window=32)
    if name == "qwen2":  # biases
        return t.Qwen2Config(**sizes, tie_word_embeddings=True)
    if name == "phi3":  # one matrix for queries, keys and values
        return t.Phi3Config(**sizes)
    if name == "qwen3_moe":  # experts are no linear layers
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return t.Qwen3MoeConfig(**sizes, head_dim=16, **experts)
    return t.LlamaConfig(**sizes)


ATTENTION = {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen2", "phi3", "qwen3_moe"])
@pytest.mark.long
def test_each_family_trains_is_previewed_elsewhere_and_merged(
    name: str, train: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, len(tokenizer)))
    model.save_pretrained(tmp_path / "family")
    tokenizer.save_pretrained(tmp_path / "family")
    result = train(
        model_path=str(tmp_path / "family"),
        hyperparams={**QLORA, "max_steps": 3, "fp_precision": "bf16"},
        monitoring={"preview_backend": "sidecar"},
        lora=ATTENTION if name == "qwen3_moe" else {},
    )
    assert result.success, result.error_message
    rows = previews(tmp_path / "out")
    assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
    report = export_merged(open_run(result.output_dir), tmp_path / "merged")
    assert report.quantization is not None


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_weight(
    train: Callable[..., Any], plain: Path, assert_same_weights: Any
) -> None:
    options: dict[str, Any] = {"model_path": str(plain), "monitoring": {"inference_interval": 0}}
    one = train("one", hyperparams={**QLORA, "max_steps": 3}, **options)
    hyper = {**QLORA, "max_steps": 3, "gradient_checkpointing": True}
    two = train("two", hyperparams=hyper, **options)
    assert_same_weights(one.model_path, two.model_path)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapters_on_experts_are_previewed_here_and_refused_elsewhere(
    mode: str, train: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = family_config("qwen3_moe", len(tokenizer))
    config.output_router_logits = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    options: dict[str, Any] = {
        "model_path": str(tmp_path / "experts"),
        "hyperparams": {"training_mode": mode, "max_steps": 2, "fp_precision": "bf16"},
    }
    result = train("local", **options)
    assert result.success, result.error_message
    assert {row["error_message"] for row in previews(tmp_path / "local")} == {None}
    result = train("sidecar", monitoring={"preview_backend": "sidecar"}, **options)
    assert result.exit_code == 2
    assert "parameters of experts (model.layers.0.mlp" in str(result.error_message)
    assert not result.output_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    ["bf16", *(pytest.param(one, marks=pytest.mark.long) for one in ("auto", "fp32"))],
)
def test_a_server_of_any_dtype_proves_the_weights_of_a_bf16_run(
    dtype: str,
    train: Callable[..., Any],
    plain: Path,
    tmp_path: Path,
    patient: None,
) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    flags = ("--model", str(plain), "--api-key-file", str(tmp_path / "keys"))
    with running_server(*flags, "--quantize", "nf4", "--dtype", dtype) as server:
        result = train(
            "remote",
            model_path=str(plain),
            hyperparams={**QLORA, "fp_precision": "bf16"},
            monitoring=remote(server, tmp_path),
        )
    assert result.success, result.error_message
    rows = previews(tmp_path / "remote")
    assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
