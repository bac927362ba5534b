"""The built-in model `tiny`: an untrained Qwen3 of about 0.8M parameters, its tokenizer and tasks.

The tokenizer's files lie beside this module; `make_tiny_tokenizer.py` made them.
Nothing here needs a network.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainer.errors import ConfigError, OutputError
from trainer.models.quantized import set_dtype

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
    set_dtype(model, dtype)
    return model


# ---- the demo's data: symbolic tasks that the untrained model learns in about a minute
#
# `max`, `min`, `first` and `last` of two numbers from 10 to 99, `rev` (the digits backwards) of one
# number from 100 to 999. Held-out arguments are picked by a hash and occur in no training row.


DEMO_SYSTEM_PROMPT = "Answer in canonical form."
"""Short, because the time of a step goes with its tokens."""

Arguments = tuple[int, ...]

_RESULTS: dict[str, Callable[[Arguments], str]] = {
    "max": lambda numbers: str(max(numbers)),
    "min": lambda numbers: str(min(numbers)),
    "first": lambda numbers: str(numbers[0]),
    "last": lambda numbers: str(numbers[-1]),
    "rev": lambda numbers: str(numbers[0])[::-1],
}

OPERATIONS: tuple[str, ...] = tuple(_RESULTS)


@dataclass(frozen=True)
class Task:
    """One question with its answer."""

    operation: str
    arguments: Arguments

    @property
    def question(self) -> str:
        """The user's turn, such as `max of 42 and 17?`."""
        return f"{self.operation} of {' and '.join(map(str, self.arguments))}?"

    @property
    def result(self) -> str:
        """What stands behind the equals sign; digits, and `rev` keeps leading zeros."""
        return _RESULTS[self.operation](self.arguments)

    @property
    def answer(self) -> str:
        """The assistant's turn, without markers: `(max 42 17) = 42`."""
        return f"({self.operation} {' '.join(map(str, self.arguments))}) = {self.result}"


@dataclass(frozen=True)
class DemoData:
    """The files of a demo run and what must be known to judge its score."""

    train_path: Path
    validation_path: Path
    commonest_answer_share: float
    """Share of the held-out prompts that the commonest training answer gets right. Answers name
    their arguments and no held-out arguments are trained on, so no fixed answer can score."""
    commonest_result_share: float
    """The same for the number behind `=` alone: the score of a model that copies the question
    and then always writes the commonest result."""
    operations: tuple[str, ...]


def write_demo_data(
    folder: Path, *, num_train_rows: int, num_validation_rows: int = 200, seed: int
) -> DemoData:
    """Write `train.jsonl` and `validation.jsonl`, rows `{"question": ..., "answer": ...}`.

    Args:
        folder: made if it is not there; the two files in it are replaced.
        num_train_rows: evenly over the operations, in random order.
        num_validation_rows: held-out rows, all different, evenly over the operations.
        seed: decides which arguments are held out and which rows are trained on.
    Raises:
        ConfigError: fewer rows than operations, or more held-out rows than can be spared.
        OutputError: the folder cannot be written.
    """
    train, held_out = make_tasks(num_train_rows, num_validation_rows, seed)
    train_path, validation_path = folder / "train.jsonl", folder / "validation.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_rows(train_path, train)
        _write_rows(validation_path, held_out)
    except OSError as error:
        raise OutputError(
            f"{folder}: the demo's data cannot be written here ({error.strerror}). Give a folder "
            "that you may write to."
        ) from error
    return DemoData(
        train_path=train_path,
        validation_path=validation_path,
        commonest_answer_share=_commonest_share(train, held_out, lambda task: task.answer),
        commonest_result_share=_commonest_share(train, held_out, lambda task: task.result),
        operations=OPERATIONS,
    )


def make_tasks(
    num_train_rows: int, num_validation_rows: int, seed: int
) -> tuple[list[Task], list[Task]]:
    """Training tasks and held-out tasks, which share no (operation, arguments).

    Raises:
        ConfigError: fewer rows than operations, or more held-out rows than can be spared.
    """
    if min(num_train_rows, num_validation_rows) < len(OPERATIONS):
        raise ConfigError(
            f"demo data: num_train_rows={num_train_rows}, num_validation_rows="
            f"{num_validation_rows}; each must be at least {len(OPERATIONS)}, one per operation."
        )
    rng = random.Random(seed)
    train: list[Task] = []
    held_out: list[Task] = []
    for place, operation in enumerate(OPERATIONS):
        kept, spared = _split_arguments(operation, _share(num_validation_rows, place), seed)
        held_out += spared
        train += rng.choices(kept, k=_share(num_train_rows, place))
    rng.shuffle(train)
    rng.shuffle(held_out)
    assert not set(train) & set(held_out), "a held-out task is trained on"
    return train, held_out


def operation_of(question: str) -> str:
    """The operation that a demo question asks for."""
    return question.split(" ", 1)[0]


def _share(total: int, place: int) -> int:
    """How many of `total` rows the operation at `place` gets; the first ones get the rest."""
    return total // len(OPERATIONS) + (place < total % len(OPERATIONS))


def _split_arguments(operation: str, num_held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
    """All tasks of one operation: those to train on, and the held-out ones with least hashes."""
    space: list[Arguments]
    if operation == "rev":
        space = [(number,) for number in range(100, 1000)]
    else:
        space = list(itertools.product(range(10, 100), repeat=2))
    tasks = sorted((Task(operation, arguments) for arguments in space), key=_hasher(seed))
    if num_held_out > len(tasks) // 4:
        raise ConfigError(
            f"demo data: {num_held_out} held-out rows of {operation!r}, which has {len(tasks)} "
            f"different questions; at most a quarter ({len(tasks) // 4}) may be held out, so that "
            "enough remain to learn from. Lower num_validation_rows."
        )
    return tasks[num_held_out:], tasks[:num_held_out]


def _hasher(seed: int) -> Callable[[Task], bytes]:
    # hashlib, because Python's own hash of a string differs from process to process.
    return lambda task: hashlib.sha256(f"{seed}:{task.question}".encode()).digest()


def _commonest_share(
    train: list[Task], held_out: list[Task], text_of: Callable[[Task], str]
) -> float:
    commonest = Counter(map(text_of, train)).most_common(1)[0][0]
    return sum(text_of(task) == commonest for task in held_out) / len(held_out)


def _write_rows(path: Path, tasks: list[Task]) -> None:
    lines = [json.dumps({"question": task.question, "answer": task.answer}) for task in tasks]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
