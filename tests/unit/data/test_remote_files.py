"""Rows behind an address: of a web server on this machine, of fsspec's stores, of the hub."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data import remote_files
from trainer.data.card_text import card_lines
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import RowErrors
from trainer.data.sources import check_files, find_sources, read_rows
from trainer.errors import ConfigError, DataError
from trainer.net import hub_setting


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"question": f"{name}{n}", "answer": f"a{n}"} for n in range(count)]


def lines_of(name: str, count: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows_of(name, count)).encode()


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves `content`; paths say what goes wrong."""

    content = lines_of("x", 5000)
    tag = '"1"'
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if "nohead" in self.path:
            self.send_error(405)
        else:
            self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if "missing" in self.path or "forbidden" in self.path:
            self.send_error(404 if "missing" in self.path else 403)
            return
        if "hangs" in self.path and not is_head:
            time.sleep(1.0)
        content = self.content
        if "gz" in self.path:
            content = gzip.compress(content)
        if "parquet" in self.path:
            content = self.table
        self.send_response(200)
        if "untold" in self.path and not is_head:
            self.send_header("Transfer-Encoding", "chunked")
        elif "untold" not in self.path:
            self.send_header("Content-Length", str(len(content)))
        if "tagged" in self.path:
            self.send_header("ETag", self.tag)
        self.end_headers()
        if is_head:
            return
        if "short" in self.path:
            content = content[: len(content) // 2]
            self.close_connection = True
        if "untold" in self.path:
            for start in range(0, len(content), 30_000):
                part = content[start : start + 30_000]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"" if "short" in self.path else b"0\r\n\r\n")
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[tuple[str, type[Answers]]]:
    kind = type("Own", (Answers,), {"asked": [], "table": b""})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", kind
    server.shutdown()
    server.server_close()
    thread.join()


def questions(name: str) -> list[str]:
    rows, _ = collected(
        read_rows(find_sources(name), DataSection(), RowErrors("strict"), max_rows=None)
    )
    return [row.messages[0]["content"] for row in rows]


ALL = [f"x{n}" for n in range(5000)]


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "nohead/rows.jsonl", "untold/rows.jsonl", "rows.jsonl.gz", "rows?id=3"]
)
def test_rows_of_a_web_server_are_those_of_the_file(
    served: tuple[str, type[Answers]], path: str
) -> None:
    host, kind = served
    assert questions(f"http://{host}/{path}") == ALL
    assert sum(one.startswith("GET") for one in kind.asked) <= 6


def test_a_table_of_a_web_server_is_read(served: tuple[str, type[Answers]], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows_of("x", 5000)), tmp_path / "a.parquet")
    host, kind = served
    kind.table = (tmp_path / "a.parquet").read_bytes()
    assert questions(f"http://{host}/a.parquet") == ALL


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.jsonl", "the server answered 404"),
        ("forbidden.jsonl", "the server answered 403"),
        ("hangs.jsonl", "no answer in time"),
        ("short.jsonl", "cannot be read"),
        ("short/untold.jsonl", "cannot be read"),
        ("short.jsonl.gz", "cannot be read"),
        ("*.jsonl", "a web server has no list of files"),
    ],
)
def test_what_a_web_server_does_wrong_is_one_error_without_the_secret(
    served: tuple[str, type[Answers]], path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "READ_TIMEOUT_S", 0.3)
    host, _ = served
    with pytest.raises(DataError, match=reason) as caught:
        questions(f"http://me:hidden1@{host}/{path}?token=hidden2")
    text = str(caught.value)
    assert "hidden" not in text
    assert text.startswith(f"http://***@{host}/{path}?***: ")
    assert caught.value.__cause__ is None or "hidden" not in repr(caught.value.__cause__)


def test_nobody_at_an_address_is_one_error() -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/a.jsonl: cannot be read"):
        check_files(DataSection(dataset_path="http://127.0.0.1:1/a.jsonl"))


def test_a_missing_file_is_found_before_anything_is_read(
    served: tuple[str, type[Answers]],
) -> None:
    host, kind = served
    with pytest.raises(DataError, match="404"):
        check_files(DataSection(dataset_path=f"http://{host}/missing.jsonl"))
    check_files(DataSection(dataset_path=f"http://{host}/rows.jsonl"))
    assert [one for one in kind.asked if "rows" in one] == ["HEAD /rows.jsonl"]


