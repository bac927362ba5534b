"""Rows that do not fit into memory: the same rows, nothing left, clear when a disk is full."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data import encoded, spool
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.encode_processes import PIECE
from trainer.data.rows import MAX_ERRORS_SHOWN, Example, Row, RowErrors

ROWS = [
    {"question": f"what is {n % 700}?", "answer": f"it is {n}", "weight": 1} for n in range(900)
]
ROWS += [{"text": f"a text about {n}", "weight": 0.5} for n in range(100)]


@pytest.fixture
def prepare(
    tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., RunData]:
    path = write_rows([{"messages": _turns(row)} if n % 3 else row for n, row in enumerate(ROWS)])

    def run(**section: Any) -> RunData:
        options = {"cache": False, "validation_split": 0.1, "on_bad_row": "skip", **section}
        return prepare_data(
            DataSection(dataset_path=str(path), **options),
            encoder=RowEncoder(tokenizer, 64),
            num_preview=3,
            with_columns=True,
        )

    return run


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    question, answer = row.get("question", "?"), row.get("answer", row.get("text"))
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "weight": 0.5},
    ]


def test_rows_that_are_spooled_to_disk_are_those_kept_in_memory(
    prepare: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = prepare()
    monkeypatch.setattr(spool, "MAX_HELD", 5_000)
    monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    spooled = prepare()
    assert isinstance(spooled.train.as_arrays()["ids"], spool.FileArray)
    assert list((tmp_path / "temporary").iterdir()) == [], "its files have no names"
    assert spooled.train.fingerprint() == plain.train.fingerprint()
    assert spooled.validation is not None
    assert plain.validation is not None
    assert spooled.validation.fingerprint() == plain.validation.fingerprint()
    assert spooled.card == plain.card
    assert spooled.preview_prompts == plain.preview_prompts
    assert spooled.train_texts == plain.train_texts
    assert spooled.train_sources.tolist() == [0] * len(plain.train)


@pytest.mark.slow
def test_another_process_reads_spooled_rows_too(
    prepare: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spool, "MAX_HELD", 5_000)
    data = prepare()
    path = tmp_path / "rows.pickle"
    path.write_bytes(pickle.dumps(data.train))
    script = f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')).fingerprint())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == data.train.fingerprint()


def test_no_more_rows_are_in_memory_than_are_worked_on(
    prepare: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    add = encoded.RowStore.add

    def counting(self: Any, piece: Any, rows: Any, **options: Any) -> None:
        nonlocal most
        gc.collect()
        alive = sum(isinstance(thing, Row | Example) for thing in gc.get_objects())
        most = max(most, alive)
        add(self, piece, rows, **options)

    monkeypatch.setattr(encoded.RowStore, "add", counting)
    before = sum(isinstance(thing, Row | Example) for thing in gc.get_objects())
    assert prepare().card.num_rows == 1000
    assert PIECE <= most - before <= 2 * PIECE + 1


FULL = """
import json, resource, sys
from trainer.config.data_section import DataSection
from trainer.data import spool
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import DataError
from trainer.models.tiny import load_tiny_tokenizer

spool.MAX_HELD = 5_000
encoder = RowEncoder(load_tiny_tokenizer(), 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk
try:
    prepare_data(DataSection(dataset_path=sys.argv[1], cache_dir=sys.argv[2]), encoder=encoder)
except DataError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_error_with_what_to_do_and_leaves_nothing(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path, cache = write_rows(ROWS[:900]), tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(cache)],
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said.startswith(f"{cache}: no room for the encoded rows (File too large; ")
    assert "set data.cache_dir" in said
    assert list(cache.iterdir()) == []


def test_a_million_bad_rows_are_counted_and_the_first_are_kept() -> None:
    errors = RowErrors("skip", max_bad_rows=10)
    for number in range(5_000):
        errors.add(f"f:{number}", "is wrong", f"reason {number % 2}")
    assert errors.reasons == {"reason 0": 2_500, "reason 1": 2_500}
    assert errors.errors == [f"f:{number}: is wrong" for number in range(MAX_ERRORS_SHOWN)]
    assert len(errors.by_reason["reason 1"].first) == MAX_ERRORS_SHOWN
    with pytest.raises(Exception, match=r"5,?000 bad rows(.|\n)*and 2,?490 more"):
        errors.raise_if_strict()
