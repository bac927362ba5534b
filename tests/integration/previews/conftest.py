"""A tiny model, a server of it, and runs whose weights must not depend on what previews do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import Server, running_server
from trainer.preview.scheduler import PreviewScheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("faults") / "model"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with running_server("--model", str(model)) as found:
        yield found


@pytest.fixture(scope="module")
def baseline() -> dict[str, Path]:
    """Where the weights of the run without previews are, once they are there."""
    return {}


@pytest.fixture
def attempt(
    train: Callable[..., Any],
    model: Path,
    server: Server,
    baseline: dict[str, Path],
    assert_same_weights: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[Any, list[dict[str, Any]]]]:
    """A function that trains against a port; checks weights and counts; gives the previews."""
    ask = PreviewScheduler.ask

    def ask_and_wait(self: PreviewScheduler, step: int, **options: Any) -> None:
        ask(self, step, **options)
        while self.lane.pending():
            self.lane.wait(0.1)

    def run(
        port: int,
        name: str = "out",
        *,
        is_patient: bool = True,
        is_verified: bool = True,
        patch: Callable[[], None] = lambda: None,
        **more: Any,
    ) -> Any:
        hyper = {"max_steps": 6, "warmup_steps": 1}
        if "weights" not in baseline:
            off = {"inference_interval": 0}
            done = train("plain", model_path=str(model), hyperparams=hyper, monitoring=off)
            baseline["weights"] = done.model_path
        if is_patient:
            monkeypatch.setattr(PreviewScheduler, "ask", ask_and_wait)
        patch()
        monitoring = {
            "preview_backend": "remote_3090",
            "remote_3090_host": "127.0.0.1",
            "remote_3090_port": port,
            "remote_3090_timeout": 0.5,
            "inference_interval": 3,
            "num_eval_samples": 2,
            "preview_drain_timeout": 3,
            **more,
        }
        result = train(name, model_path=str(model), hyperparams=hyper, monitoring=monitoring)
        assert result.success, result.error_message
        assert_same_weights(baseline["weights"], result.model_path)
        lines = (tmp_path / name / "previews.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        counts = result.summary["previews"]
        assert counts["asked"] == counts["done"] + counts["failed"] + counts["superseded"]
        assert counts["asked"] == len(rows)
        if is_verified:
            assert all(row["weights"] == "verified" for row in rows if not row["error_message"])
        return result, rows

    return run
