"""Fixtures shared by all tests: real tokenizers, real tiny models, real files, one thread."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No test may reach for a network, and equal thread counts make equal numbers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests started by nohup or in the background of a script inherit signals that are ignored, and
# would hand them on to the runs that they stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# A shared machine is slow at times; no test is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Encoded rows of tests must not fill the user's cache, nor be found by the next test run.
_CACHE = tempfile.TemporaryDirectory(prefix="trainer_tests_")
os.environ["ULTIMATE_TRAINER_CACHE"] = _CACHE.name

CHATML_WITH_MARKERS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}{{- '\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEXT = ["the quick brown fox jumps over the lazy dog", "what is two plus two? four.", "system user"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    # Each run of the trainer collects garbage; what was imported need not be walked each time.
    gc.freeze()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A function that trains a byte-level BPE tokenizer with a chat template of your choice."""

    def make(chat_template: str | None = CHATML_WITH_MARKERS, *, eos: str = "<|im_end|>") -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            TEXT,
            trainers.BpeTrainer(
                vocab_size=300,
                special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>"
        )
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """ChatML with generation markers; <|im_end|> ends a turn, <|endoftext|> pads."""
    return make_tokenizer()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A function that builds a 2-layer Qwen3 with random weights, the same for the same seed."""

    def make(*, vocab_size: int = 303, seed: int = 0, **changes: Any) -> Any:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "bos_token_id": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(Qwen3Config(**{**options, **changes}))

    return make


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A model folder as transformers saves it, with attention dropout 0.1."""
    folder = tmp_path / "model"
    make_model(vocab_size=len(tokenizer), attention_dropout=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows (dicts, or raw lines as str) as a JSONL file."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def qa_file(write_rows: Callable[..., Path]) -> Path:
    """40 question/answer rows of different lengths."""
    return write_rows(
        [
            {
                "question": f"what is {n} plus {n}?",
                "answer": f"{n} plus {n} is {2 * n}. " * (n % 4 + 1),
            }
            for n in range(40)
        ]
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After runs that hold mutants, say how many of them were killed."""

    def mutants(outcome: str) -> int:
        reports = terminalreporter.stats.get(outcome, [])
        return sum("_is_killed" in getattr(report, "nodeid", "") for report in reports)

    killed, alive = mutants("passed"), mutants("failed") + mutants("error")
    if killed + alive:
        terminalreporter.write_line(f"{killed} of {killed + alive} mutants killed")
