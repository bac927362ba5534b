"""Fine-tuning in one flat loop: rows -> token ids and labels -> loss on the answers -> AdamW.

What `trainer train` does, without checkpoints, mixed precision or a second device. Everything is
imported from the public faces of the rooms, so the script is also an example of their use.

    python examples/minimal_sft.py [data.jsonl] [--model tiny] [--steps 40]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.config import DataSection, ModelSection
from trainer.core import supervised_loss
from trainer.data import EpochOrder, PadCollator, RowEncoder, prepare_data
from trainer.models import load_model, load_tokenizer, write_demo_data
from trainer.preview import LocalPreviewBackend

BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 16, 256, 4e-3


def main() -> None:
    """Train, and answer the first row's prompt now and then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", help="JSONL file; left out: generated tasks")
    parser.add_argument("--model", default="tiny", help="alias, hub id or folder")
    parser.add_argument("--steps", type=int, default=40)
    words = parser.parse_args()

    section = ModelSection(model_path=words.model)
    tokenizer = load_tokenizer(section)
    model = load_model(section, dtype=torch.float32, seed=0)

    path = words.data or demo_rows()
    files = DataSection(dataset_path=path, validation_split=0, cache=False)
    data = prepare_data(files, encoder=RowEncoder(tokenizer, MAX_LENGTH))
    order = EpochOrder(data.train.lengths, group_size=BATCH_SIZE, seed=0)
    collate = PadCollator(tokenizer.pad_token_id or 0)

    previews = LocalPreviewBackend(model=model, tokenizer=tokenizer, temperature=0.0)
    prompt, golden = data.train_texts[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for step, rows in zip(range(1, words.steps + 1), batches(order), strict=False):
        batch = collate([data.train[row] for row in rows])
        loss = supervised_loss(model, model, batch)  # mean nats per answer token
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            said = previews.preview(prompt, golden, step, max_new_tokens=32).text
            print(f"step {step}: loss {loss.item():.4f}  golden {golden!r}  generated {said!r}")


def batches(order: EpochOrder) -> Iterator[list[int]]:
    """Rows of one batch after the other, epoch after epoch."""
    for epoch in itertools.count():
        rows = order.epoch_rows(epoch)
        yield from (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))


def demo_rows() -> str:
    """A file of generated tasks."""
    folder = Path(tempfile.mkdtemp(prefix="minimal_sft_"))
    data = write_demo_data(folder, num_train_rows=640, num_validation_rows=20, seed=0)
    return str(data.train_path)


if __name__ == "__main__":
    main()
