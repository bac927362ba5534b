"""Places for uploads come back: whoever was cut off, failed or killed keeps none of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.publish.weight_file import BadFileError, check_file
from trainer.publish.wire import WeightsManifest, WeightsOffer
from trainer.server.problems import WeightsRefusedError
from trainer.server.upload import PREFIX, PrivateFolder, Upload, remove_abandoned
from trainer.server.weight_store import MAX_UPLOADS, WeightStore

DATA = bytes(range(16))


class Clock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def manifest(fill: int = 0, **more: Any) -> WeightsManifest:
    first, second = bytes([fill]) * 16, DATA
    tensors = [
        {"name": name, "dtype": "F32", "shape": [4], "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("a", first), ("b", second))
    ]
    hashes = dict.fromkeys(("config_hash", "tokenizer_hash", "chat_template_hash"), "0" * 64)
    return WeightsManifest.model_validate({"tensors": tensors, **hashes, **more})


def file_of(
    fill: int, places: list[list[Any]] | None = None, rest: bytes = b"", **more: Any
) -> bytes:
    places = places or [[0, 16], [16, 32]]
    header = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": place}
        for name, place in zip("ab", places, strict=True)
    }
    text = json.dumps({**header, **more}).encode()
    data = bytearray(max(int(last) for _, last in places))
    for (first, last), piece in zip(places, (bytes([fill]) * 16, DATA), strict=True):
        data[int(first) : int(last)] = piece
    return struct.pack("<Q", len(text)) + text + bytes(data) + rest


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> WeightStore:
    found = WeightStore(tmp_path, None, clock=clock)
    found.expect(manifest(), None)
    return found


def offer(store: WeightStore, run: str, fill: int = 1) -> Upload:
    body = WeightsOffer(manifest=manifest(fill), run=run, step=1)
    return store.offer(body, store.check(body))


def put(upload: Upload, data: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    asyncio.run(upload.put(0, hashlib.sha256(data).hexdigest(), pieces()))


def test_a_server_in_bf16_refuses_what_it_would_round(store: WeightStore) -> None:
    store.expect(manifest(), None, is_bf16_only=True)
    with pytest.raises(WeightsRefusedError, match="rounds to bf16") as refused:
        offer(store, "in-fp32")
    assert (refused.value.status, refused.value.code) == (409, "other_dtype")
    store.expect(manifest(), None, is_bf16_only=False)
    assert offer(store, "in-fp32").id in store.uploads


def test_abandoned_offers_make_room_for_an_honest_trainer(store: WeightStore, clock: Clock) -> None:
    for number in range(MAX_UPLOADS):
        offer(store, f"crashed-{number}")
    with pytest.raises(WeightsRefusedError, match="too many"):
        offer(store, "honest")
    clock.now = 4
    assert offer(store, "honest").id in store.uploads
    assert len(store.uploads) == MAX_UPLOADS


def test_an_upload_that_goes_on_keeps_its_place_and_one_that_stopped_does_not(
    store: WeightStore, clock: Clock
) -> None:
    uploads = [offer(store, f"run-{number}") for number in range(MAX_UPLOADS)]
    for upload in uploads:
        put(upload, file_of(1))
    clock.now = 50
    with pytest.raises(WeightsRefusedError, match="too many"):
        offer(store, "new")
    for upload in uploads[1:]:
        put(upload, file_of(1))
    clock.now = 61
    offer(store, "new")
    assert uploads[0].id not in store.uploads
    assert not uploads[0].path.exists()
    assert {one.id for one in uploads[1:]} <= set(store.uploads)


def test_a_commit_that_failed_gives_its_place_and_its_bytes_back(store: WeightStore) -> None:
    uploads = [offer(store, f"run-{number}") for number in range(MAX_UPLOADS)]
    bad = uploads[2]
    put(bad, file_of(2))
    bad.seal()
    with pytest.raises(WeightsRefusedError) as refused:
        store.verify(bad)
    assert refused.value.status == 422
    store.failed(bad)
    bad.is_sealed = False
    assert not bad.path.exists()
    put(bad, file_of(1))  # while nobody needs the place it may be sent again
    assert store.verify(bad)
    bad.start_over()
    offer(store, "new")
    assert bad.id not in store.uploads


def test_nothing_is_kept_of_an_upload_after_an_hour(store: WeightStore, clock: Clock) -> None:
    put(offer(store, "one"), file_of(1))
    clock.now = 3601
    store.expire()
    assert not store.uploads
    assert not list(store.folder.iterdir())


def test_a_part_that_was_begun_before_an_upload_started_over_does_not_count(
    store: WeightStore,
) -> None:
    upload = offer(store, "slow")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"begin"
        upload.start_over()

    with pytest.raises(WeightsRefusedError):
        asyncio.run(upload.put(0, hashlib.sha256(b"begin").hexdigest(), pieces()))
    assert not upload.parts


# ---- files that the library would not load


WRONG: dict[str, Callable[[], bytes]] = {
    "a gap": lambda: file_of(1, [[0, 16], [24, 40]]),
    "a gap at the beginning": lambda: file_of(1, [[8, 24], [24, 40]]),
    "an overlap": lambda: file_of(1, [[0, 16], [8, 24]]),
    "a rest": lambda: file_of(1, rest=b"x"),
    "metadata that is no text": lambda: file_of(1, __metadata__={"format": 1}),
    "metadata that is a list": lambda: file_of(1, __metadata__=[]),
    "true for an offset": lambda: file_of(1, [[False, 16], [16, 32]]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_would_end_the_engine_is_refused_before_it_is_there(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_bytes(WRONG[name]())
    with pytest.raises(BadFileError) as refused:
        check_file(tmp_path / "file", manifest(1))
    assert refused.value.code in ("bad_file", "bad_tensors")


def test_the_order_of_tensors_in_a_file_is_free(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(file_of(1, [[16, 32], [0, 16]]))
    check_file(tmp_path / "file", manifest(1))


@given(st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_what_is_accepted_the_library_loads(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int
) -> None:
    from safetensors import safe_open

    path = tmp_path_factory.mktemp("file") / "file"
    path.write_bytes(file_of(1, [[first, first + 16], [second, second + 16]]))
    try:
        check_file(path, manifest(1))
    except BadFileError:
        return
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"a", "b"}


# ---- what a kill leaves


def test_a_new_server_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    running = PrivateFolder(tmp_path)
    killed = PrivateFolder(tmp_path)
    (killed.path / "x.safetensors").write_bytes(b"1" * 100)
    os.close(killed._lock)  # what the kernel does with a process that is killed
    other = tmp_path / f"{PREFIX}somebodys"
    other.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(other)
    assert remove_abandoned(tmp_path) == [killed.path]
    assert running.path.is_dir()
    assert other.is_dir()
    running.remove()
    assert not running.path.exists()
