"""What is compared in training benchmarks: `trainer`, TRL's SFTTrainer, and a plain loop.

Every arm makes the same number of optimizer steps on the same rows and returns a `Clock`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Task:
    """What an arm trains on, and for how long."""

    model_dir: Path
    data: Path
    steps: int
    """Optimizer steps, those that are not timed among them."""
    batch_size: int
    """Rows, or packs where rows are packed."""
    max_length: int = 1024
    """Longest row or pack, in tokens."""
    learning_rate: float = 1e-3
    warm_steps: int = 1
    """First steps, which are not timed."""


class Clock:
    """Real tokens and seconds of the steps after the first ones, and the device memory they took.

    The device is waited for twice only: at the end of the last untimed step and of the last one.
    """

    def __init__(self, task: Task) -> None:
        """Nothing counted yet."""
        self._task, self._count, self._started = task, 0, 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.peak_gib: float | None = None
        """Most that tensors held in a timed step; None without a CUDA device."""

    def step(self, num_tokens: int) -> None:
        """One optimizer step over this many real tokens is done."""
        self._count += 1
        if self._count > self._task.warm_steps:
            self.tokens += num_tokens
        if self._count == self._task.warm_steps:
            wait_for_device()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._started = time.perf_counter()
        elif self._count == self._task.steps:
            wait_for_device()
            self.seconds = time.perf_counter() - self._started
            if torch.cuda.is_available():
                self.peak_gib = torch.cuda.max_memory_allocated() / 2**30

    @property
    def rate(self) -> float:
        """Real tokens per second; NaN where no step was timed."""
        return self.tokens / self.seconds if self.seconds else math.nan


def wait_for_device() -> None:
    """Return when the GPU has done what it was given; at once without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trainer_arm(
    task: Task,
    *,
    precision: str,
    batching: str,
    training_mode: str = "full",
    monitoring: Mapping[str, Any] | None = None,
    observers: Sequence[Any] = (),
    found: dict[str, Any] | None = None,
) -> Clock:
    """`trainer`'s engine; evaluation is off, and so are previews unless `monitoring` has some.

    Args:
        batching: `as is`, `grouped` (rows of like length together) or `packed`.
        found: gets the summary of the run.
    """
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine
    from trainer.monitoring.events import Event, StepDone

    clock = Clock(task)

    class Watch:
        def on_event(self, event: Event) -> None:
            if isinstance(event, StepDone):
                clock.step(event.num_tokens)

        def close(self) -> None: ...

    batches = {"enable_packing": True}
    if batching != "packed":
        batches = {"group_by_length": batching == "grouped"}
    asked = {"inference_interval": 0, "micro_eval_interval": 0, "report_to": ("none",)}
    with tempfile.TemporaryDirectory() as folder:
        config = create_default_config(
            model_path=str(task.model_dir),
            dataset_path=str(task.data),
            output_dir=f"{folder}/run",
            hyperparams={
                "batch_size": task.batch_size,
                "max_steps": task.steps,
                "fp_precision": precision,
                "learning_rate": task.learning_rate,
                "max_length": task.max_length,
                "training_mode": training_mode,
            },
            data={"validation_split": 0.0, "cache": False, **batches},
            monitoring={**asked, **(monitoring or {})},
            output={"report": False},
        )
        result = TrainerEngine(observers=[Watch(), *observers]).run_job(config)
    assert result.success, result.error_message
    if found is not None:
        found.update(result.summary)
    return clock


def trl_arm(
    task: Task, options: Mapping[str, Any], *, attention: str = "sdpa", is_lora: bool = False
) -> Clock:
    """TRL's SFTTrainer with completion-only loss, weights in fp32.

    Args:
        options: of its SFTConfig; what is not named keeps TRL's own default.
        is_lora: adapters of rank 16 on every linear layer, as `trainer`'s.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model_dir)
    rows = [json.loads(line) for line in task.data.read_text().splitlines()]
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

    adapters: dict[str, Any] = {}
    if is_lora:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(
                task.model_dir, dtype=torch.float32, attn_implementation=attention
            ),
            args=SFTConfig(
                output_dir=folder,
                max_steps=task.steps,
                use_cpu=not torch.cuda.is_available(),
                completion_only_loss=True,
                learning_rate=task.learning_rate,
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                log_level="error",
                **options,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Watch()],
            **adapters,
        )
        trainer.train()
    return clock


def plain_arm(task: Task, *, precision: str, supervised: bool) -> Clock:
    """A loop of a dozen lines: AdamW, random batches, full or supervised logits."""
    from transformers import AutoModelForCausalLM

    from trainer.core.loss import full_loss, supervised_loss
    from trainer.data.batches import PadCollator

    model = AutoModelForCausalLM.from_pretrained(task.model_dir, dtype=torch.float32).train()
    dataset = encoded(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    clock, collate, size = Clock(task), PadCollator(0), task.batch_size
    for step in range(task.steps):
        batch = collate([dataset[i] for i in order[step * size : (step + 1) * size]])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = supervised_loss(model, model, batch) if supervised else full_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(batch["attention_mask"].sum()))
    return clock


def encoded(task: Task) -> Any:
    """The rows as `trainer` encodes them."""
    from trainer.config.data_section import DataSection
    from trainer.config.training_sections import ModelSection
    from trainer.data.dataset import prepare_data
    from trainer.data.encode import RowEncoder
    from trainer.models.load import load_tokenizer
    from trainer.profiles import get_profile

    tokenizer = load_tokenizer(ModelSection(model_path=str(task.model_dir)))
    return prepare_data(
        DataSection(dataset_path=str(task.data), validation_split=0.0, cache=False),
        profile=get_profile("plain"),
        encoder=RowEncoder(tokenizer, task.max_length),
        system_prompt=None,
        is_prompt_configured=False,
        seed=0,
        num_preview=0,
    ).train
