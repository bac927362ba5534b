"""What one client does must not change, delay or end what the server does for the others."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save

from tests.integration.serving import Server, running_server
from tests.integration.test_server_weights import model_of, put
from trainer.publish.wire import WeightsManifest
from trainer.server.upload import PREFIX

pytestmark = pytest.mark.slow
PUBLISH, GENERATE = "p" * 20, "g" * 20
# Greedy: the untrained model repeats itself and never stops by chance.
LONG = {"prompt_token_ids": [5], "max_new_tokens": 2000, "temperature": 0}
SHORT = {"prompt_token_ids": [5, 6, 7], "max_new_tokens": 6}
ROW = {"prompt": "x", "prompt_token_ids": [5, 6]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"generate: {GENERATE}\npublish: {PUBLISH}\n")
    with running_server("--model", "tiny", "--api-key-file", str(keys)) as found:
        yield found


def client_with(server: Server, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def trainer(server: Server) -> httpx.Client:
    return client_with(server, PUBLISH)


@pytest.fixture(scope="module")
def reader(server: Server) -> httpx.Client:
    return client_with(server, GENERATE)


def engine_of(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    [found] = [one for one in children if "trainer.server.inference" in " ".join(one.cmdline())]
    return found


def offer(client: httpx.Client, manifest: WeightsManifest, run: str, step: int) -> httpx.Response:
    body = {"manifest": manifest.model_dump(mode="json"), "run": run, "step": step}
    return client.post("/weights", json=body)


def publish(client: httpx.Client, seed: int, run: str, step: int) -> str:
    _, _, manifest, data = model_of(seed)
    upload = offer(client, manifest, run, step).json()["upload_id"]
    assert put(client, upload, data) == 200
    assert client.post(f"/weights/{upload}/commit").json()["committed"] is True
    return manifest.weights_id


def test_a_reader_moves_nothing_for_others_by_name_or_by_a_forged_run(
    trainer: httpx.Client, reader: httpx.Client
) -> None:
    older = publish(trainer, 11, "runA", 1)
    newer = publish(trainer, 12, "runA", 2)
    active = reader.get("/models/active").json()
    body = {"prompt": [5, 6], "max_tokens": 2, "model": "runA@1"}
    assert reader.post("/v1/completions", json=body).json()["system_fingerprint"] == older
    found = reader.post("/generate", json={**SHORT, "model_id": "runA@1"}).json()
    assert (found["run"], found["step"], found["weights_id"]) == ("runA", 1, older)
    for weights_id, step in ((newer, 2), (older, 1)):
        forged = {"run": "evil", "step": 999_999, "weights_id": weights_id, "prompts": [ROW]}
        answer = reader.post("/previews", json={**forged, "max_new_tokens": 1}).json()
        assert (answer["run"], answer["step"], answer["results"][0]["step"]) == ("runA", step, step)
    assert reader.get("/previews?run=evil").json()["previews"] == []
    assert reader.get("/models/active").json() == active
    plain = reader.post("/generate", json=SHORT).json()
    assert (plain["run"], plain["step"], plain["weights_id"]) == ("runA", 2, newer)


def adapter_of(base: str, **config: Any) -> tuple[WeightsManifest, bytes]:
    """A small file under an adapter's manifest."""
    _, _, full, _ = model_of(12)
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
    data = save({name: torch.zeros(4, 4)})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    import hashlib

    start, end = header[name]["data_offsets"]
    digest = hashlib.sha256(data[len(data) - (end - start) :]).hexdigest()
    hashes = {key: value for key, value in full.model_dump().items() if key.endswith("_hash")}
    adapter = {"r": 4, "alpha": 8.0, "target_modules": ["model.layers.0.mlp.gate_proj"], **config}
    tensors = [{"name": name, "dtype": "F32", "shape": [4, 4], "sha256": digest}]
    values = {"kind": "adapter", "base": base, "adapter": adapter, "tensors": tensors, **hashes}
    return WeightsManifest.model_validate(values), data


def test_an_adapter_that_is_none_is_refused_and_the_old_weights_answer(
    trainer: httpx.Client, reader: httpx.Client
) -> None:
    before, active = (
        reader.post("/generate", json=SHORT).json(),
        reader.get("/models/active").json(),
    )
    restarts = reader.get("/info").json()["engine_restarts"]
    manifest, data = adapter_of(active["weights_id"])
    upload = offer(trainer, manifest, "lora", 1).json()["upload_id"]
    assert put(trainer, upload, data) == 200
    assert trainer.post(f"/weights/{upload}/commit").status_code == 422, "lora_B is missing"
    for config in ({"r": 4096}, {"target_modules": ["model.norm"]}, {"target_modules": ["model"]}):
        manifest, _ = adapter_of(active["weights_id"], **config)
        answer = offer(trainer, manifest, "lora", 1)
        assert (answer.status_code, answer.json()["code"]) == (422, "tensors_differ")
    assert reader.get("/ready").status_code == 200
    after = reader.post("/generate", json=SHORT).json()
    assert (after["raw_text"], after["weights_id"]) == (before["raw_text"], before["weights_id"])
    assert reader.get("/models/active").json() == active
    assert reader.get("/info").json()["engine_restarts"] == restarts


