"""Previews of a run on two shards: its own weights, verified, and nothing in training changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.previews import sharded_runs
from tests.integration.serving import Server
from trainer.models.chat_template import chat_template_hash, tokenizer_hash
from trainer.publish.identity import canonical_tensors, config_hash
from trainer.publish.snapshot import Snapshotter
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import ServerHashes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path, server: Server) -> Path:
    """What each of two processes found; all runs in one start, because starting takes long."""
    folder = tmp_path_factory.mktemp("shards")
    rows = folder / "rows.jsonl"
    texts = [{"question": f"{n} and {n}?", "answer": f"it is {2 * n}"} for n in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    setup = {"model": str(model), "rows": str(rows), "port": server.port}
    done = subprocess.run(
        [sys.executable, sharded_runs.__file__, str(folder), json.dumps(setup)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found_by(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return found


def previews(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "previews.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def unsharded_id(model_dir: Path, tokenizer: Any, folder: Path, dtype: torch.dtype) -> str:
    """The weights_id that one process gives the weights of a model folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    snapshots = Snapshotter(canonical_tensors(model), dtype, torch.device("cpu"))
    arena = snapshots.arena(folder / "arena")
    snapshots.copy(arena)()
    hashes = ServerHashes(
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    return WeightFile(arena.path, hashes).manifest().weights_id


def test_every_run_was_sharded(folder: Path) -> None:
    for rank in range(sharded_runs.WORLD):
        found = found_by(folder, rank)
        assert found["is_sharded"] == [True] * 7
        failed = {name: one["error"] for name, one in found.items() if name != "is_sharded"}
        assert {name for name, error in failed.items() if error} == {"local"}


@pytest.mark.parametrize(
    ("name", "dtype", "steps"),
    [("http", torch.float32, [0, 2, 4]), ("bf16", torch.bfloat16, [0, 4])],
)
def test_previews_are_verified_and_named_as_those_of_an_unsharded_run(
    folder: Path,
    model: Path,
    tokenizer: Any,
    tmp_path: Path,
    name: str,
    dtype: torch.dtype,
    steps: list[int],
) -> None:
    rows = previews(folder, name)
    assert [row["error_message"] for row in rows] == [None] * 2 * len(steps)
    assert {row["weights"] for row in rows} == {"verified"}
    ids = {row["step"]: row["weights_id"] for row in rows}
    assert list(ids) == steps
    for step, source in ((0, model), (4, folder / name / "final_model")):
        place = tmp_path / str(step)
        place.mkdir()
        assert ids[step] == unsharded_id(source, tokenizer, place, dtype), f"step {step}"
    counts = found_by(folder)[name]["previews"]
    assert counts["bytes_sent"] > 0
    assert counts["stall_ms_median"] > 0


def test_the_final_evaluation_is_made_by_a_whole_copy(folder: Path) -> None:
    record = json.loads((folder / "http" / "run.json").read_text())
    found = record["summary"]["final_evaluation"]
    assert (found["num_prompts"], found["failed"]) == (3, 0)


def test_adapters_alone_are_published_and_verified(folder: Path) -> None:
    rows = previews(folder, "lora")
    assert {(row["step"], row["weights"]) for row in rows} == {
        (step, "verified") for step in (0, 2, 4)
    }


def test_a_default_backend_becomes_a_sidecar_and_killed_helpers_change_nothing(
    folder: Path, assert_same_weights: Any
) -> None:
    rows = previews(folder, "killed")
    assert {row["weights"] for row in rows if row["error_message"] is None} == {"verified"}
    assert {row["step"] for row in rows if row["error_message"] is None} >= {0, 4}
    for name in ("killed", "http", "failing", "wrong"):
        assert_same_weights(folder / "off" / "final_model", folder / name / "final_model")
    status = json.loads((folder / "killed" / "status.json").read_text())
    notices = [one["text"] for one in status["notices"]]
    assert any("previews: sidecar on cpu" in text for text in notices), notices
    record = json.loads((folder / "killed" / "run.json").read_text())
    assert record["config"]["monitoring"]["preview_backend"] == "sidecar"


def test_a_copy_that_fails_is_the_steps_own_and_no_process_waits_for_it(folder: Path) -> None:
    errors = {row["step"]: row["error_message"] for row in previews(folder, "failing")}
    assert "no space left" in errors[0]
    assert "the copy of another process failed" in errors[2]
    assert errors[4] is None


def test_mutant_one_tensor_of_an_earlier_step_is_killed(folder: Path) -> None:
    rows = previews(folder, "wrong")
    assert [row["step"] for row in rows if row["error_message"] is None] == [0, 0]
    later = [row["error_message"] for row in rows if row["step"]]
    assert all("mismatch, not shown" in message for message in later)


def test_local_previews_that_are_asked_for_are_refused_before_anything_is_written(
    folder: Path,
) -> None:
    found = found_by(folder)["local"]
    message = found["error"]
    assert found["exit_code"] == 2
    assert "monitoring.preview_backend=local" in message
    assert "sidecar" in message
    assert "remote_3090" in message
    assert not (folder / "local").exists()
