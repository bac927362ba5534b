"""Previews from an OpenAI-compatible server: shown, compared, and never called verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration import faulty_proxy as faults
from tests.integration.serving import Server
from trainer.monitoring import create_preview_backend
from trainer.preview.base import PreviewRequest
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.openai import OpenAIPreviewBackend
from trainer.preview.scheduler import samples_of

pytestmark = pytest.mark.slow


def test_its_answers_are_those_of_its_own_weights_and_labelled_unverified(
    train: Callable[..., Any], model: Any, server: Server
) -> None:
    import torch

    from trainer.config.training_sections import ModelSection
    from trainer.models.load import load_model, load_tokenizer

    section = ModelSection(model_path=str(model))
    local = LocalPreviewBackend(
        model=load_model(section, dtype=torch.float32),
        tokenizer=load_tokenizer(section),
        max_new_tokens=12,
        temperature=0.0,
    )
    backend = create_preview_backend(
        "openai", base_url=f"{server.url}/v1", max_new_tokens=12, temperature=0.0
    )
    mine, theirs = (one.preview("what is 2 plus 2?", "4", 3) for one in (local, backend))
    assert theirs.ok, theirs.error_message
    # Such a server leaves out control tokens within an answer; here they are shown.
    plain = mine.text.replace("<|endoftext|>", "")
    assert (theirs.text, theirs.tokens_generated) == (plain, mine.tokens_generated)
    assert (theirs.weights, theirs.weights_id, theirs.step) == ("unverified", None, 3)
    backend.close()


def test_its_samples_are_those_of_the_same_weights_here(model: Any, server: Server) -> None:
    import torch

    from trainer.config.training_sections import ModelSection
    from trainer.models.load import load_model, load_tokenizer

    section = ModelSection(model_path=str(model))
    tokenizer = load_tokenizer(section)
    more = {"max_new_tokens": 12, "temperature": 0.7, "seed": 5}
    here = LocalPreviewBackend(
        model=load_model(section, dtype=torch.float32), tokenizer=tokenizer, **more
    )
    there = OpenAIPreviewBackend(base_url=f"{server.url}/v1", tokenizer=tokenizer, **more)
    there.check()
    request = PreviewRequest(prompt="2+2?", prompt_token_ids=tuple(here.render("2+2?")))
    [mine], [theirs] = (samples_of(one, [request], 3, 4) for one in (here, there))
    there.close()
    plain = [one.text.replace("<|endoftext|>", "") for one in mine.answers]
    assert [one.text for one in theirs.answers] == plain
    assert len(set(plain)) == 4


def test_a_run_shows_them_and_trains_as_without(
    attempt: Callable[..., Any], server: Server
) -> None:
    openai = {"preview_backend": "openai", "openai_base_url": f"{server.url}/v1"}
    result, rows = attempt(server.port, is_verified=False, **openai)
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6]
    assert {row["weights"] for row in rows} == {"unverified"}
    assert {row["error_message"] for row in rows} == {None}
    assert len({row["text"] for row in rows if row["prompt_id"] == rows[0]["prompt_id"]}) == 1
    assert any("unverified" in notice["text"] for notice in _notices(result))


def _notices(result: Any) -> list[dict[str, Any]]:
    from trainer.monitoring import TrainingStatusReader

    return [one.model_dump() for one in TrainingStatusReader(result.output_dir).read().notices]


@pytest.mark.parametrize(
    ("pattern", "fault", "words"),
    [
        ("GET /v1/models", faults.garbage, "not JSON"),
        ("GET /v1/models", faults.edited(data=[]), "set monitoring.openai_model"),
        ("GET /v1/models", faults.edited(data=[{"id": "a"}, {"id": "b"}]), "it lists|lists a, b"),
    ],
)
def test_a_server_that_cannot_be_asked_fails_the_start(
    train: Callable[..., Any], model: Any, server: Server, pattern: str, fault: Any, words: str
) -> None:
    with faults.faulty_proxy(server.port, pattern, fault) as proxy:
        url = f"http://127.0.0.1:{proxy.server_address[1]}/v1"
        result = train(
            model_path=str(model),
            monitoring={"preview_backend": "openai", "openai_base_url": url},
        )
    assert result.exit_code == 2
    assert any(word in (result.error_message or "") for word in words.split("|"))
