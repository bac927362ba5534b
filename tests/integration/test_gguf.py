"""LoRA on a .gguf file: what is unpacked once is not unpacked again, and no wait is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import run_job
from trainer.core import preparation
from trainer.models import load

pytestmark = pytest.mark.slow


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """A model and its tokenizer as llama.cpp's converter writes them, unquantized."""
    import gguf

    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([int(kinds[token in special]) for token in tokens])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(make_model(vocab_size=len(tokenizer), head_dim=128), tokenizer, path)
    return path


def test_a_resume_reads_the_unpacked_base_and_goes_on_bit_for_bit(
    job: Callable[..., Any],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_weights: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def options(steps: int, **output: Any) -> dict[str, Any]:
        return {
            "model_path": str(file),
            "hyperparams": {
                "training_mode": "lora",
                "max_steps": steps,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
            },
            "monitoring": {"inference_interval": 0, "final_eval_prompts": 3},
            "output": output,
        }

    straight = run_job(job("straight", **options(4)))
    assert straight.success, straight.error_message
    assert straight.model_path is not None
    out = capsys.readouterr().out
    assert f"unpacking {file}" in out
    assert "final evaluation: answering 3 prompts" in out
    assert "final evaluation: 0 of 3 answers match (0.0 %), all in" in out
    card = (straight.model_path / "README.md").read_text()
    assert "More Information Needed" not in card
    for words in ("library_name: peft", "rank 16, alpha 32", "| steps | 4 of 4 |", "base_model/"):
        assert words in card, card
    assert "final evaluation: 0 of 3 answers match" in card
    assert not list(straight.output_dir.glob("checkpoints/*/README.md"))
    assert run_job(job("halves", **options(2)), display="off").success

    def unpacked_again(*_: Any) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(load, "_gguf_source", unpacked_again)
    again = run_job(job("halves", **options(4, resume="latest")))
    assert again.success, again.error_message
    assert f"loading {tmp_path / 'halves' / 'base_model'}" in capsys.readouterr().out
    assert_same_weights(straight.model_path, again.model_path)


def test_an_unpacked_base_is_whole_or_not_there(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = make_model(), tmp_path / "base_model"
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparation._save_base(model, tokenizer, folder)
    assert list(tmp_path.iterdir()) == []
