"""Who may see the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from trainer.cli import main
from trainer.errors import ConfigError
from trainer.net import is_loopback, keys_of_listener
from trainer.views.page import login
from trainer.views.page.login import COOKIE, guarded_page

KEY = "0123456789abcdef0123456789abcdef"


async def page(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the guard."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the page"})


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., httpx.Response]:
    """A function that sends requests to one guard, keeping no cookies."""
    monkeypatch.setattr(login, "WRONG_KEY_PAUSE_S", 0.0)
    gates = {
        key: guarded_page(page, hosts=frozenset({"127.0.0.1", "::1"}), key=key)
        for key in (None, KEY)
    }

    def send(
        path: str = "/",
        *,
        key: str | None = None,
        method: str = "GET",
        host: str = "127.0.0.1:8080",
        **options: Any,
    ) -> httpx.Response:
        import anyio

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=gates[key])
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as one:
                headers = {"host": host, **options.pop("headers", {})}
                return await one.request(method, path, headers=headers, **options)

        return anyio.run(run)

    return send


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_other_names_are_not_served(ask: Callable[..., Any], host: str, status: int) -> None:
    assert ask(host=host).status_code == status


def test_pages_of_other_places_may_not_ask(ask: Callable[..., Any]) -> None:
    assert ask(headers={"origin": "http://127.0.0.1:8080"}).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert ask(headers={"origin": origin}).status_code == 403


def test_every_answer_has_the_security_headers(ask: Callable[..., Any]) -> None:
    for answer in (ask(), ask(key=KEY)):
        policy = answer.headers["content-security-policy"]
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_key_is_asked_for_once(ask: Callable[..., Any]) -> None:
    assert ask(key=KEY).status_code == 401
    wrong = ask("/login", key=KEY, method="POST", data={"key": "wrong"})
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers
    right = ask("/login", key=KEY, method="POST", data={"key": KEY})
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    assert KEY not in cookie
    for flag in ("HttpOnly", "SameSite=Strict"):
        assert flag in cookie
    session = cookie.split(";")[0]
    assert ask(key=KEY, headers={"cookie": session}).text == "the page"
    assert ask(key=KEY, headers={"cookie": f"{COOKIE}=guess"}).status_code == 401


@pytest.mark.parametrize("key", [None, KEY])
def test_websockets_are_refused_where_pages_are(key: str | None) -> None:
    import anyio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        headers = [(b"host", b"127.0.0.1:8080"), (b"origin", b"http://evil.example")]
        if key is not None:
            headers[1:] = []  # no cookie
        scope = {"type": "websocket", "path": "/", "headers": headers}
        await guarded_page(page, hosts=frozenset({"127.0.0.1"}), key=key)(scope, None, send)  # type: ignore[arg-type]

    anyio.run(run)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_other_machines_need_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "reachable from other machines and no key is set" in capsys.readouterr().err
    short = tmp_path / "key"
    short.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 16"):
        keys_of_listener(short, "0.0.0.0", "--key-file")
    short.write_text(KEY + "\n")
    assert keys_of_listener(short, "0.0.0.0", "--key-file") == {KEY: "publish"}


def test_a_file_for_a_folder_and_a_taken_port_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    (tmp_path / "file").write_text("no folder")
    assert main(["monitor", str(tmp_path / "file"), "--port", "0"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["monitor", str(tmp_path), "--port", port]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        *((name, True) for name in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((name, False) for name in ("0.0.0.0", "192.168.1.20", "localhost.evil.example")),
    ],
)
def test_loopback(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it
