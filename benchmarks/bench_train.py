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

BATCH_SIZE = 16
VOCAB_SIZE = 8000
MAX_LENGTH = 1024
LEARNING_RATE = 1e-3


class Clock:
    """Counts real tokens and seconds from the end of the first step on."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.started: float | None = None
        self.tokens = 0
        self.seconds = 0.0

    def step(self, num_tokens: int) -> None:
        """One optimizer step over this many real tokens is done."""
        now = time.perf_counter()
        if self.started is None:
            self.started = now
            return
        self.tokens += num_tokens
        self.seconds = now - self.started

    @property
    def rate(self) -> float:
        """Real tokens per second; NaN after a single step, which is not timed."""
        return self.tokens / self.seconds if self.seconds else float("nan")


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


def trainer_arm(model_dir: Path, data: Path, steps: int, *, precision: str, group: bool) -> float:
    """`trainer`'s engine, previews and evaluation off."""
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine
    from trainer.monitoring.events import Event, StepDone

    clock = Clock()

    class Watch:
        def on_event(self, event: Event) -> None:
            if isinstance(event, StepDone):
                clock.step(event.num_tokens)

        def close(self) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        config = create_default_config(
            model_path=str(model_dir),
            dataset_path=str(data),
            output_dir=f"{folder}/run",
            hyperparams={
                "batch_size": BATCH_SIZE,
                "max_steps": steps,
                "fp_precision": precision,
                "learning_rate": LEARNING_RATE,
                "max_length": MAX_LENGTH,
            },
            data={"validation_split": 0.0, "group_by_length": group, "cache": False},
            monitoring={"inference_interval": 0, "report_to": ()},
        )
        result = TrainerEngine(observers=[Watch()]).run_job(config)
    assert result.success, result.error_message
    return clock.rate


def trl_arm(model_dir: Path, data: Path, steps: int, *, precision: str, mode: str) -> float:
    """TRL's SFTTrainer with completion-only loss; mode: as is, grouped or packed."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )

    class Counting(SFTTrainer):  # type: ignore[misc]
        pending = 0

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.pending += int(mask.sum() if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step(trainer.pending)
            trainer.pending = 0

    with tempfile.TemporaryDirectory() as folder:
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=4 if mode == "packed" else BATCH_SIZE,
                max_steps=steps,
                bf16=precision == "bf16",
                fp16=False,
                use_cpu=not torch.cuda.is_available(),
                max_length=MAX_LENGTH,
                packing=mode == "packed",
                completion_only_loss=True,
                gradient_checkpointing=False,
                train_sampling_strategy="group_by_length" if mode == "grouped" else "random",
                learning_rate=LEARNING_RATE,
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                log_level="error",
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    return clock.rate


def plain_arm(
    model_dir: Path, data: Path, steps: int, *, precision: str, supervised: bool
) -> float:
    """A loop of a dozen lines: AdamW, random batches, full or supervised logits."""
    from transformers import AutoModelForCausalLM

    from trainer.core.loss import full_loss, supervised_loss
    from trainer.data.batches import PadCollator

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    dataset = encoded(model_dir, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    clock, collate = Clock(), PadCollator(0)
    for step in range(steps):
        batch = collate([dataset[i] for i in order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = supervised_loss(model, model, batch) if supervised else full_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(batch["attention_mask"].sum()))
    return clock.rate


def encoded(model_dir: Path, data: Path) -> Any:
    """The rows as `trainer` encodes them."""
    from trainer.config.schema import DataSection
    from trainer.config.training_sections import ModelSection
    from trainer.data.dataset import prepare_data
    from trainer.data.encode import RowEncoder
    from trainer.models.load import load_tokenizer
    from trainer.profiles import get_profile

    return prepare_data(
        DataSection(dataset_path=str(data), validation_split=0.0, cache=False),
        profile=get_profile("plain"),
        encoder=RowEncoder(load_tokenizer(ModelSection(model_path=str(model_dir))), MAX_LENGTH),
        system_prompt=None,
        is_prompt_configured=False,
        seed=0,
        num_preview=0,
    ).train


Arm = Callable[[Path, Path, int], float]


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    found: dict[str, Arm] = {}
    for precision in ("fp32", "bf16"):
        for name, group in (("as is", False), ("grouped", True)):
            found[f"trainer {precision} {name}"] = partial(
                trainer_arm, precision=precision, group=group
            )
        for mode in ("as is", "grouped", "packed"):
            found[f"TRL {precision} {mode}"] = partial(trl_arm, precision=precision, mode=mode)
    full = partial(plain_arm, supervised=False)
    supervised = partial(plain_arm, supervised=True)
    found["plain fp32 full logits"] = partial(full, precision="fp32")
    found["plain fp32 supervised"] = partial(supervised, precision="fp32")
    found["plain bf16 supervised"] = partial(supervised, precision="bf16")
    return found


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

        # As the other side: bf16 where the device computes in it, as TRL's own default is.
        precision = default_precision(resolve_device("auto"))
        trl_arm(Path(words.launch_trl), words.gsm8k, 1, precision=precision, mode="grouped")
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
            figures[name].append(chosen[name](model_dir, data, words.steps))
            print(f"block {block + 1}: {name:<26} {figures[name][-1]:8.0f} tokens/s", flush=True)
    return figures


def report(
    figures: dict[str, list[float]], launches: dict[str, list[float]], words: argparse.Namespace
) -> None:
    """Print the table and the ratio best over best; write JSON if asked."""
    print(f"\n{torch.get_num_threads()} threads, batch {BATCH_SIZE}, torch {torch.__version__}")
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
