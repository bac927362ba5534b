"""A run whose logits are made in tiles trains what a run with all logits at once trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.core import tiles

ROOT = Path(__file__).parents[2]

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"hyperparams": {"batch_size": 2, "gradient_accumulation": 2}},
    "checkpointed": {"hyperparams": {"gradient_checkpointing": True}},
    "lora": {"hyperparams": {"training_mode": "lora"}},
    "packed": {"data": {"enable_packing": True}, "hyperparams": {"max_length": 64}},
}


def figures(result: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, of the evaluations, and the weights at the end."""
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").open()]
    steps = [one["train_loss"] for one in lines if one["type"] == "StepDone"]
    evaluations = [one["val_loss"] for one in lines if one["type"] == "EvaluationDone"]
    [file] = result.model_path.glob("*model.safetensors")
    return steps, evaluations, load_file(file)


def check_case(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    sections = {name: dict(values) for name, values in CASES[case].items()}
    hyper = {"max_steps": 6, **sections.pop("hyperparams", {})}
    whole = figures(train("whole", hyperparams=hyper, **sections))
    lengths: list[int] = []
    with_gradient = tiles._with_gradient

    def noted(output: Any, *rest: Any) -> Any:
        lengths.append(len(output))
        return with_gradient(output, *rest)

    monkeypatch.setattr(tiles, "_with_gradient", noted)
    monkeypatch.setattr(tiles, "TILE_LOGITS", 3 * 512)
    tiled = figures(train("tiled", hyperparams=hyper, **sections))
    assert len(lengths) > 2 * len(whole[0])
    assert tiled[0] == pytest.approx(whole[0], rel=1e-5)
    assert tiled[1] == pytest.approx(whole[1], rel=1e-5)
    assert len(whole[1]) >= 2
    for name, value in whole[2].items():
        assert (tiled[2][name].float() - value.float()).norm() <= 1e-3 * value.float().norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_all_logits_at_once(
    case: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_case(train, monkeypatch, case)


SCRIPT = """
import os
import sys
from pathlib import Path
from trainer.core import tiles
tiles.TILE_LOGITS = int(sys.argv.pop(1))
seen, plain = [], tiles._with_gradient
tiles._with_gradient = lambda output, *rest: (seen.append(len(output)), plain(output, *rest))[1]
from trainer.cli import main
code = main(sys.argv[1:])
Path(f"{sys.argv[0]}.{os.environ['RANK']}").write_text(str(len(seen)))
sys.exit(code)
"""


@pytest.mark.long
def test_two_processes_train_alike_with_tiles_and_without(
    model_folder: Path, qa_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def losses(tile: int) -> tuple[list[float], int]:
        out = tmp_path / str(tile)
        words = ["train", "--model", model_folder, "--dataset", qa_file, "--output", out]
        words += ["--max-steps", "5", "--fp32", "--monitoring.inference_interval", "0"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launch, "--nproc-per-node", "2", script, str(tile), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        counts = [int(Path(f"{script}.{rank}").read_text()) for rank in (0, 1)]
        return [one["train_loss"] for one in lines if one["type"] == "StepDone"], min(counts)

    (whole, num_whole), (tiled, num_tiled) = losses(2**26), losses(2000)
    assert len(whole) == 5
    assert tiled == pytest.approx(whole, rel=1e-5)
    assert num_tiled > 10
    assert num_whole == 0
