"""What Qwen3 0.6B, 8B and 32B need in each mode, and for which 24 and 80 GiB are enough.

    python benchmarks/memory_card.py [--write]

Counted from shapes (trainer/core/memory.py): nothing is loaded and nothing is asked of the hub.
`--write` puts the table into docs/memory.md, between its two marks.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from trainer.core.dry_run import CARDS_GIB, MODES
from trainer.core.memory import MemorySetup, estimate_memory, fits

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"

BEGIN, END = "<!-- table: benchmarks/memory_card.py -->", "<!-- end of table -->"

SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}
"""As published in the models' config.json; all have 8 heads of keys, of size 128."""

SETUP = MemorySetup(
    compute_dtype=torch.bfloat16, gradient_checkpointing=True, batch_size=1, length=2048
)


def qwen3(size: str) -> Any:
    """The config of a Qwen3 model by its name."""
    return Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, **SIZES[size])


def rows() -> Iterator[str]:
    """The lines of the table below its head."""
    return (row(size, mode) for size in SIZES for mode in MODES)


def row(size: str, mode: str) -> str:
    """One line of it."""
    found = estimate_memory(qwen3(size), dataclasses.replace(SETUP, **MODES[mode]))
    gib = [found.weights, found.gradients, found.optimizer, found.step, found.total]
    cells = [f"{value / 2**30:.1f}" for value in gib]
    enough = [_enough(found.total, card * 2**30) for card in CARDS_GIB]
    return f"| {' | '.join([size, f'`{mode}`', *cells, *enough])} |"


def _enough(total: int, memory: int) -> str:
    if not fits(total, memory):
        return "no"
    return "yes" if fits(int(total * 1.1), memory) else "just"


def table() -> str:
    """The whole table, in Markdown."""
    head = ["model", "mode", "weights", "gradients", "optimizer", "step", "peak"]
    head += [f"{card} GiB" for card in CARDS_GIB]
    rule = "|" + "---|" * len(head)
    return "\n".join([f"| {' | '.join(head)} |", rule, *rows()])


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    found = table()
    if not parser.parse_args().write:
        print(found)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
