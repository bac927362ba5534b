"""Previews made elsewhere say what local ones say, with this run's weights, and change nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from tests.integration.serving import Server, running_server
from trainer.monitoring import TrainingStatusReader

pytestmark = pytest.mark.slow
KEY = "k" * 20
SHOWN = ("step", "prompt_id", "text", "raw_text", "matches", "tokens_generated", "finish_reason")
SAMPLES = {"num_preview_samples": 3, "preview_temperature": 0.7}


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[Server]:
    """With a key, and with the model of `train`."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with running_server("--model", str(model_folder), "--api-key-file", str(keys)) as found:
        yield found


def remote(server: Server, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "preview_backend": "remote_3090",
        "remote_3090_host": "127.0.0.1",
        "remote_3090_port": server.port,
        "remote_3090_key_file": str(tmp_path / "keys"),
        **more,
    }


def previews(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "previews.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def shown(folder: Path) -> list[tuple[Any, ...]]:
    rows = [row for row in previews(folder) if row.get("type") != "resumed"]
    # A line has samples only where there are any.
    return [(*(row[name] for name in SHOWN), row.get("samples")) for row in rows]


def leftovers() -> list[str]:
    """Children of this process, and arenas in shared memory."""
    children = [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]
    mine = f"trainer-weights-{os.getpid()}-"
    arenas = [name for name in os.listdir("/dev/shm") if name.startswith(mine)]
    return [line for line in children if "trainer" in line] + arenas


def test_a_sidecar_says_what_local_previews_say_and_every_one_is_verified(
    train: Callable[..., Any], assert_same_weights: Any, tmp_path: Path, patient: None
) -> None:
    before = leftovers()
    scores = {"scores": ["number", "f1"], "num_eval_samples": 3, "num_score_prompts": 5}
    scores |= SAMPLES
    local = train("local", monitoring=scores)
    result = train("sidecar", monitoring={**scores, "preview_backend": "sidecar"})
    assert result.success, result.error_message
    assert_same_weights(local.model_path, result.model_path)
    assert shown(tmp_path / "sidecar") == shown(tmp_path / "local")
    rows, ours = previews(tmp_path / "sidecar"), previews(tmp_path / "local")
    assert {row["weights"] for row in rows} == {"verified"}
    assert {row["backend_type"] for row in rows} == {"sidecar"}
    assert [row["golden_tokens"] for row in rows] == [row["golden_tokens"] for row in ours]
    for row, mine in zip(rows, ours, strict=True):
        assert len({row["text"], *(one["text"] for one in row["samples"])}) == 3
        assert all(set(one["scores"]) == {"number", "f1"} for one in row["samples"])
        assert row["golden_logprobs"] == pytest.approx(mine["golden_logprobs"], abs=1e-4)
        assert row["golden_probability"] == pytest.approx(mine["golden_probability"], abs=1e-4)
        assert row["scores"] == mine["scores"]
    evaluated, here = (
        [
            (one.step, one.prompt_id, one.text, one.scores)
            for one in TrainingStatusReader(tmp_path / name).evaluations()
        ]
        for name in ("sidecar", "local")
    )
    assert evaluated == here
    assert [step for step, *_ in here] == [step for step in (0, 4, 8, 12) for _ in range(5)]
    assert result.summary["previews"]["evaluation"]["verified"] == 20
    counts = result.summary["previews"]
    assert (counts["asked"], counts["verified"], counts["failed"]) == (len(rows), len(rows), 0)
    assert leftovers() == before
    assert not (tmp_path / "sidecar" / "worker.json").exists()


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_pushed_over_http_the_answers_equal_the_local_ones_byte_for_byte(
    train: Callable[..., Any],
    assert_same_weights: Any,
    tmp_path: Path,
    server: Server,
    patient: None,
    mode: str,
) -> None:
    hyper = {"training_mode": mode}
    local = train("local", hyperparams=hyper, monitoring=SAMPLES)
    there = remote(server, tmp_path, **SAMPLES)
    result = train("remote", hyperparams=hyper, monitoring=there)
    assert result.success, result.error_message
    assert_same_weights(local.model_path, result.model_path)
    assert shown(tmp_path / "remote") == shown(tmp_path / "local")
    rows = previews(tmp_path / "remote")
    assert {row["weights"] for row in rows} == {"verified"}
    ids = {row["step"]: row["weights_id"] for row in rows}
    assert len(set(ids.values())) == len(ids) == 4
    # Step 0 of a full run, and the base of an adapter, are what the server loaded itself.
    num_sent = 3 if mode == "full" else 4
    [saved] = result.model_path.glob("*model.safetensors")
    sent = result.summary["previews"]["bytes_sent"]
    assert sent == pytest.approx(num_sent * saved.stat().st_size, rel=0.1)


def test_a_bf16_server_answers_bf16_runs_verified_and_refuses_to_round_an_fp32_run(
    train: Callable[..., Any], model_folder: Path, tmp_path: Path, patient: None
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    words = ("--model", str(model_folder), "--api-key-file", str(keys), "--dtype", "bf16")
    with running_server(*words) as server:
        assert " in bf16 with 1 thread, weights" in server.line
        info = httpx.get(f"{server.url}/info", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert (info["dtype"], info["dtype_option"]) == ("bf16", "bf16")
        for mode in ("full", "lora"):
            hyper = {"fp_precision": "bf16", "training_mode": mode}
            result = train(mode, hyperparams=hyper, monitoring=remote(server, tmp_path))
            assert result.success, result.error_message
            rows = previews(tmp_path / mode)
            assert {(row["weights"], row["error_message"]) for row in rows} == {("verified", None)}
            assert len({row["weights_id"] for row in rows}) == 4
        refused = train("refused", monitoring=remote(server, tmp_path))
    assert refused.exit_code == 2
    assert "--dtype bf16, and this run publishes fp32 weights" in str(refused.error_message)
    assert not (tmp_path / "refused").exists()


def test_bf16_weights_are_verified_within_the_tolerance_of_their_dtype(
    train: Callable[..., Any], tmp_path: Path, server: Server, patient: None
) -> None:
    for name, mode in (("full", "full"), ("lora", "lora")):
        hyper = {"fp_precision": "bf16", "training_mode": mode}
        result = train(name, hyperparams=hyper, monitoring=remote(server, tmp_path))
        assert result.success, result.error_message
        found = [(row["weights"], row["error_message"]) for row in previews(tmp_path / name)]
        assert found == [("verified", None)] * len(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_run_on_a_gpu_is_verified_by_a_sidecar_on_the_gpu_and_on_the_cpu(
    train: Callable[..., Any], tmp_path: Path, patient: None, where: str, mode: str
) -> None:
    result = train(
        "out",
        hyperparams={"fp_precision": "bf16", "training_mode": mode},
        environment={"device": "cuda"},
        monitoring={"preview_backend": "sidecar", "sidecar_device": where},
    )
    assert result.success, result.error_message
    found = [(row["weights"], row["error_message"]) for row in previews(tmp_path / "out")]
    assert found == [("verified", None)] * len(found)
    assert result.summary["previews"]["stall_ms_median"] > 0
