"""Schemathesis against a real server: right and wrong requests drawn from its own description.

`make fuzz` runs it with 500 examples an operation; as part of all tests it takes a few.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

from tests.integration.serving import Server, running_server
from trainer.server.app import create_app
from trainer.server.worker import EngineProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10"))


@schemathesis.check
def no_server_error(ctx: Any, response: Any, case: Any) -> None:
    """No 5xx; 503 only where it says when to come back."""
    if response.status_code == 503:
        assert response.headers.get("retry-after"), "503 without Retry-After"
    else:
        assert response.status_code < 500, response.text


CHECKS = [
    no_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Server]:
    """A model with room for 24 tokens, so that no answer takes long; weights by folder too."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder: Path = tmp_path_factory.mktemp("fuzz") / "model"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=24,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ("--weights-dir", str(tmp_path_factory.mktemp("weights")))
    with running_server("--model", str(folder), *words) as server:
        yield server


def description() -> dict[str, Any]:
    """What the server says of itself; the same with and without a model."""
    app = create_app(EngineProcess(None, "cpu"), keys={}, store_dir=Path())
    found: dict[str, Any] = app.app.openapi()
    return found


schema = schemathesis.openapi.from_dict(description())


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described_and_none_is_a_server_error(case: Any, fuzzed: Server) -> None:
    case.call_and_validate(base_url=fuzzed.url, checks=CHECKS, timeout=60)
    assert fuzzed.process.poll() is None
