"""What the stages of `benchmarks/gpu.py` work with: sizes, models with random weights, rows."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.arms import Task


class SkippedError(Exception):
    """The stage cannot run here; why."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    shapes: Mapping[str, Mapping[str, int]]
    """Model -> what its Qwen3Config is given."""
    packs: Mapping[str, int]
    """Model -> packs in a batch."""
    max_length: int
    steps: int
    warm_steps: int
    num_rows: int
    every_steps: int
    """Between previews."""
    num_prompts: tuple[int, ...]
    """Batches of the generation stage."""
    new_tokens: int


FULL = Sizes(
    shapes={
        "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    },
    packs={"0.6B": 4, "1.7B": 2},
    max_length=2048,
    steps=28,
    warm_steps=4,
    num_rows=1600,
    every_steps=4,
    num_prompts=(1, 4, 16, 64),
    new_tokens=64,
)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
REHEARSAL = Sizes(
    shapes={"0.6B": TINY, "1.7B": TINY},
    packs={"0.6B": 1, "1.7B": 1},
    max_length=1024,
    steps=4,
    warm_steps=1,
    num_rows=24,
    every_steps=2,
    num_prompts=(1, 2),
    new_tokens=4,
)
PUBLISHED = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
REHEARSED = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Bench:
    """What a stage has to work with."""

    work: Path
    sizes: Sizes
    is_rehearsal: bool
    data: Path | None
    """Rows of the user's own (`question`, `answer`)."""

    @property
    def device(self) -> torch.device:
        """The first GPU; a rehearsal is on the CPU."""
        return torch.device("cpu" if self.is_rehearsal else "cuda")

    def task(self, shape: str) -> Task:
        """A model of this shape, the rows, and how they are batched."""
        sizes = self.sizes
        return Task(
            model_dir=self.model(shape),
            data=self.rows(),
            steps=sizes.steps,
            batch_size=sizes.packs[shape],
            max_length=sizes.max_length,
            learning_rate=1e-5,
            warm_steps=sizes.warm_steps,
        )

    def model(self, shape: str) -> Path:
        """The folder of a model with random weights; made by the first stage that needs it."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from trainer.models.tiny import load_tiny_tokenizer

        folder = self.work / shape
        if folder.exists():
            return folder
        tokenizer = load_tiny_tokenizer()
        config = Qwen3Config(
            **self.sizes.shapes[shape],
            **(REHEARSED if self.is_rehearsal else PUBLISHED),
            vocab_size=len(tokenizer) if self.is_rehearsal else 151_936,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        with self.device:
            model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        partly = folder.with_suffix(".part")  # a stage that is cut off leaves no half of a model
        model.save_pretrained(partly)
        tokenizer.save_pretrained(partly)
        partly.rename(folder)
        return folder

    def rows(self) -> Path:
        """Rows as long as GSM8K's: some 170 tokens on average, drawn by a seed; or the user's."""
        if self.data is not None:
            return self.data
        path = self.work / "rows.jsonl"
        if not path.exists():
            rng = random.Random(0)
            words = _counted_words()
            rows = [
                {
                    "question": _text(rng, words, rng.lognormvariate(4.13, 0.4)),
                    "answer": _text(rng, words, rng.lognormvariate(4.44, 0.45)),
                }
                for _ in range(self.sizes.num_rows)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def _counted_words() -> list[tuple[str, int]]:
    """Words with the number of tokens that each takes in a text."""
    from trainer.models.tiny import load_tiny_tokenizer

    tokenizer = load_tiny_tokenizer()
    words = ["the", "sum", "of", "these", "numbers", "is", "more", "than", "what", "was", "left"]
    numbers = [str(number) for number in range(0, 1000, 37)]
    return [(word, len(tokenizer(" " + word)["input_ids"])) for word in (*words, *numbers)]


def _text(rng: random.Random, words: list[tuple[str, int]], num_tokens: float) -> str:
    """Words of about so many tokens."""
    text: list[str] = []
    while num_tokens > 0:
        word, count = rng.choice(words)
        text.append(word)
        num_tokens -= count
    return " ".join(text)


def needs(*modules: str) -> None:
    """Skip the stage where this Python lacks a module."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SkippedError(f"this Python lacks {', '.join(missing)}")
