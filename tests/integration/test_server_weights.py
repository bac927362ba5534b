"""Weights over http and dir into a real server, and the previews that they write."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.integration.serving import Server, running_server
from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer
from trainer.preview.base import PreviewRequest
from trainer.preview.local import LocalPreviewBackend
from trainer.publish.identity import canonical_tensors, model_manifest
from trainer.publish.wire import WeightsManifest

pytestmark = pytest.mark.slow
PUBLISH, GENERATE = "p" * 20, "g" * 20


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, weights_dir: Path) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"generate: {GENERATE}\npublish: {PUBLISH}\n")
    words = ("--api-key-file", str(keys), "--weights-dir", str(weights_dir))
    with running_server("--model", "tiny", *words) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    headers = {"Authorization": f"Bearer {PUBLISH}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def model_of(seed: int) -> tuple[Any, Any, WeightsManifest, bytes]:
    tokenizer = load_tiny_tokenizer()
    model = build_tiny_model(seed=seed, vocab_size=len(tokenizer), dtype=torch.float32)
    tensors = {name: value.contiguous() for name, value in canonical_tensors(model).items()}
    return model, tokenizer, model_manifest(model, tokenizer), save(tensors)


def offer(
    client: httpx.Client, manifest: WeightsManifest, step: int, **more: Any
) -> httpx.Response:
    body = {"manifest": manifest.model_dump(mode="json"), "run": "r", "step": step, **more}
    return client.post("/weights", json=body)


def put(client: httpx.Client, upload: str, data: bytes, digest: str | None = None) -> int:
    headers = {"X-Part-SHA256": digest or hashlib.sha256(data).hexdigest()}
    return client.put(f"/weights/{upload}/parts/0", content=data, headers=headers).status_code


def preview(client: httpx.Client, weights_id: str, step: int) -> httpx.Response:
    row = {"prompt": "p", "prompt_token_ids": [5, 6, 7], "golden_token_ids": [8, 9]}
    body = {
        "run": "r",
        "step": step,
        "weights_id": weights_id,
        "prompts": [row, {"prompt": "q", "prompt_token_ids": [9, 4]}],
        "max_new_tokens": 10,
        "golden_logprobs": True,
        "canary": 0,
    }
    return client.post("/previews", json=body)


def test_pushed_weights_write_the_next_preview(client: httpx.Client) -> None:
    model, tokenizer, manifest, data = model_of(7)
    upload = offer(client, manifest, 5).json()["upload_id"]
    assert preview(client, manifest.weights_id, 5).status_code == 409
    assert put(client, upload, data, "0" * 64) == 422
    assert client.post(f"/weights/{upload}/commit").status_code == 409
    assert put(client, upload, data) == 200
    assert client.get(f"/weights/{upload}").json()["parts"] == [0]
    assert client.post(f"/weights/{upload}/commit").json()["committed"] is True
    found = preview(client, manifest.weights_id, 5).json()
    local = LocalPreviewBackend(
        model=model, tokenizer=tokenizer, max_new_tokens=10, temperature=0.0
    ).preview_batch(
        [
            PreviewRequest(prompt="p", prompt_token_ids=(5, 6, 7)),
            PreviewRequest(prompt="q", prompt_token_ids=(9, 4)),
        ],
        5,
    )
    assert [r["raw_text"] for r in found["results"]] == [r.raw_text for r in local]
    assert {r["weights_id"] for r in found["results"]} == {manifest.weights_id}
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    assert found["canary_logprob"] == pytest.approx(float(logits[2, 8] + logits[3, 9]), abs=1e-4)
    assert found["golden_logprobs"][1] is None
    assert client.get("/previews?run=r&after=0").json()["previews"][-1]["step"] == 5
    again = offer(client, manifest, 6).json()
    assert again["committed"] is True
    assert client.get("/models/active").json()["step"] == 6


def test_a_flipped_bit_is_refused_and_the_old_weights_stay(client: httpx.Client) -> None:
    before = client.get("/models/active").json()
    _, _, manifest, data = model_of(8)
    upload = offer(client, manifest, 9).json()["upload_id"]
    broken = bytearray(data)
    broken[-1] ^= 1
    assert put(client, upload, bytes(broken)) == 200
    answer = client.post(f"/weights/{upload}/commit")
    assert answer.status_code == 422
    assert len(answer.json()["bad"]) == 1
    assert client.get("/models/active").json() == before
    assert put(client, upload, data) == 200
    assert client.post(f"/weights/{upload}/commit").status_code == 200


def test_dir_transport_takes_the_file_named_by_its_id(
    client: httpx.Client, weights_dir: Path
) -> None:
    _, _, manifest, data = model_of(10)
    upload = offer(client, manifest, 12, transport="dir").json()["upload_id"]
    assert client.post(f"/weights/{upload}/commit").status_code == 409
    (weights_dir / f"{manifest.weights_id}.safetensors").write_bytes(data)
    assert client.post(f"/weights/{upload}/commit").status_code == 200
    assert client.get("/models/active").json()["weights_id"] == manifest.weights_id


def test_an_older_kept_set_can_be_made_active_again(client: httpx.Client) -> None:
    current = client.get("/models/active").json()
    older = model_of(8)[2].weights_id
    body = {"weights_id": older}
    assert client.post("/models/set_active", json=body).json()["weights_id"] == older
    body = {"weights_id": current["weights_id"]}
    assert client.post("/models/set_active", json=body).json() == current
    assert client.post("/models/set_active", json={"weights_id": "0" * 64}).status_code == 404


def test_a_completion_by_name_is_answered_by_these_weights_and_changes_nothing_for_others(
    client: httpx.Client,
) -> None:
    for seed, step in ((11, 20), (12, 21)):
        _, _, manifest, data = model_of(seed)
        upload = offer(client, manifest, step, run="named").json()["upload_id"]
        assert put(client, upload, data) == 200
        assert client.post(f"/weights/{upload}/commit").status_code == 200
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert names[0] == "tiny"
    assert {"named@20", "named@21", "named:latest"} <= set(names)
    assert not [name for name in names if name.startswith("r")], "these sets are gone"
    body = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 8}
    texts = {}
    for name, step in (("named@20", 20), ("named:latest", 21), ("named@20", 20)):
        answer = client.post("/v1/completions", json={**body, "model": name}).json()
        local, tokenizer, manifest, _ = model_of({20: 11, 21: 12}[step])
        assert answer["system_fingerprint"] == manifest.weights_id
        assert client.get("/models/active").json()["step"] == 21, "a read moves nothing"
        backend = LocalPreviewBackend(
            model=local, tokenizer=tokenizer, max_new_tokens=8, temperature=0.0
        )
        [ours] = backend.preview_batch([PreviewRequest(prompt="", prompt_token_ids=(5, 6, 7))], 0)
        texts[name] = answer["choices"][0]["text"]
        assert texts[name] == ours.text
    assert texts["named@20"] != texts["named:latest"]
    own = client.post("/v1/completions", json={**body, "model": "tiny"}).json()
    assert own["system_fingerprint"] == model_of(12)[2].weights_id, "the plain name: last commit"
    assert client.post("/v1/completions", json={**body, "model": "r@5"}).status_code == 404


def test_the_weights_that_a_server_began_with_can_be_active_again(client: httpx.Client) -> None:
    original = model_of(42)[2]
    body = {"weights_id": original.weights_id}
    assert client.post("/models/set_active", json=body).json()["weights_id"] == original.weights_id
    assert offer(client, original, 0, run="new").json()["committed"] is True
    assert preview(client, original.weights_id, 0).status_code == 200


def test_a_retried_request_is_answered_and_not_done_twice(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "one"}
    body = {"prompt_token_ids": [5], "max_new_tokens": 3}
    first = client.post("/generate?wait=0", json=body, headers=headers).json()
    again = client.post("/generate?wait=0", json=body, headers=headers).json()
    assert first["job_id"] == again["job_id"]
    other = client.post("/generate", json={**body, "max_new_tokens": 4}, headers=headers)
    assert other.status_code == 422


def test_metrics_count_jobs(client: httpx.Client) -> None:
    lines = client.get("/metrics").text.splitlines()
    done = next(line for line in lines if line.startswith("trainer_serve_jobs_done "))
    assert float(done.split()[1]) > 0


def test_another_tokenizer_or_shape_is_refused(client: httpx.Client) -> None:
    _, _, manifest, _ = model_of(7)
    other = manifest.model_copy(update={"tokenizer_hash": "0" * 64})
    answer = offer(client, other, 1)
    assert (answer.status_code, answer.json()["code"]) == (409, "other_tokenizer")
    fewer = manifest.model_copy(update={"tensors": manifest.tensors[1:]})
    answer = offer(client, fewer, 1)
    assert (answer.status_code, answer.json()["bad"]) == (422, [manifest.tensors[0].name])


def test_every_route_but_health_needs_a_key_and_its_scope(server: Server) -> None:
    paths = httpx.get(
        server.url + "/openapi.json", headers={"Authorization": f"Bearer {GENERATE}"}
    ).json()["paths"]
    assert len(paths) > 12
    for path, operations in paths.items():
        url = server.url + path.replace("{upload_id}", "0" * 32).replace("{number}", "0")
        for method in operations:
            status = httpx.request(method, url).status_code
            assert status == (200 if path == "/health" else 401), path
            wrong = httpx.request(method, url, headers={"Authorization": "Bearer wrong"})
            assert wrong.status_code == (200 if path == "/health" else 401), path
            if path.startswith("/weights"):
                headers = {"Authorization": f"Bearer {GENERATE}"}
                assert httpx.request(method, url, headers=headers).status_code == 403


def test_foreign_hosts_origins_and_large_bodies_are_refused(client: httpx.Client) -> None:
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"Origin": "http://evil.example"}).status_code == 403

    def pieces() -> Iterator[bytes]:
        for _ in range(65):
            yield b" " * (1 << 20)

    assert client.post("/generate", content=pieces()).status_code == 413


def test_a_vanished_client_frees_its_slot(client: httpx.Client) -> None:
    body = {"prompt_token_ids": [5], "max_new_tokens": 2000}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json=body, timeout=0.7)
    started = time.monotonic()
    short = client.post("/generate", json={"prompt_token_ids": [5], "max_new_tokens": 1})
    assert short.status_code == 200
    assert time.monotonic() - started < 3


def test_the_openai_client_works_and_streams(server: Server) -> None:
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key=GENERATE) as client:
        turns: Any = [{"role": "user", "content": "max of 42 and 17?"}]
        options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 8}
        whole = client.chat.completions.create(messages=turns, **options)
        stream = client.chat.completions.create(messages=turns, stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        assert len(whole.system_fingerprint or "") == 64
        assert client.completions.create(prompt="max", **options).usage.completion_tokens > 0
        assert "tiny" in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(messages=turns, model="other")


def test_a_killed_engine_comes_back_with_the_committed_weights(
    client: httpx.Client, engine_pid: Callable[[], int]
) -> None:
    active = client.get("/models/active").json()["weights_id"]
    os.kill(engine_pid(), signal.SIGKILL)
    answer = client.post("/generate", json={"prompt_token_ids": [5], "max_new_tokens": 2})
    assert answer.json()["weights_id"] == active
    assert client.get("/info").json()["engine_restarts"] == 1


@pytest.fixture
def engine_pid(server: Server) -> Callable[[], int]:
    import psutil

    def find() -> int:
        children = psutil.Process(server.process.pid).children()
        return next(c.pid for c in children if "trainer.server.inference" in " ".join(c.cmdline()))

    return find
