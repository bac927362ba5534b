"""A server without a model: it waits, says so, and takes a model by name, never by path."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.integration.serving import Server, running_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=120)


def test_it_waits_for_a_model_and_says_so(server: Server, client: httpx.Client) -> None:
    assert "waiting for a model" in server.line
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/info").json()["model_id"] is None
    assert client.get("/models").json() == {"models": []}
    assert client.get("/v1/models").json()["data"] == []
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    for answer in (
        client.get("/ready"),
        client.post("/generate", json={"prompt": "a"}),
        client.post("/v1/chat/completions", json=chat),
    ):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    "name",
    [
        *("/etc", "./tiny", "../tiny", "~/model", "a/b/c", "trainer/server", "tests", "a\\b"),
        *("owner/model.gguf", "file:///etc", "https://host/model", "owner/..", "tiny\n", "", "x"),
    ],
)
def test_a_path_is_never_a_model(client: httpx.Client, name: str) -> None:
    answer = client.post("/models/register", json={"model": name})
    assert answer.status_code == 422, answer.text
    assert client.get("/info").json()["model_id"] is None


def test_a_model_that_does_not_load_leaves_the_server_waiting(
    server: Server, client: httpx.Client
) -> None:
    answer = client.post("/models/register", json={"model": "nobody/nothing"})
    assert answer.status_code == 422
    assert "nobody/nothing cannot be loaded" in answer.json()["detail"]
    assert "/" not in answer.json()["detail"].replace("nobody/nothing", "")
    assert "nobody/nothing" in server.log()
    assert client.get("/ready").status_code == 503


def test_a_registered_model_answers_and_stays(client: httpx.Client) -> None:
    found = client.post("/models/register", json={"model": "tiny"}).json()
    assert found["model_id"] == "tiny"
    assert len(found["weights_id"]) == 64
    assert client.get("/ready").json() == {"ready": True}
    assert client.post("/models/register", json={"model": "tiny"}).json() == found
    assert client.post("/models/register", json={"model": "qwen3"}).status_code == 409
    body = {"prompt": "max of 42 and 17?", "max_new_tokens": 3, "model_id": "tiny"}
    assert client.post("/generate", json=body).json()["tokens_generated"] > 0