def test_a_stopped_engine_blocks_nobody_and_is_replaced(
    server: Server, reader: httpx.Client
) -> None:
    """First 600 cancellations of a job whose engine reads none of them, then the watch."""
    restarts = reader.get("/info").json()["engine_restarts"]
    job = reader.post("/generate?wait=0", json=LONG).json()["job_id"]
    time.sleep(0.3)
    engine_of(server).send_signal(signal.SIGSTOP)
    waiting = ThreadPoolExecutor(1).submit(reader.post, "/generate", json=SHORT)
    for _ in range(600):
        assert reader.delete(f"/jobs/{job}").status_code == 200
    assert reader.get("/health", timeout=5).status_code == 200
    assert reader.get(f"/jobs/{job}?wait=50").json()["status"] == "cancelled"
    answer = waiting.result(60)
    assert answer.status_code == 200
    assert answer.json()["run"] == reader.get("/models/active").json()["run"]
    assert reader.get("/info").json()["engine_restarts"] == restarts + 1


def test_a_retry_with_the_same_key_gets_the_answer(server: Server, reader: httpx.Client) -> None:
    body = json.dumps({**LONG, "max_new_tokens": 60}).encode()
    head = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {GENERATE}\r\nIdempotency-Key: k1\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.1)
    headers = {"Idempotency-Key": "k1", "Content-Type": "application/json"}
    time.sleep(0.3)  # time enough to notice that the first one is gone
    answer = reader.post("/generate", content=body, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["tokens_generated"] > 0


def test_a_commit_whose_answer_was_lost_is_answered_again_and_an_upload_can_be_given_up(
    trainer: httpx.Client, reader: httpx.Client
) -> None:
    _, _, manifest, data = model_of(13)
    upload = offer(trainer, manifest, "again", 1).json()["upload_id"]
    assert put(trainer, upload, data) == 200
    first = trainer.post(f"/weights/{upload}/commit").json()
    assert trainer.post(f"/weights/{upload}/commit").json() == first
    other = offer(trainer, model_of(14)[2], "again", 2).json()["upload_id"]
    assert reader.delete(f"/weights/{other}").status_code == 403
    assert trainer.delete(f"/weights/{other}").status_code == 204
    assert trainer.get(f"/weights/{other}").status_code == 404


# ---- sampling


def texts(client: httpx.Client, **more: Any) -> list[str]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 12, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_without_a_seed_answers_differ_and_with_one_they_do_not(reader: httpx.Client) -> None:
    assert len({texts(reader)[0] for _ in range(4)}) > 1
    assert len({texts(reader, seed=3)[0] for _ in range(3)}) == 1
    body = {**SHORT, "temperature": 2.0, "max_new_tokens": 12}
    found = {reader.post("/generate", json=body).json()["raw_text"] for _ in range(4)}
    assert len(found) > 1


def test_n_samples_differ_and_the_first_is_the_one_that_is_made_alone(
    reader: httpx.Client,
) -> None:
    found = texts(reader, n=16, seed=4)
    assert len(set(found)) > 12
    assert found == texts(reader, n=16, seed=4)
    assert found[0] == texts(reader, seed=4)[0]
    assert len(set(texts(reader, n=3, temperature=0))) == 1
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 12, "n": 3, "seed": 4}
    streamed = {0: "", 1: "", 2: ""}
    ends = {}
    with reader.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line[6:])["choices"]
                streamed[choice["index"]] += choice["text"]
                ends[choice["index"]] = choice["finish_reason"]
    assert list(streamed.values()) == found[:3]
    assert all(ends.values())


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_a_tiny_temperature_takes_the_most_likely_token(
    reader: httpx.Client, temperature: float
) -> None:
    assert texts(reader, temperature=temperature, seed=1) == texts(reader, temperature=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.5), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.1), ("n", 17)],
)
def test_a_sampling_field_that_is_not_taken_is_named_with_what_to_do(
    reader: httpx.Client, name: str, value: float
) -> None:
    body = {"model": "tiny", "prompt": [5], name: value}
    answer = reader.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, name)
    assert error["message"].startswith(name)
    if name != "n":
        assert "leave" in error["message"]
        detail = reader.post("/generate", json={**SHORT, name: value}).json()["detail"]
        assert detail.startswith(f"{name} is not supported")
        assert "temperature and seed" in detail


# ---- what a kill leaves


def test_a_killed_server_leaves_nothing_for_the_next_one(tmp_path: Path) -> None:
    import os

    before = dict(os.environ)
    os.environ["TMPDIR"] = str(tmp_path)
    try:
        with running_server() as first:
            first.process.kill()
            first.process.wait()
        [left] = tmp_path.glob(f"{PREFIX}*")
        with running_server():
            [found] = tmp_path.glob(f"{PREFIX}*")
            assert found != left
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not list(tmp_path.glob(f"{PREFIX}*"))
