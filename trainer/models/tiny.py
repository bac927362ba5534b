"""The built-in model `tiny`: an untrained Qwen3 of about 0.8M parameters, and its tokenizer.

The tokenizer's files lie beside this module; `make_tiny_tokenizer.py` made them.
Nothing here needs a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TINY_TOKENIZER_DIR = Path(__file__).with_name("tiny_tokenizer")


def load_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Load the byte-level BPE tokenizer of the tiny model: ChatML, digits apart.

    Returns:
        A fresh tokenizer; `<|im_end|>` ends a turn, `<|endoftext|>` pads, no token begins a text.
    """
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        str(TINY_TOKENIZER_DIR), local_files_only=True
    )
    return tokenizer


def tiny_config(*, vocab_size: int | None = None) -> Qwen3Config:
    """The tiny model's config.

    Args:
        vocab_size: rows of the embedding; as many as the tiny tokenizer has tokens by default.
    """
    tokenizer = load_tiny_tokenizer()
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3Config(
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        **special,
    )


def build_tiny_model(*, seed: int, vocab_size: int, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Build the tiny model on the CPU with random weights that depend on the seed alone.

    Args:
        seed: the same seed gives the same weights, whatever was drawn before.
        vocab_size: rows of the embedding; at least the tokenizer's number of tokens.
        dtype: the weights are drawn in fp32 and then cast, so every dtype gets the same ones.
    """
    config = tiny_config(vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # NOTE: not torch.manual_seed, which would seed the GPUs' generators too.
        torch.default_generator.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.config.dtype = dtype
    model.to(dtype)
    return model
