"""Bodies that are too large, queues that are full, names that are paths, clients that vanish."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.integration.serving import Server, running_server
from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer
from trainer.publish.identity import model_manifest

pytestmark = pytest.mark.slow
# Greedy: the untrained model repeats itself and never stops by chance.
LONG = {"prompt_token_ids": [5], "max_new_tokens": 2000, "temperature": 0}
PATHS = (
    *("../x", "..", ".", "/etc/passwd", "a/../../b", "..%2f..%2fx", "%2e%2e", "\u2025/x", "a\x00b"),
    *("C:\\x", "//host/share", "file:///x", "a\nb", "$(id)", "{{7*7}}", "~", "a" * 5000, ""),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("weights")
    with running_server("--model", "tiny", "--weights-dir", str(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    tokenizer = load_tiny_tokenizer()
    model = build_tiny_model(seed=3, vocab_size=len(tokenizer), dtype=torch.float32)
    return model_manifest(model, tokenizer).model_dump(mode="json")


def offer(client: httpx.Client, manifest: Any, **changes: Any) -> httpx.Response:
    body = {"manifest": manifest, "run": "r", "step": 1, **changes}
    return client.post("/weights", json=body)


def test_a_body_above_64_mib_is_refused_and_health_answers_meanwhile(
    server: Server, client: httpx.Client
) -> None:
    healthy: list[int] = []

    def pieces(other: httpx.Client) -> Iterator[bytes]:
        for number in range(64):
            yield b" " * (1 << 20)
            if number in (0, 7):  # the server has read some of it, and waits for more
                healthy.append(other.get("/health").status_code)
        yield b" "

    with httpx.Client(base_url=server.url) as other:
        streamed = client.post("/generate", content=pieces(other))
    declared = client.post("/generate", content=b" " * ((64 << 20) + 1))
    assert (streamed.status_code, declared.status_code) == (413, 413)
    assert healthy == [200, 200]


def test_the_queue_is_bounded_and_cancelled_jobs_make_room(client: httpx.Client) -> None:
    answers = [client.post("/generate?wait=0", json=LONG) for _ in range(70)]
    full = [one for one in answers if one.status_code == 429]
    jobs = [one.json()["job_id"] for one in answers if one.status_code == 202]
    assert full
    assert len(jobs) + len(full) == 70
    assert all(int(one.headers["Retry-After"]) > 0 for one in full)
    for job in jobs:
        client.delete(f"/jobs/{job}")
    short = client.post("/generate", json={"prompt_token_ids": [5], "max_new_tokens": 1})
    assert short.status_code == 200
    states = [client.get(f"/jobs/{job}?wait=20").json()["status"] for job in jobs]
    assert states == ["cancelled"] * len(jobs)


@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_client_that_closes_its_socket_frees_its_slot(
    server: Server, client: httpx.Client, route: str
) -> None:
    # The seed: drawn anew, one answer in some dozens ends by itself before the client leaves.
    more: dict[str, Any] = {"model": "tiny", "stream": True, "temperature": 5, "max_tokens": 2000}
    more["seed"] = 7
    body = {
        "/generate": LONG,
        "/v1/completions": {**more, "prompt": "a"},
        "/v1/chat/completions": {**more, "messages": [{"role": "user", "content": "a"}]},
    }[route]
    text = httpx.Request("POST", server.url + route, json=body).content
    head = f"POST {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    before = metric(client, "jobs_cancelled")
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        if route != "/generate":
            assert b"data: " in raw.recv(65536) + raw.recv(65536)
        else:
            time.sleep(0.3)
    left = time.monotonic()
    short = client.post("/generate", json={"prompt_token_ids": [5], "max_new_tokens": 1})
    print(f"{route}: answered {time.monotonic() - left:.2f} s after the other client left")
    assert short.status_code == 200
    deadline = time.monotonic() + 10  # the slot is free before the count says so
    while metric(client, "jobs_cancelled") == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(client, "jobs_cancelled") == before + 1


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    [line] = [one for one in lines if one.startswith(f"trainer_serve_{name} ")]
    return float(line.split()[1])


def test_names_that_are_paths_are_refused_everywhere(
    client: httpx.Client, manifest: dict[str, Any]
) -> None:
    batch = {
        "step": 1,
        "weights_id": "0" * 64,
        "prompts": [{"prompt": "", "prompt_token_ids": [1]}],
    }
    for name in PATHS:
        tensors = [{**manifest["tensors"][0], "name": name}, *manifest["tensors"][1:]]
        tensors.sort(key=lambda one: one["name"])
        answers = [
            offer(client, manifest, run=name),
            offer(client, {**manifest, "tensors": tensors}),
            client.post("/previews", json={**batch, "run": name}),
            client.post("/previews", json={**batch, "run": "r", "profile": name or "a.b:C"}),
            client.get("/previews", params={"run": name}),
            client.post("/generate", json={"prompt": "a", "model_id": name}),
            client.post("/models/register", json={"model": name}),
            client.post("/models/set_active", json={"weights_id": name}),
            client.post("/v1/completions", json={"prompt": "a", "model": name}),
        ]
        for answer in answers:
            assert answer.status_code in (404, 422, 409), (name, answer.request.url, answer.text)
            for word in ("Traceback", "site-packages", ".py", "/tmp"):
                assert word not in answer.text
    assert client.get("/models/active").json()["run"] is None


def test_a_link_in_the_shared_folder_is_not_followed(
    server: Server, client: httpx.Client, manifest: dict[str, Any]
) -> None:
    folder = Path(server.process.args[server.process.args.index("--weights-dir") + 1])  # type: ignore[union-attr, index, arg-type]
    state = offer(client, manifest, transport="dir").json()
    (folder / f"{state['weights_id']}.safetensors").symlink_to("/etc/passwd")
    answer = client.post(f"/weights/{state['upload_id']}/commit")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_file")


def test_a_client_that_breaks_off_a_part_makes_no_noise_and_can_come_back(
    server: Server, client: httpx.Client, manifest: dict[str, Any]
) -> None:
    upload = offer(client, manifest, run="broken").json()["upload_id"]
    before = server.log()
    data = b"x" * 100_000
    head = f"PUT /weights/{upload}/parts/0 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Part-SHA256: "
    head += f"{hashlib.sha256(data).hexdigest()}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head.encode() + data[:60_000])
        time.sleep(0.3)
    assert client.get(f"/weights/{upload}").json()["parts"] == []
    headers = {"X-Part-SHA256": hashlib.sha256(data).hexdigest()}
    url = f"/weights/{upload}/parts/0"
    assert client.put(url, content=data, headers=headers).json()["parts"] == [0]
    assert server.log() == before


def test_a_get_changes_nothing_and_foreign_pages_are_refused(client: httpx.Client) -> None:
    before = client.get("/models/active").json()
    for path in ("/generate", "/models/set_active", "/models/register", "/weights"):
        assert client.get(path).status_code == 405
    foreign = {"Origin": "http://evil.example"}
    for method, path in (("OPTIONS", "/generate"), ("POST", "/generate"), ("GET", "/info")):
        answer = client.request(method, path, headers=foreign)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil"):
        assert client.get("/health", headers={"Host": host}).status_code == 421
    assert client.get("/models/active").json() == before
