"""S1: every route times every method times every kind of key, read from the app's own table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from trainer.server.app import create_app
from trainer.server.inference_process import EngineProcess

GENERATE, PUBLISH = "g" * 32, "p" * 32
SCOPES = {
    "/health": None,
    "/openapi.json": "generate",
    "/ready": "generate",
    "/version": "generate",
    "/info": "generate",
    "/metrics": "generate",
    "/models": "generate",
    "/models/active": "generate",
    "/models/register": "publish",
    "/models/set_active": "publish",
    "/generate": "generate",
    "/jobs/{job_id}": "generate",
    "/previews": "generate",
    "/weights": "publish",
    "/weights/{upload_id}": "publish",
    "/weights/{upload_id}/parts/{number}": "publish",
    "/weights/{upload_id}/commit": "publish",
    "/v1/models": "generate",
    "/v1/chat/completions": "generate",
    "/v1/completions": "generate",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
WRONG: tuple[dict[str, str], ...] = (
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {PUBLISH}"},
    {"Authorization": PUBLISH},
    {"Authorization": f"Bearer {PUBLISH}x"},
    {"Authorization": f"Bearer {PUBLISH[:-1]}"},
    {"Authorization": "Bearer \u00fc"},
)


@pytest.fixture
def guard(tmp_path: Path) -> Any:
    """The whole app with two keys and no model: nothing behind the guard has to run."""
    return create_app(
        EngineProcess(None, "cpu"),
        keys={GENERATE: "generate", PUBLISH: "publish"},
        store_dir=tmp_path,
    )


def routes(app: Any) -> set[str]:
    return {route.path for route in app.routes}


def send(guard: Any, method: str, path: str, headers: list[tuple[str, str]]) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            encoded = [(name, value.encode("latin-1")) for name, value in headers]
            return await client.request(method, path, headers=encoded)  # type: ignore[arg-type]

    return asyncio.run(once())


def ask(guard: Any, method: str, path: str, headers: dict[str, str]) -> int:
    return send(guard, method, path, list(headers.items())).status_code


def test_the_table_here_names_every_route_of_the_app(guard: Any) -> None:
    assert routes(guard.door.app) == set(SCOPES), "give a new route its scope here, and test it"


@pytest.mark.parametrize("path", SCOPES)
def test_no_route_answers_without_the_key_that_it_needs(guard: Any, path: str) -> None:
    url = path.format(job_id="job-" + "0" * 24, upload_id="0" * 32, number="0")
    scope = SCOPES[path]
    for method in METHODS:
        for headers in WRONG:
            status = ask(guard, method, url, headers)
            if scope is None:
                assert status in (200, 405), (method, headers)
            else:
                assert status == 401, (method, headers)
        key = ask(guard, method, url, {"Authorization": f"Bearer {GENERATE}"})
        assert (key == 403) == (scope == "publish"), method
        assert key != 401, method
        key = ask(guard, method, url, {"Authorization": f"Bearer {PUBLISH}"})
        assert key not in (401, 403), method


@pytest.mark.parametrize(
    "url", ["/health/", "//health", "/health/../info", "/nowhere", "/%69nfo", "/weights/", "/docs"]
)
def test_no_spelling_of_a_path_gets_round_the_key(guard: Any, url: str) -> None:
    assert ask(guard, "GET", url, {}) == 401


def test_a_publish_route_needs_its_scope_however_it_is_written(guard: Any) -> None:
    generate = {"Authorization": f"Bearer {GENERATE}"}
    for url in ("/weights", "/weights/", "/%77eights", "/models/set%5Factive"):
        assert ask(guard, "POST", url, generate) == 403, url
    for url in ("//weights", "/models//set_active", "/Weights"):
        assert ask(guard, "POST", url, generate) == 404, url


def test_two_authorization_or_host_headers_are_refused(guard: Any) -> None:
    key = ("authorization", f"Bearer {PUBLISH}")
    for twice in ([key, key], [key, ("host", "127.0.0.1"), ("host", "evil.example")]):
        assert send(guard, "GET", "/info", twice).status_code == 421


@pytest.mark.parametrize("path", ["/boom", "/v1/boom"])
def test_an_unforeseen_error_tells_a_client_nothing(guard: Any, path: str) -> None:
    @guard.door.app.get(path)
    async def boom() -> None:
        raise RuntimeError("/root/secret.py broke")

    answer = send(guard, "GET", path, [("authorization", f"Bearer {GENERATE}")])
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    body = answer.json()
    said = body["error"]["message"] if path.startswith("/v1") else body["detail"]
    assert said == "internal error; details are in the server's log"
