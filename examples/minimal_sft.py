"""Fine-tuning in one flat loop: rows -> token ids and labels -> loss on the answers -> AdamW.

What `trainer train` does, without checkpoints, previews, mixed precision or a second device.

    python examples/minimal_sft.py [data.jsonl] [--model tiny] [--steps 40]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch

from trainer.config.schema import ModelSection
from trainer.core.loss import supervised_loss
from trainer.data.batches import EncodedDataset, PadCollator
from trainer.data.encode import RowEncoder
from trainer.data.formats import read_rows
from trainer.data.rows import RowErrors
from trainer.models.load import load_model, load_tokenizer
from trainer.models.tiny_tasks import write_demo_data
from trainer.preview.local import LocalPreviewBackend

BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 16, 256, 4e-3


def main() -> None:
    """Train, and answer the first row's prompt before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", help="JSONL file; left out: generated tasks")
    parser.add_argument("--model", default="tiny", help="alias, hub id or folder")
    parser.add_argument("--steps", type=int, default=40)
    words = parser.parse_args()

    section = ModelSection(model_path=words.model)
    tokenizer = load_tokenizer(section)
    model = load_model(section, dtype=torch.float32, seed=0)

    errors = RowErrors("strict")
    rows, _ = read_rows(Path(words.data or demo_rows()), "auto", errors, None)
    errors.raise_if_strict()
    encoder = RowEncoder(tokenizer, MAX_LENGTH)
    examples = [encoder.encode(row.messages) for row in rows]
    data, collate = EncodedDataset(examples), PadCollator(tokenizer.pad_token_id or 0)

    previews = LocalPreviewBackend(model=model, tokenizer=tokenizer, temperature=0.0)
    prompt, golden = examples[0].prompt, examples[0].golden_answer
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    shuffler = random.Random(0)
    model.train()
    for step in range(1, words.steps + 1):
        batch = collate([data[shuffler.randrange(len(data))] for _ in range(BATCH_SIZE)])
        loss = supervised_loss(model, model, batch)  # mean nats per answer token
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            said = previews.preview(prompt, golden, step, max_new_tokens=32).text
            print(f"step {step}: loss {loss.item():.4f}  golden {golden!r}  generated {said!r}")


def demo_rows() -> str:
    """A file of generated tasks."""
    folder = Path(tempfile.mkdtemp(prefix="minimal_sft_"))
    data = write_demo_data(folder, num_train_rows=640, num_validation_rows=20, seed=0)
    return str(data.train_path)


if __name__ == "__main__":
    main()
