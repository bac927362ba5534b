"""Rows per second of data preparation, cold and cached: `trainer` against TRL's SFTTrainer.

    python benchmarks/bench_data.py --gsm8k PATH [--blocks 5] [--rows N] [--out FILE.json]

Both start from the same JSONL file, with the same 8,000-token tokenizer, length and threads, and
end with ids and labels that can be indexed. `cold`: nothing is cached. `cached`: the same again at
once, each with its own cache on disk (for TRL: that of `datasets`). Not timed: imports, loading the
tokenizer, building TRL's trainer. The arms take turns in every block, and the order turns round
from block to block. The tokens of both must be equal in number; the trained ones are printed (TRL
trains the line end behind an answer's stop token too, one token a row).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MAX_LENGTH = 1024
Prepare = Callable[[Path], Callable[[], tuple[int, int]]]
"""Prepares the rows with its cache in a folder; what it returns counts tokens and trained ones."""


def trainer_arm(data: Path, tokenizer: Any) -> Prepare:
    """`prepare_data` as the engine calls it, without a held-out part."""
    from trainer.config.data_section import DataSection
    from trainer.data.dataset import prepare_data
    from trainer.data.encode import RowEncoder
    from trainer.profiles import get_profile

    def prepare(cache_dir: Path) -> Callable[[], tuple[int, int]]:
        found = prepare_data(
            DataSection(dataset_path=str(data), validation_split=0.0, cache_dir=str(cache_dir)),
            profile=get_profile("plain"),
            encoder=RowEncoder(tokenizer, MAX_LENGTH),
            system_prompt=None,
            is_prompt_configured=False,
            seed=0,
            num_preview=4,
        )
        return lambda: (found.card.num_tokens, found.card.num_trained_tokens)

    return prepare


def trl_arm(data: Path, tokenizer: Any, folder: Path) -> Prepare:
    """What SFTTrainer does with a prompt/completion dataset before its first step."""
    import datasets
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), **small, **heads)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        log_level="error",
    )
    one = datasets.Dataset.from_list([turns({"question": "q", "answer": "a"})])
    trainer = SFTTrainer(
        Qwen3ForCausalLM(config), arguments, train_dataset=one, processing_class=tokenizer
    )

    def prepare(cache_dir: Path) -> Callable[[], tuple[int, int]]:
        rows = datasets.load_dataset(
            "json", data_files=str(data), split="train", cache_dir=str(cache_dir)
        )
        rows = rows.map(turns, remove_columns=rows.column_names)
        found = trainer._prepare_dataset(rows, tokenizer, arguments, False, None, "train")
        return lambda: (
            sum(map(len, found["input_ids"])),
            sum(label >= 0 for labels in found["labels"] for label in labels),
        )

    return prepare


def turns(row: dict[str, str]) -> dict[str, Any]:
    """A row as TRL's conversational prompt and completion."""
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def measure(
    arms: dict[str, Prepare], num_rows: int, num_blocks: int, folder: Path
) -> dict[str, list[float]]:
    """Rows per second of every arm, one value a block."""
    figures: dict[str, list[float]] = {f"{n} {k}": [] for n in arms for k in ("cold", "cached")}
    tokens: dict[str, tuple[int, int]] = {}
    for block in range(num_blocks):
        for name in list(arms) if block % 2 == 0 else list(arms)[::-1]:
            cache_dir = folder / f"cache-{name}-{block}"
            for kind in ("cold", "cached"):
                started = time.perf_counter()
                count = arms[name](cache_dir)
                rate = num_rows / (time.perf_counter() - started)
                tokens[name] = count()
                figures[f"{name} {kind}"].append(rate)
                print(f"block {block + 1}: {name:<8}{kind:<7}{rate:10,.0f} rows/s", flush=True)
    print(f"tokens and trained tokens: {tokens}")
    if len({total for total, _ in tokens.values()}) > 1:
        raise SystemExit("the arms do not make the same tokens, so their times do not compare")
    return figures


def report(figures: dict[str, list[float]], num_rows: int) -> None:
    """Medians with their range, and ratios block by block."""
    print(f"\n{num_rows:,} rows, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    for name, values in figures.items():
        print(
            f"{name:<16}{statistics.median(values):10,.0f} rows/s "
            f"({min(values):,.0f}-{max(values):,.0f})"
        )
    for over, under in [
        ("trainer cold", "TRL cold"),
        ("trainer cached", "TRL cached"),
        ("trainer cached", "trainer cold"),
    ]:
        ratios = [a / b for a, b in zip(figures[over], figures[under], strict=True)]
        print(
            f"{over} / {under}: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )


def as_many(rows: list[dict[str, str]], count: int | None) -> list[dict[str, str]]:
    """The first rows; where there are fewer, again with a number behind the question."""
    return [
        {**rows[n % len(rows)], "question": f"{rows[n % len(rows)]['question']} {n}"}
        if n >= len(rows)
        else rows[n]
        for n in range(len(rows) if count is None else count)
    ]


def main() -> None:
    """Parse arguments, run the blocks, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, help="so many, again and again, with a number [each once]"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    words = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.bench_train import make_tokenizer

    rows = as_many([json.loads(line) for line in words.gsm8k.open()], words.rows)
    tokenizer = make_tokenizer([row[key] for row in rows for key in ("question", "answer")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arms = {"trainer": trainer_arm(data, tokenizer), "TRL": trl_arm(data, tokenizer, folder)}
        figures = measure(arms, len(rows), words.blocks, folder)
    report(figures, len(rows))
    if words.out:
        words.out.write_text(json.dumps({"rows_per_s": figures, "rows": len(rows)}, indent=2))


if __name__ == "__main__":
    main()
