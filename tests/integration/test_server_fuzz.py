"""Schemathesis against a real server: right and wrong requests drawn from its own description.

`make fuzz` runs it with 500 examples an operation; as part of all tests it takes a few.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.integration.serving import Server, running_server
from trainer.publish.identity import model_manifest
from trainer.server.app import create_app
from trainer.server.inference_process import EngineProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10"))
RUN_EXAMPLES = 30
"""Sequences of requests in one stateful run; the first run is always the same."""


@schemathesis.check
def no_server_error(ctx: Any, response: Any, case: Any) -> None:
    """No 5xx; 503 only where it says when to come back."""
    if response.status_code == 503:
        assert response.headers.get("retry-after"), "503 without Retry-After"
    else:
        assert response.status_code < 500, response.text


@schemathesis.check
def wrong_data_is_refused(ctx: Any, response: Any, case: Any) -> None:
    """As schemathesis has it, but for 413, which it takes for an acceptance."""
    if response.status_code != 413:
        checks.negative_data_rejection(ctx, response, case)


CHECKS = [
    no_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    wrong_data_is_refused,
]


@dataclass
class Fuzzed:
    """A server, and what is really there: without it, most right requests would end at 404."""

    server: Server
    upload_id: str
    job_id: str
    manifest: dict[str, Any]
    weights_id: str
    counts: collections.Counter[tuple[str, int]]

    def fill_in(self, case: Any) -> None:
        """Let a right request name things that exist, one time out of three."""
        if (
            case.meta.generation.mode is not GenerationMode.POSITIVE
            or sum(self.counts.values()) % 3
        ):
            return
        for name in set(case.path_parameters or ()) & {"upload_id", "job_id"}:
            case.path_parameters[name] = getattr(self, name)
        if not isinstance(case.body, dict):
            return
        for name, value in (
            ("model", "model"),
            ("model_id", None),
            ("weights_id", self.weights_id),
        ):
            if name in case.body and "register" not in case.path:
                case.body[name] = value
        for name in ("prompt", "prompt_token_ids"):
            if isinstance(case.body.get(name), list):
                case.body[name] = [token % 256 for token in case.body[name]][:16]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Fuzzed]:
    """A model with room for 24 tokens, so that no answer takes long."""
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
        hashes = httpx.get(server.url + "/info").json()
        manifest = model_manifest(Qwen3ForCausalLM(config).float(), tokenizer).model_dump()
        manifest |= {name: hashes[name] for name in manifest if name.endswith("_hash")}
        body = {"manifest": manifest, "run": "fuzz", "step": 1}
        upload = httpx.post(server.url + "/weights", json=body).json()["upload_id"]
        body = {"prompt_token_ids": [5], "max_new_tokens": 2}
        job = httpx.post(server.url + "/generate?wait=0", json=body).json()["job_id"]
        active = hashes["active"]["weights_id"]
        found = Fuzzed(server, upload, job, manifest, active, collections.Counter())
        yield found
        for (operation, status), count in sorted(found.counts.items()):
            print(f"{operation} {status}: {count}")
        print(f"{sum(found.counts.values())} requests")


def description() -> dict[str, Any]:
    """What the server says of itself; the same with and without a model."""
    app = create_app(EngineProcess(None, "cpu"), keys={}, store_dir=Path())
    found: dict[str, Any] = app.door.app.openapi()
    return found


schema = schemathesis.openapi.from_dict(description())


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described_and_none_is_a_server_error(case: Any, fuzzed: Fuzzed) -> None:
    fuzzed.fill_in(case)
    answer = case.call(base_url=fuzzed.server.url, timeout=60)
    fuzzed.counts[f"{case.method} {case.path}", answer.status_code] += 1
    case.validate_response(answer, checks=CHECKS)
    assert fuzzed.server.process.poll() is None


class Workflow(schema.as_state_machine()):  # type: ignore[misc]
    """Requests that take ids from earlier answers: offers of several runs, parts, commits."""

    fuzzed: ClassVar[Fuzzed]
    broken: ClassVar[list[str]] = []
    """What was wrong with an answer: kept apart, so that nothing that follows can hide it."""

    def before_call(self, case: Any) -> None:
        """Let right offers be of weights that fit, so that there is something to build on."""
        is_right = case.meta.generation.mode is GenerationMode.POSITIVE
        if is_right and case.path == "/weights" and isinstance(case.body, dict):
            case.body |= {"manifest": self.fuzzed.manifest, "transport": "http"}
        if is_right and case.path.endswith("/parts/{number}") and isinstance(case.body, bytes):
            case.path_parameters["number"] = 0
            case.headers["X-Part-SHA256"] = hashlib.sha256(case.body).hexdigest()

    def get_call_kwargs(self, case: Any) -> dict[str, Any]:
        return {"base_url": self.fuzzed.server.url, "timeout": 60}

    def after_call(self, response: Any, case: Any) -> None:
        super().after_call(response, case)
        self.fuzzed.counts[f"then {case.method} {case.path}", response.status_code] += 1

    def validate_response(self, response: Any, case: Any, **_: Any) -> None:
        try:
            case.validate_response(response, checks=CHECKS)
            assert self.fuzzed.server.process.poll() is None
        except BaseException as error:
            self.broken.append(f"{case.method} {case.path}: {type(error).__name__}: {error}")
            raise


def test_requests_that_build_on_each_other_break_nothing(fuzzed: Fuzzed) -> None:
    Workflow.fuzzed = fuzzed
    Workflow.broken.clear()
    num_cut = 0
    for nth in range(max(1, EXAMPLES // RUN_EXAMPLES)):
        try:
            Workflow.run(
                settings=settings(
                    max_examples=RUN_EXAMPLES,
                    stateful_step_count=12,
                    derandomize=nth == 0,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                )
            )
        except FlakyStrategyDefinition:
            # The server remembers earlier examples, so the same draws may meet other answers.
            num_cut += 1
    print(f"{num_cut} runs were cut short: a draw met another answer than before")
    assert Workflow.broken == []
    assert not [name for name, status in fuzzed.counts if status >= 500]
    # Ids of earlier answers were used: an invented one is answered with 404 or 422.
    followed = {
        name: status
        for name, status in fuzzed.counts
        if name.startswith("then") and "_id}" in name and status not in (404, 405, 422)
    }
    assert followed
    # Whoever offers and goes away leaves no place taken: the last offers of all runs have room.
    offers = {status for name, status in fuzzed.counts if name == "then POST /weights"}
    assert 200 in offers