# ---- the version of a file, and what is kept under it


def test_the_hash_is_of_the_servers_version_else_of_the_bytes(
    served: tuple[str, type[Answers]],
) -> None:
    host, kind = served

    def hash_of(path: str) -> str:
        return find_sources(f"http://{host}/{path}")[0].content_hash()

    tagged, plain = hash_of("tagged.jsonl"), hash_of("rows.jsonl")
    assert tagged.startswith("version:")
    assert kind.asked[0] == "HEAD /tagged.jsonl"
    assert "GET /tagged.jsonl" not in kind.asked
    assert re.fullmatch(r"[0-9a-f]{64}", plain)
    kind.tag = '"2"'
    assert hash_of("tagged.jsonl") != tagged
    assert hash_of("rows.jsonl") == plain
    kind.content = kind.content[:-10] + b'more..."}\n'
    assert hash_of("rows.jsonl") != plain


def test_a_remote_file_that_changes_while_it_is_read_is_found(
    served: tuple[str, type[Answers]], tokenizer: Any, tmp_path: Path
) -> None:
    host, kind = served
    kind.content = lines_of("x", 300)
    section = DataSection(
        dataset_path=f"http://{host}/tagged.jsonl", cache_dir=str(tmp_path), validation_split=0.0
    )
    encoder = RowEncoder(tokenizer, 64)
    assert "changed" not in prepare_data(section, encoder=encoder).card.cache
    asked = kind.asked
    kind.tag = '"2"'

    class Watched(list[str]):
        def append(self, words: str) -> None:
            asked.append(words)
            if words.startswith("GET"):
                kind.tag = '"3"'

    kind.asked = Watched()
    data = prepare_data(section, encoder=encoder)
    assert data.card.cache == "not written: a file changed while read"


def test_no_secret_of_an_address_is_kept_or_shown(
    served: tuple[str, type[Answers]], tokenizer: Any, tmp_path: Path
) -> None:
    host, kind = served
    kind.content = lines_of("x", 50)
    path = f"http://me:hidden1@{host}/tagged.jsonl?X-Amz-Date=monday&X-Amz-Signature=hidden2"
    section = DataSection(dataset_path=path, validation_path=path, cache_dir=str(tmp_path))
    told: list[str] = []
    data = prepare_data(section, encoder=RowEncoder(tokenizer, 64), progress=told.append)
    kept = b"".join(one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())
    names = " ".join(str(one) for one in tmp_path.rglob("*"))
    shown = [
        names,
        repr(kept),
        repr(data.card.as_json()),
        repr(card_lines(data.card)),
        repr(data.file_hashes),
        repr(data.source_names),
        section.model_dump_json(),
        repr(find_sources(path)),
        *told,
    ]
    assert len(data.train) == 50
    assert [text for text in shown if "hidden" in text or "monday" in text] == []
    assert data.card.dataset_path == f"http://***@{host}/tagged.jsonl?***"
    other_day = path.replace("monday", "tuesday").replace("hidden", "other")
    again = prepare_data(
        DataSection(dataset_path=other_day, validation_path=other_day, cache_dir=str(tmp_path)),
        encoder=RowEncoder(tokenizer, 64),
    )
    assert again.card.cache.startswith("read from")


@pytest.mark.parametrize("shown", ["http://***@h/a.jsonl", "https://h/a.jsonl?***"])
def test_an_address_that_was_written_down_without_its_secret_says_so(shown: str) -> None:
    with pytest.raises(ConfigError, match="was written down without its password or key"):
        check_files(DataSection(dataset_path=shown))


# ---- stores


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def test_folders_and_patterns_of_a_store_are_read_like_local_ones(
    store: Any, tokenizer: Any
) -> None:
    for name in ("b", "a", "deep/c"):
        store.pipe(f"/rows/{name}.jsonl", lines_of(f"{name}-", 2))
    store.pipe("/rows/notes.txt", b"x")
    store.pipe("/rows/d.csv.gz", gzip.compress(b"question,answer\nd,x\n"))
    assert questions("memory://rows/a.jsonl") == ["a-0", "a-1"]
    assert questions("memory://rows/*.jsonl") == ["a-0", "a-1", "b-0", "b-1"]
    data = prepare_data(
        DataSection(dataset_path="memory://rows", cache=False, validation_split=0.0),
        encoder=RowEncoder(tokenizer, 64),
    )
    found = [prompt for prompt, _ in data.train_texts]
    assert found == ["a-0", "a-1", "b-0", "b-1", "d", "deep/c-0", "deep/c-1"]
    assert data.card.left_out == ("memory:///rows/notes.txt",)


