"""Your own transformers Trainer, watched: status files and previews from `LiveMonitorCallback`.

The loop is Hugging Face's, untouched; `trainer watch`, `trainer monitor` and `trainer report` show
the folder as they show a run of `trainer train`.

    python examples/hf_trainer.py [--steps 20] [--output outputs/hf]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from trainer.config import DataSection, ModelSection
from trainer.data import PadCollator, RowEncoder, prepare_data
from trainer.models import load_model, load_tokenizer, write_demo_data
from trainer.monitoring import (
    LiveMonitorCallback,
    LocalPreviewBackend,
    Observers,
    Previews,
    TrainingStatusWriter,
    deliver_previews,
)
from trainer.preview import PreviewScheduler

MAX_TOKENS = 32
"""Longest answer of a preview."""


def main() -> None:
    """Train the tiny model on generated tasks, and answer three held-out prompts now and then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="outputs/hf")
    words = parser.parse_args()

    section = ModelSection(model_path="tiny")
    tokenizer = load_tokenizer(section)
    model = load_model(section, dtype=torch.float32, seed=0)
    rows = write_demo_data(
        Path(tempfile.mkdtemp()), num_train_rows=320, num_validation_rows=20, seed=0
    )
    files = DataSection(dataset_path=str(rows.train_path), cache=False)
    data = prepare_data(files, encoder=RowEncoder(tokenizer, 256), num_preview=3)

    observers = Observers([TrainingStatusWriter(None, run_dir=words.output)])
    backend = LocalPreviewBackend(
        model=model, tokenizer=tokenizer, max_new_tokens=MAX_TOKENS, temperature=0.0
    )
    scheduler = PreviewScheduler(
        backend, list(data.preview_prompts), interval=10, deliver=deliver_previews(observers)
    )
    monitor = LiveMonitorCallback(
        observers, previews=Previews(scheduler, observers, max_tokens=MAX_TOKENS)
    )
    arguments = TrainingArguments(
        output_dir=words.output,
        max_steps=words.steps,
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        save_steps=words.steps,
        remove_unused_columns=False,
        report_to=[],
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=PadCollator(tokenizer.pad_token_id or 0),
        callbacks=[monitor],
    ).train()
    observers.close()


if __name__ == "__main__":
    main()
