"""Real tokens per second of `trainer` against TRL's SFTTrainer and plain loops, on GSM8K rows.

    python benchmarks/bench_train.py --gsm8k PATH [--blocks 3] [--steps 8] [--out FILE.json]

One 7M-parameter Qwen3 with an 8,000-token BPE, the same rows, the same threads. Every arm runs once
per block, the blocks are interleaved, and the table shows medians with their range. Real tokens:
padding is not counted. The first step of each arm is not timed. Also: seconds from launch to the
first step, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.arms import Clock, Task, plain_arm, trainer_arm, trl_arm

BATCH_SIZE = 16
NUM_PACKS = 4
"""Packs of up to 1,024 tokens in a batch of the packed arms: about as many rows as in the others,
or more."""
VOCAB_SIZE = 8000


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of 8,000 tokens on these texts, ChatML with generation markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from trainer.models.tiny import load_tiny_tokenizer

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = load_tiny_tokenizer().chat_template
    return tokenizer


def save_model(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write the benchmark's model and tokenizer to a folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer([row[key] for row in rows for key in ("question", "answer")])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- arms


Arm = Callable[[Task], Clock]


def trl_options(task: Task, precision: str, batching: str) -> dict[str, Any]:
    """What SFTTrainer is told beside its defaults."""
    return {
        "per_device_train_batch_size": task.batch_size,
        "bf16": precision == "bf16",
        "fp16": False,
        "max_length": task.max_length,
        "packing": batching == "packed",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length" if batching == "grouped" else "random",
    }


def trl(task: Task, *, precision: str, batching: str) -> Clock:
    """SFTTrainer; batching: as is, grouped or packed."""
    return trl_arm(task, trl_options(task, precision, batching))


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    found: dict[str, Arm] = {}
    for precision in ("fp32", "bf16"):
        for batching in ("as is", "grouped", "packed"):
            for name, arm in (("trainer", trainer_arm), ("TRL", trl)):
                found[f"{name} {precision} {batching}"] = partial(
                    arm, precision=precision, batching=batching
                )
    full = partial(plain_arm, supervised=False)
    supervised = partial(plain_arm, supervised=True)
    found["plain fp32 full logits"] = partial(full, precision="fp32")
    found["plain fp32 supervised"] = partial(supervised, precision="fp32")
    found["plain bf16 supervised"] = partial(supervised, precision="bf16")
    return found


def task_of(name: str, model_dir: Path, data: Path, steps: int) -> Task:
    """What the arm of this name trains on."""
    batch_size = NUM_PACKS if name.endswith("packed") else BATCH_SIZE
    return Task(model_dir, data, steps, batch_size)


# ---- launch to first step


def launch_trainer(model_dir: Path, data: Path) -> float:
    """Seconds from starting `trainer train` to its first finished step."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m trainer train --dataset {data} --model {model_dir} --output {folder}/run"
        options = (
            f"--max-steps 1 --batch-size {BATCH_SIZE} --monitoring.inference_interval 0 --quiet "
            "--data.cache false"
        )
        started = time.time()
        subprocess.run([sys.executable, *command.split(), *options.split()], check=True)
        lines = Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if row["type"] == "StepDone")
    return float(first["created_at"]) - started


def launch_trl(model_dir: Path, data: Path) -> float:
    """The same for a short script around SFTTrainer."""
    command = [sys.executable, __file__, "--gsm8k", str(data), "--launch-trl", str(model_dir)]
    started = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) - started


# ---- the run


def main() -> None:
    """Parse arguments, run the blocks, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps per arm, the first untimed")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the file that are used")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--launch-trl", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.launch_trl:
        from trainer.models.precision import default_precision, resolve_device

        precision = default_precision(resolve_device("auto"))  # as the other side
        task = task_of("grouped", Path(words.launch_trl), words.gsm8k, 1)
        trl(task, precision=precision, batching="grouped")
        print(time.time())
        return
    with tempfile.TemporaryDirectory() as folder:
        data, model_dir = Path(folder) / "rows.jsonl", Path(folder) / "model"
        lines = words.gsm8k.read_text().splitlines()[: words.rows]
        data.write_text("\n".join(lines) + "\n")
        save_model(model_dir, [json.loads(line) for line in lines])
        figures = measure(words, model_dir, data)
        launches = {
            "trainer": [launch_trainer(model_dir, data) for _ in range(words.blocks)],
            "TRL": [launch_trl(model_dir, data) for _ in range(words.blocks)],
        }
    report(figures, launches, words)


def measure(words: argparse.Namespace, model_dir: Path, data: Path) -> dict[str, list[float]]:
    """Tokens per second of every arm, one value a block; arms take turns."""
    chosen = {name: arm for name, arm in arms().items() if words.only in name}
    figures: dict[str, list[float]] = {name: [] for name in chosen}
    for block in range(words.blocks):
        names = list(chosen) if block % 2 == 0 else list(chosen)[::-1]
        for name in names:
            task = task_of(name, model_dir, data, words.steps)
            figures[name].append(chosen[name](task).rate)
            print(f"block {block + 1}: {name:<26} {figures[name][-1]:8.0f} tokens/s", flush=True)
    return figures


def report(
    figures: dict[str, list[float]], launches: dict[str, list[float]], words: argparse.Namespace
) -> None:
    """Print the table and the ratio best over best; write JSON if asked."""
    print(
        f"\n{torch.get_num_threads()} threads, batch {BATCH_SIZE} ({NUM_PACKS} packs), "
        f"torch {torch.__version__}"
    )
    for name, values in sorted(figures.items(), key=lambda item: -statistics.median(item[1])):
        print(f"{name:<26} {statistics.median(values):8.0f}  ({min(values):.0f}-{max(values):.0f})")
    ours = best(figures, "trainer")
    theirs = best(figures, "TRL")
    if ours and theirs:
        ratios = [a / b for a, b in zip(figures[ours], figures[theirs], strict=True)]
        print(
            f"best over best: {ours} / {theirs} = {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
    for name, values in launches.items():
        print(
            f"launch to first step, {name}: {statistics.median(values):.1f} s "
            f"({min(values):.1f}-{max(values):.1f})"
        )
    if words.out:
        words.out.write_text(json.dumps({"tokens_per_s": figures, "launch_s": launches}, indent=2))


def best(figures: dict[str, list[float]], start: str) -> str | None:
    """The arm with the highest median among those whose name starts so."""
    names = [name for name in figures if name.startswith(start)]
    return max(names, key=lambda name: statistics.median(figures[name]), default=None)


if __name__ == "__main__":
    main()
