"""The forms of a prompt: a row's request, and the same on the wire, to the letter."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from trainer.preview.base import PreviewRequest, PreviewResult, PreviewSample
from trainer.publish.wire import AdapterConfig, PreviewPrompt, PreviewsResult

ASKED = PreviewRequest(
    prompt="2+2?",
    prompt_token_ids=(5, 6, 7),
    golden_answer="4",
    golden_token_ids=(8, 2),
    messages=({"role": "user", "content": "2+2?"},),
    prompt_id="validation-3",
    held_out=False,
)
ON_THE_WIRE = (
    '{"prompt": "2+2?", "prompt_token_ids": [5, 6, 7], "golden_answer": "4", '
    '"golden_token_ids": [8, 2], "prompt_id": "validation-3", "held_out": false}'
)


def test_a_prompt_travels_by_the_names_that_servers_know() -> None:
    assert json.dumps(PreviewPrompt.values_of(ASKED)) == ON_THE_WIRE
    assert PreviewPrompt.model_validate_json(ON_THE_WIRE).model_dump_json() == ON_THE_WIRE.replace(
        ": ", ":"
    ).replace(", ", ",")


def test_a_prompt_without_a_golden_answer_travels_without_one() -> None:
    values = PreviewPrompt.values_of(PreviewRequest(prompt="hi", prompt_token_ids=(5,)))
    assert values["golden_answer"] is values["golden_token_ids"] is None
    assert PreviewPrompt.model_validate(values).held_out


def test_the_server_asks_its_backend_the_same_and_scores_golden_ids_itself() -> None:
    asked = PreviewPrompt.model_validate(PreviewPrompt.values_of(ASKED)).request()
    assert asked == ASKED.model_copy(update={"golden_token_ids": None, "messages": ()})


def test_an_answer_travels_without_samples_as_servers_and_older_trainers_know_none() -> None:
    said = PreviewResult(step=1, prompt="2+2?", text="4")
    written = PreviewsResult(run="r", step=1, weights_id="0" * 64, results=[said]).model_dump_json()
    assert "sample" not in written
    several = said.model_copy(update={"samples": (PreviewSample(text="5"),)})
    assert PreviewResult.model_validate_json(several.model_dump_json()) == several


def test_plain_lora_travels_as_older_servers_know_it() -> None:
    plain = AdapterConfig(r=4, alpha=8.0, target_modules=["q"])
    written = '{"r":4,"alpha":8.0,"target_modules":["q"],"modules_to_save":[]}'
    assert plain.model_dump_json() == written
    more = AdapterConfig(r=4, alpha=8.0, target_modules=["q"], use_dora=True)
    assert more.model_dump_json() == written.replace("[]}", '[],"use_dora":true}')
    assert AdapterConfig.model_validate_json(more.model_dump_json()) == more


def test_a_field_of_an_adapter_that_a_server_does_not_know_is_refused() -> None:
    values = {"r": 4, "alpha": 8.0, "target_modules": ["q"], "use_tomorrow": True}
    with pytest.raises(ValidationError, match="use_tomorrow"):
        AdapterConfig.model_validate(values)
