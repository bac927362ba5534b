"""Runs on streamed rows in one or more gloo processes, forked so that nothing is imported twice.

`streamed_ranks.py FOLDER` does what FOLDER/launches.json says: a list of launches, each with
`name`, `world`, `config`, and maybe `keep`: the newest checkpoint that is left.
FOLDER/NAME-RANK.json holds, for each step, the numbers in the texts of the rank's rows.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import run_ranks
from trainer.config import TrainerConfig
from trainer.core import TrainerEngine
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.data import stream_reader, stream_rows

TIMEOUT_S = 240


def note_rows(seen: dict[int, list[str]]) -> None:
    """Have the trainer note the rows of each step."""
    compute = SupervisedTrainer.compute_loss

    def noted(self: Any, model: Any, inputs: dict[str, Any], *a: Any, **k: Any) -> Any:
        texts = self._tokenizer.batch_decode(inputs["input_ids"])
        names = [found[1] for text in texts if (found := re.search(r"what is (\d+)\?", text))]
        seen.setdefault(self.state.global_step + 1, []).extend(names)
        return compute(self, model, inputs, *a, **k)

    SupervisedTrainer.compute_loss = noted  # type: ignore[method-assign]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stream_reader.PIECE, stream_rows.MIN_AHEAD = 8, 8
    for launch in json.loads((folder / "launches.json").read_text()):
        name = launch["name"]

        def work(rank: int, launch: dict[str, Any] = launch, name: str = name) -> int:
            seen: dict[int, list[str]] = {}
            note_rows(seen)
            result = TrainerEngine().run_job(TrainerConfig.model_validate(launch["config"]))
            (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
            print(result.error_message)
            return result.exit_code

        codes = run_ranks(
            launch["world"],
            work,
            lambda rank, name=name: folder / f"{name}-{rank}.txt",
            timeout_s=TIMEOUT_S,
        )
        if any(codes):
            print([path.read_text()[-3000:] for path in folder.glob(f"{name}-*.txt")])
            sys.exit(f"{name}: {codes}")
        for path in folder.glob(f"{name}/checkpoints/step-*"):
            if int(path.name.split("-")[1]) > launch.get("keep", 10**6):
                os.rename(path, folder / f"{name}-left-{path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
