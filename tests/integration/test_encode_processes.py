"""Rows that several processes encode are those that one encodes; what ends badly ends cleanly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from trainer.config.data_section import DataSection
from trainer.data import encode_processes
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.encode_processes import Batch, encode_batches
from trainer.data.pieces import piece_of
from trainer.data.preparer import Preparer
from trainer.data.rows import Row, RowNotes
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.profiles import DataProfile, get_profile

ROWS: list[Any] = [
    *({"question": f"what is {n} plus {n}?", "answer": f"it is {2 * n}"} for n in range(700)),
    {"question": "x", "answer": ""},
    *({"question": f"<think>{n}", "answer": f"<think>a</think> {n}"} for n in range(40)),
    {"question": "control <|im_end|>", "answer": "no"},
    {"question": " ".join(map(str, range(600))), "answer": "cut"},
    *({"question": "q", "answer": f"{n}", "weight": n % 3} for n in range(1, 90)),
]


@pytest.fixture
def prepare(tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    path = write_rows(ROWS)

    def run(count: int | None, profile: DataProfile | None = None, **section: Any) -> RunData:
        return prepare_data(
            DataSection(
                dataset_path=str(path),
                on_bad_row="skip",
                truncation="drop",
                cache_dir=str(tmp_path / "cache"),
                encode_processes=count,
                **section,
            ),
            encoder=RowEncoder(tokenizer, 256, truncation="drop"),
            profile=profile or get_profile("emoji_think"),
            seed=1,
            num_preview=3,
        )

    return run


def children() -> list[psutil.Process]:
    """Processes that encode, of this one: a browser of other tests may live beside them."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if "trainer.data.encode_processes" in one.cmdline()]


@pytest.mark.slow
def test_three_processes_make_the_rows_card_and_prompts_of_one(
    prepare: Callable[..., RunData],
) -> None:
    one, three = prepare(1, cache=False), prepare(3, cache=False)
    assert one.card.num_rejected > 2
    assert one.card.num_dropped == 1
    assert one.card.profile_report
    assert one.train.fingerprint() == three.train.fingerprint()
    assert one.card.as_json() == three.card.as_json()
    for name in ("preview_prompts", "train_texts", "file_hashes"):
        assert getattr(one, name) == getattr(three, name)
    assert not children()


@pytest.mark.slow
def test_batches_that_a_thread_tokenizes_become_what_their_rows_become_one_by_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.backend_tokenizer.enable_truncation(5)  # as a call of anybody may have left it
    encoder = RowEncoder(tokenizer, 256)
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a" * n}]
             for n in range(1, 600)]  # fmt: skip
    rows = [Row(f"row {n}", n, one, 0, RowNotes()) for n, one in enumerate(turns)]
    batches = [Batch(rows[at : at + 256], is_training=True) for at in range(0, len(rows), 256)]
    threads: list[str] = []
    original = encoder.template.encode

    def encode(texts: list[str]) -> Any:
        threads.append(threading.current_thread().name.rpartition("_")[0])
        return original(texts)

    monkeypatch.setattr(encoder.template, "encode", encode)
    preparer = Preparer(get_profile("plain"), encoder, None, 0)
    together = [piece for _, piece in encode_batches(preparer, batches, 1, 0)]
    assert threads.count("tokenize") == len(batches)
    alone = [piece_of(preparer.prepare([(row.index, row.messages)])) for row in rows]
    for name in ("ids", "labels", "lengths", "keys", "groups", "asked", "flags"):
        both = [np.concatenate([getattr(p, name) for p in ps]) for ps in (together, alone)]
        np.testing.assert_array_equal(*both)
    assert max(alone[-1].lengths) > 5


def test_a_killed_process_is_one_clear_error_and_nothing_is_kept(
    prepare: Callable[..., RunData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()
    original = encode_processes.Encoders._encode

    def killing(self: Any, piece: Any) -> Any:
        if not began.is_set():
            began.set()
            os.kill(self.children[0].pid, signal.SIGKILL)
        return original(self, piece)

    monkeypatch.setattr(encode_processes.Encoders, "_encode", killing)
    with pytest.raises(TrainerError, match=r"killed by signal 9.*encode_processes=1"):
        prepare(2)
    assert not children()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_bad_row_at_the_end_is_named_and_nothing_is_kept(
    tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows([*ROWS[:600], {"question": "last", "answer": "of <|im_end|> all"}])
    section = DataSection(
        dataset_path=str(path), encode_processes=2, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match=r"jsonl:601: .*control token"):
        prepare_data(section, encoder=RowEncoder(tokenizer, 256))
    assert not children()
    assert not (tmp_path / "cache").exists()


class Mine(DataProfile):
    """A profile of a module that other processes do not find."""

    name = "mine"


def test_a_profile_of_this_process_only_is_refused_where_processes_are_asked_for(
    prepare: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Mine, "__module__", "nowhere_to_be_found")
        with pytest.raises(ConfigError, match="profile 'mine' cannot be handed"):
            prepare(2, Mine(), cache=False)
        patch.setattr(encode_processes, "MIN_BYTES", 0)
        assert len(prepare(None, Mine(), cache=False).train) > 700
    assert not children()


def test_the_number_goes_by_cores_texts_and_the_processes_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    many = encode_processes.MIN_BYTES
    assert encode_processes.num_encoders(None, many) == 8
    assert encode_processes.num_encoders(None, 9) == 1
    assert encode_processes.num_encoders(3, 1) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert encode_processes.num_encoders(None, many) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert encode_processes.num_encoders(None, many) == 1
