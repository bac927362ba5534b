"""The official OpenAI client against a real `trainer serve`, and streams that are streams."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.integration.serving import Server, running_server

pytestmark = pytest.mark.slow
TURNS: Any = [{"role": "user", "content": "max of 42 and 17?"}]
SHORT: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
# Greedy: the untrained model repeats itself and never stops by chance.
LONG: Any = {"model": "tiny", "temperature": 0, "max_tokens": 1500}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--model", "tiny") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def finished(server: Server, kind: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    [line] = [one for one in lines if one.startswith(f"trainer_serve_jobs_{kind} ")]
    return float(line.split()[1])


@pytest.mark.parametrize("temperature", [0, 5])
@pytest.mark.parametrize("stop", [None, ["a", "9 "], "<<ANS_END>>"])
def test_deltas_add_up_to_the_whole_answer(
    client: openai.OpenAI, temperature: float, stop: Any
) -> None:
    options = {**SHORT, "max_tokens": 60, "temperature": temperature, "seed": 42}
    if stop is not None:
        options["stop"] = stop
    whole = client.chat.completions.create(messages=TURNS, **options)
    chunks = list(client.chat.completions.create(messages=TURNS, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    for one in [stop] if isinstance(stop, str) else stop or []:
        assert one not in text
    flat = client.completions.create(prompt="max of 42", **options)
    stream = client.completions.create(prompt="max of 42", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == flat.choices[0].text


def test_text_comes_while_it_is_made_and_a_client_that_leaves_frees_its_slot(
    server: Server, client: openai.OpenAI
) -> None:
    """A cancelled job never made its last token, and the pieces were there before it was."""
    cancelled = finished(server, "cancelled")
    with client.chat.completions.create(messages=TURNS, stream=True, **LONG) as stream:
        pieces: list[str] = []
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None, "it ended before we could leave"
            pieces += filter(None, [chunk.choices[0].delta.content])
            if len(pieces) == 3:
                break
    left = time.monotonic()
    client.chat.completions.create(messages=TURNS, **{**SHORT, "max_tokens": 1})
    print(f"the slot was free and used {time.monotonic() - left:.2f} s after the client left")
    assert len(pieces) == 3
    assert finished(server, "cancelled") == cancelled + 1


def test_usage_comes_last_when_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=TURNS, **SHORT)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=TURNS, **SHORT, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"


def test_token_ids_are_a_prompt_and_max_completion_tokens_a_limit(
    server: Server, client: openai.OpenAI
) -> None:
    options = {"model": "tiny", "temperature": 0}
    ids = client.completions.create(prompt=[5, 6, 7], max_tokens=9, **options)
    body = {"prompt_token_ids": [5, 6, 7], "max_new_tokens": 9}
    plain = httpx.post(server.url + "/generate", json=body).json()
    assert ids.choices[0].text == plain["text"]
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, plain["tokens_generated"])
    chat = client.chat.completions.create(messages=TURNS, max_completion_tokens=2, **options)
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 2


def test_fields_without_effect_are_taken_at_their_default_only(client: openai.OpenAI) -> None:
    defaults: Any = {
        "n": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "user": "someone",
        "seed": 7,
        "stop": None,
        "response_format": {"type": "text"},
    }
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "max of 42 and 17?"}]}]
    one = client.chat.completions.create(messages=parts, **SHORT, **defaults)
    two = client.chat.completions.create(messages=TURNS, **SHORT)
    assert one.choices[0].message == two.choices[0].message
    for name, value in {
        "n": 17,
        "top_p": 0.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logprobs": True,
        "response_format": {"type": "json_object"},
        "logit_bias": {"5": 1},
        "max_completion_tokens": 3,
    }.items():
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.chat.completions.create(messages=TURNS, **{**SHORT, **defaults, name: value})
        assert name in refused.value.message


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": [TOOL]}, "tools is not supported: no tool is called"),
        ({"tool_choice": "required"}, "tool_choice is not supported: no tool is called"),
        ({"functions": [{"name": "f"}]}, "functions is not supported: no tool is called"),
        ({"logprobs": True}, "logprobs is not supported: probabilities of tokens"),
        ({"top_logprobs": 3}, "top_logprobs is not supported: probabilities of tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported: answers"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported: a model thinks"),
        ({"top_k": 3}, "top_k is not supported: this server samples"),
        ({"n": 17}, "n: Input should be less than or equal to 16"),
        ({"stop": [1, 2]}, "stop: give a string, or a list of at most 16"),
        ({"unheard_of": 1}, "unheard_of: this request has no such field; leave it out"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: give text, or"),
        (
            {"messages": [{"role": "user", "content": "a", "name": "bob"}]},
            "messages.0.name: a turn has role and content only; leave it out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_one_problem_that_names_its_field(
    body: dict[str, Any], words: str, server: Server
) -> None:
    asked = {"model": "tiny", "messages": TURNS, **body}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["message"].startswith(words)
    assert ";" not in error["message"].removeprefix(words).replace("; leave", "")
    assert error["param"] == next(iter(body))


def test_a_developer_turn_is_a_system_turn(client: openai.OpenAI) -> None:
    said = []
    for role in ("system", "developer"):
        turns: Any = [{"role": role, "content": "Answer in canonical form."}, *TURNS]
        found = client.chat.completions.create(messages=turns, **SHORT)
        said.append((found.choices[0].message.content, found.usage.prompt_tokens))
    assert said[0] == said[1]


def test_models_are_listed_and_another_one_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    for name in ("other", "run:latest", "run@3", "../etc"):
        with pytest.raises((openai.NotFoundError, openai.UnprocessableEntityError)) as refused:
            client.chat.completions.create(messages=TURNS, model=name)
        body: Any = refused.value.body
        assert set(body) >= {"message", "type", "code"}
        assert body["type"] == "invalid_request_error"


def test_refusals_come_before_the_stream_begins(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="fill the context of"):
        client.completions.create(prompt=[5] * 100_000, stream=True, **SHORT)
    answer = httpx.post(server.url + "/v1/completions", content=b"{")
    assert answer.status_code == 422
    assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}


def test_an_engine_that_dies_ends_the_stream_with_an_error_and_is_replaced(
    server: Server, client: openai.OpenAI
) -> None:
    children = psutil.Process(server.process.pid).children()
    [engine] = [one for one in children if "trainer.server.inference" in " ".join(one.cmdline())]
    pieces: list[str] = []

    def read(stream: openai.Stream[Any]) -> None:
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None, "an answer that was never whole"
            pieces.extend(filter(None, [chunk.choices[0].delta.content]))
            if len(pieces) == 3:
                engine.kill()

    stream = client.chat.completions.create(messages=TURNS, stream=True, **LONG)
    with stream, pytest.raises(openai.APIError, match="the engine process died"):
        read(stream)
    assert len(pieces) >= 3
    whole = client.chat.completions.create(messages=TURNS, **SHORT)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert httpx.get(server.url + "/info").json()["engine_restarts"] == 1