def test_the_hash_of_a_file_of_a_store_is_another_when_it_was_written(store: Any) -> None:
    store.pipe("/a.jsonl", lines_of("x", 2))
    [source] = find_sources("memory://a.jsonl")
    before = source.content_hash()
    assert before.startswith("version:")
    store.pipe("/a.jsonl", lines_of("y", 2))
    assert source.content_hash() != before


def test_nothing_in_a_store_is_one_error(store: Any) -> None:
    for name, reason in (
        ("memory://gone.jsonl", "there is no such file"),
        ("memory://gone/*.jsonl", "matches no file"),
    ):
        with pytest.raises(DataError, match=f"{re.escape(name)}: .*{reason}"):
            check_files(DataSection(dataset_path=name))


def test_a_file_address_is_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of("x", 2))
    assert questions(f"file://{tmp_path}/a.jsonl") == ["x0", "x1"]
    assert questions(f"file://{tmp_path}") == ["x0", "x1"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nope://a/b.jsonl", "nope:// is not known"),
        ("s3://bucket/a.jsonl", r"needs the package s3fs \(pip install 'ultimate-trainer\[s3\]'\)"),
        ("gs://bucket/a.jsonl", r"needs the package gcsfs .*ultimate-trainer\[gcs\]"),
    ],
)
def test_a_scheme_without_its_package_is_one_line_with_the_way_out(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(scheme: str, **_: Any) -> Any:
        raise ImportError(f"install {scheme}")

    if not name.startswith("nope"):
        monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=reason) as caught:
        check_files(DataSection(dataset_path=name))
    assert "\n" not in str(caught.value)


# ---- offline, and the hub


@pytest.mark.parametrize(
    "name", ["https://h/a.jsonl", "s3://b/a.jsonl", "hf://datasets/owner/name/a.jsonl"]
)
def test_offline_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(DataError, match=r"is on another machine, and environment\.offline=true"):
        check_files(DataSection(dataset_path=name), True)


def test_offline_reads_what_is_here(store: Any, tmp_path: Path) -> None:
    store.pipe("/a.jsonl", lines_of("x", 1))
    (tmp_path / "a.jsonl").write_bytes(lines_of("x", 1))
    check_files(DataSection(dataset_path=f"memory://a.jsonl,file://{tmp_path}/a.jsonl"), True)


def test_the_hub_is_not_asked_where_its_own_variable_forbids_it_or_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_back = hub_setting()
    name = "hf://datasets/owner/name@main/rows/*.jsonl"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids asking it"):
        check_files(DataSection(dataset_path=name))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(remote_files, "hub_answers", lambda: False)
    with pytest.raises(DataError, match="the hub does not answer"):
        check_files(DataSection(dataset_path=name))
    put_back()


def test_an_address_of_the_hub_leads_to_its_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def info(self: Any, path: str, **_: Any) -> dict[str, Any]:
        asked.append(path)
        return {"name": path, "type": "file", "size": 10, "blob_id": "abc"}

    hub: Callable[..., Any] = huggingface_hub.HfFileSystem
    monkeypatch.setattr(hub, "info", info)
    monkeypatch.setattr(hub, "isdir", lambda self, path: False)
    monkeypatch.setattr(remote_files, "hub_is_offline", lambda: False)
    monkeypatch.setattr(remote_files, "hub_answers", lambda: True)
    [source] = find_sources("hf://datasets/owner/name/rows/a.jsonl.zst")
    [file] = source.found.files
    assert (file.kind, file.packing) == (".jsonl", ".zst")
    assert source.content_hash().startswith("version:")
    assert set(asked) == {"datasets/owner/name/rows/a.jsonl.zst"}


def test_a_run_that_is_offline_refuses_an_address_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli import main

    words = "train --model tiny --dataset https://me:hidden1@h/a.jsonl --environment.offline true"
    code = main([*words.split(), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code == 2
    assert "https://***@h/a.jsonl: is on another machine" in said
    assert "hidden1" not in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
