"""While the main process works alone, the others wait where no exchange can run out of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, sys, time
from trainer.config import create_default_config
from trainer.core import TrainerEngine, checkpoint, training
from trainer.monitoring import processes
from trainer.monitoring.callbacks import MicroEvaluation
from trainer.preview.local import LocalPreviewBackend

rows, out, mark = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
rank, sleep, found = os.environ["RANK"], time.sleep, {}

class Clock:  # the other process says when it waits outside of exchanges
    @staticmethod
    def sleep(seconds):
        mark.write_text(str(time.monotonic()))
        sleep(seconds)

if rank == "1":
    processes.time = Clock

def slow(holder, name, what):
    plain = getattr(holder, name)
    def work(*args, **options):
        begun, end = time.monotonic(), time.monotonic() + float(sys.argv[4])
        while time.monotonic() < end:
            if mark.exists() and float(mark.read_text() or 0) > begun:
                found[what] = found.get(what, 0) + 1
                break
            sleep(0.01)
        return plain(*args, **options)
    setattr(holder, name, work)

if rank == "0":
    slow(LocalPreviewBackend, "preview_batch", "previews")
    slow(MicroEvaluation, "measure", "evaluations")
    slow(training, "save_checkpoint", "checkpoints")
config = create_default_config(
    model_path="tiny", dataset_path=rows, output_dir=out, environment={"device": "cpu"},
    hyperparams={"max_steps": 4, "batch_size": 2, "fp_precision": "fp32", "max_length": 64},
    data={"validation_split": 0.2}, output={"checkpoint_interval": 2},
    monitoring={"report_to": (), "inference_interval": 2, "micro_eval_interval": 2,
                "preview_max_tokens": 2, "display": "quiet"})
result = TrainerEngine().run_job(config)
print("END", rank, result.success, sorted(found.items()), result.error_message, flush=True)
"""


def ends(qa_file: Path, tmp_path: Path, script: str, patience_s: float) -> list[str]:
    path = tmp_path / "two.py"
    path.write_text(script)
    words = [path, qa_file, tmp_path / "out", tmp_path / "mark", str(patience_s)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = sorted(line for line in done.stdout.splitlines() if line.startswith("END"))
    assert len(found) == 2, done.stdout + done.stderr
    return found


@pytest.mark.slow
def test_others_wait_outside_of_exchanges_for_previews_evaluations_and_checkpoints(
    qa_file: Path, tmp_path: Path
) -> None:
    main, other = ends(qa_file, tmp_path, SCRIPT, 60)
    counts = "[('checkpoints', 2), ('evaluations', 2), ('previews', 3)]"
    assert main == f"END 0 True {counts} None"
    assert other == "END 1 True [] None"


@pytest.mark.slow
@pytest.mark.long
def test_mutant_others_that_wait_in_the_next_exchange_is_killed(
    qa_file: Path, tmp_path: Path
) -> None:
    broken = SCRIPT.replace(
        'if rank == "1":',
        "for module in [one for one in sys.modules.values() if hasattr(one, 'wait_for_main')]:\n"
        "    module.wait_for_main = lambda: None\n"
        'if rank == "1":',
    )
    main, _ = ends(qa_file, tmp_path, broken, 0.5)
    assert main == "END 0 True [] None"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif("not __import__('torch').cuda.device_count() > 1", reason="needs two GPUs")
def test_on_gpus_too_others_wait_outside_of_exchanges(qa_file: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace('environment={"device": "cpu"}', 'environment={"device": "cuda"}')
    main, other = ends(qa_file, tmp_path, script, 60)
    assert "('previews', 3)" in main
    assert other == "END 1 True [] None"
