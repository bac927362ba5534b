"""What is read before the first step of a streamed run, what comes later, and what goes wrong."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from trainer.config.data_section import DataSection
from trainer.data import encode_processes, stream_reader, stream_rows
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.ring import Ring
from trainer.data.source_shares import with_sources
from trainer.data.stream_order import StreamOrder
from trainer.data.streaming import prepare_stream
from trainer.errors import ConfigError, DataError, ResumeError, TrainerError
from trainer.profiles import get_profile

GROUP = 4


def row(number: int) -> dict[str, Any]:
    return {"question": f"what is {number}?", "answer": f"it is {number}. " * (number % 4 + 1)}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_reader, "PIECE", 8)
    monkeypatch.setattr(stream_reader, "LOOK", 16)
    monkeypatch.setattr(stream_rows, "MIN_AHEAD", 8)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Any) -> Iterator[Callable[..., RunData]]:
    """A function that prepares a stream of some rows, or of a file."""
    opened: list[Any] = []

    def run(rows: list[Any] | Path, /, **options: Any) -> RunData:
        path = rows if isinstance(rows, Path) else write(tmp_path / "rows.jsonl", rows)
        others = {
            name: options.pop(name)
            for name in ("profile", "resume", "num_preview", "num_score", "offline")
            if name in options
        }
        length = options.pop("max_length", 64)
        section = {"dataset_path": str(path), "streaming": True, "shuffle_buffer": 24, **options}
        data = prepare_stream(
            DataSection.model_validate(section), encoder=RowEncoder(tokenizer, length), **others
        )
        opened.append(data.train)
        return data

    yield run
    for one in opened:
        one.close()


def order_of(data: RunData, **options: Any) -> StreamOrder:
    rows = data.train
    assert isinstance(rows, stream_rows.StreamedDataset)
    return StreamOrder(rows, group_size=GROUP, seed=3, **{"num_steps": 10**6, **options})


def taken(data: RunData, count: int, **options: Any) -> list[str]:
    """The questions of the first rows in their order."""
    found = []
    for number in order_of(data, **options):
        text, answer = data.train_texts[number]
        ids = data.train[number]["input_ids"].tolist()
        assert answer in data.encoder.tokenizer.decode(ids)
        found.append(text.removeprefix("what is ").removesuffix("?"))
        if len(found) == count:
            break
    return found


def test_what_is_read_before_the_first_step_is_the_buffer_and_enough_held_out_rows(
    prepare: Callable[..., RunData],
) -> None:
    data = prepare([row(n) for n in range(1000)], validation_split=0.2)
    assert data.validation is not None
    assert 64 <= len(data.validation) < 64 + 8
    assert data.card.num_rows == data.card.num_train_rows + data.card.num_validation_rows < 450
    few = prepare([row(n) for n in range(1000)], validation_split=0)
    assert few.validation is None
    assert few.card.num_rows == 24
    lines = dict(card_lines(few.card))
    assert lines["streaming"].startswith("24 rows are read before the first step, the others while")
    assert "so far" in lines["tokens"]
    assert few.card.format == "question_answer"


def test_rows_are_held_out_by_their_prompt_alone_wherever_they_stand(
    prepare: Callable[..., RunData],
) -> None:
    def held(rows: list[Any]) -> set[str]:
        data = prepare(rows, validation_split=0.3, num_preview=999)
        return {request.prompt for request in data.preview_prompts}

    rows = [row(n) for n in range(60)]
    assert 5 < len(held(rows)) < 35
    assert held(rows) == held(rows[::-1])
    assert held(rows[:30]) == held(rows) & {one["question"] for one in rows[:30]}


def test_rows_of_a_prompt_that_many_share_are_held_out_by_their_content(
    prepare: Callable[..., RunData],
) -> None:
    """Else all of them, most of the file, could be held out."""
    rows = [{"question": f"say a number{n % 3}", "answer": f"it is {n}"} for n in range(300)]
    data = prepare(rows, validation_split=0.2, shuffle_buffer=999)
    assert data.validation is not None
    assert 30 < len(data.validation) < 90
    assert data.card.num_train_rows == 300 - len(data.validation)
    assert data.card.num_leaked == len(data.validation)


def test_labels_and_ids_are_those_of_a_run_that_does_not_stream(
    prepare: Callable[..., RunData], tmp_path: Path, tokenizer: Any
) -> None:
    rows = [row(n) for n in range(50)]
    data = prepare(rows, validation_split=0, shuffle=False)
    section = DataSection(
        dataset_path=str(tmp_path / "rows.jsonl"), validation_split=0, cache=False
    )
    whole = prepare_data(section, encoder=RowEncoder(tokenizer, 64), profile=get_profile("plain"))
    data.train.wait(49)  # type: ignore[attr-defined]
    for number in range(50):
        for key, value in whole.train[number].items():
            assert data.train[number][key].tolist() == value.tolist()
        assert data.train_texts[number] == whole.train_texts[number]


def test_the_ring_holds_few_rows_however_many_there_are(
    prepare: Callable[..., RunData],
) -> None:
    data = prepare([row(n) for n in range(2000)], validation_split=0)
    ring, largest = data.train.ring, 0  # type: ignore[attr-defined]
    for count, number in enumerate(order_of(data), start=1):
        largest = max(largest, ring.num_bytes)
        assert data.train[number]
        if count == 1800:
            break
    of_row = sum(data.train.lengths) / len(data.train.lengths) * 8 + 20
    assert largest < 8 * 24 * of_row
    assert ring._file.seek(0, 2) < 12 * 24 * of_row  # room that was given back is used again


def test_a_ring_without_room_for_the_buffer_is_refused_before_training(
    prepare: Callable[..., RunData],
) -> None:
    with pytest.raises(DataError, match=r"data\.cache_max_gib=.* lower data\.shuffle_buffer"):
        prepare([row(n) for n in range(1000)], validation_split=0, cache_max_gib=1e-6)


def test_a_ring_that_fills_up_while_rows_are_waited_for_ends_the_wait(
    prepare: Callable[..., RunData],
) -> None:
    rows = [row(n) for n in range(64)] + [{**row(n), "answer": "it is so. " * 9} for n in range(99)]
    data = prepare(rows, validation_split=0, cache_max_gib=1.5e-5, shuffle_buffer=30)
    with pytest.raises(DataError, match=r"data\.cache_max_gib"):
        taken(data, 160)


def test_a_full_disk_is_told_in_words(
    prepare: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare([row(n) for n in range(200)], validation_split=0)

    class Full:
        def seek(self, *_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(data.train.ring, "_file", Full())  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no room for the rows that are read ahead"):
        taken(data, 100)


def test_a_bad_row_far_behind_ends_the_run_where_it_is_needed_and_names_its_line(
    prepare: Callable[..., RunData],
) -> None:
    rows: list[Any] = [row(n) for n in range(200)]
    rows[150] = '{"question": "what'
    data = prepare(rows, validation_split=0, shuffle=False)
    with pytest.raises(DataError, match=r"rows\.jsonl:151.*(\n.*)*on_bad_row=skip"):
        taken(data, 190, shuffle=False)
    data = prepare(rows, validation_split=0, shuffle=False)
    assert len(taken(data, 100, shuffle=False)) == 100


def test_bad_rows_are_left_out_and_counted_once_however_often_the_file_is_read(
    prepare: Callable[..., RunData],
) -> None:
    rows: list[Any] = [row(n) for n in range(100)]
    rows[50], rows[70] = '{"question": "what', {"question": "x", "answer": ""}
    data = prepare(rows, validation_split=0, on_bad_row="skip")
    order = order_of(data, group_by_length=False)
    names = []
    for number in order:
        names.append(data.train_texts[number][0])
        if len(names) == 98 * 3:
            break
    assert sorted(names) == sorted(
        3 * [one["question"] for n, one in enumerate(rows) if n not in (50, 70)]
    )
    read = order.read_up_to(98 * 3 // GROUP)
    assert read.num_read == 100
    assert read.rows_per_pass == 98
    assert sum(read.rejected.values()) == 2
    assert any(":51:" in one for one in read.errors)
    assert "rejected: " in read.words()
    limited = prepare(rows, validation_split=0, on_bad_row="skip", max_bad_rows=1)
    with pytest.raises(DataError, match="max_bad_rows=1"):
        taken(limited, 98)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_resume_reads_on_where_it_was_and_counts_as_if_it_had_never_stopped(
    prepare: Callable[..., RunData], processes: int
) -> None:
    rows: list[Any] = [row(n) for n in range(100)]
    rows[30], rows[70] = '{"question": "what', '{"question": "what'
    options = {"on_bad_row": "skip", "validation_split": 0.2, "encode_processes": processes}
    data = prepare(rows, **options)
    order = order_of(data, num_steps=60)
    names, states = [], {}
    for count, number in enumerate(order):
        if count % GROUP == 0:
            states[count // GROUP] = json.loads(json.dumps(order.state(count // GROUP)))
        names.append(data.train_texts[number][0])
    for step in (1, 11, 29, 47):
        again = prepare(rows, **options, resume=states[step])
        rest = order_of(again, num_steps=60)
        numbers = iter(rest)
        assert [next(numbers) for _ in range(step * GROUP)] == [-1] * step * GROUP
        assert [again.train_texts[n][0] for n in numbers] == names[step * GROUP :]
        assert rest.read_up_to(60) == order.read_up_to(60)
        assert again.train.fingerprint() == data.train.fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows[:40], {**rows[40], "answer": "it is 50. "}, *rows[41:]], "40 rows"),
        (lambda rows: [*rows, rows[0]], "bytes, and at the checkpoint it had"),
        (lambda rows: rows[:50], "bytes, and at the checkpoint it had"),
    ],
)
def test_a_resume_on_other_rows_is_refused(
    prepare: Callable[..., RunData], change: Callable[[list[Any]], list[Any]], words: str
) -> None:
    rows = [row(n) for n in range(100)]
    order = order_of(prepare(rows, validation_split=0))
    taken_of = iter(order)
    for _ in range(80):
        next(taken_of)
    state = order.state(20)
    assert state["mark"]["row"] > 40
    with pytest.raises(ResumeError, match="Restore the data file") as caught:
        prepare(change(rows), validation_split=0, resume=state)
    assert words.replace("40", str(state["mark"]["row"])) in str(caught.value)


def test_a_file_that_changes_while_it_is_streamed_is_found_at_the_end_of_the_pass(
    prepare: Callable[..., RunData], tmp_path: Path
) -> None:
    rows = [row(n) for n in range(60)]
    data = prepare(rows, validation_split=0, shuffle=False)
    order = iter(order_of(data, shuffle=False))
    for _ in range(60):
        next(order)
    write(tmp_path / "rows.jsonl", [*rows[:30], {**rows[30], "answer": "no"}, *rows[31:]])
    with pytest.raises(DataError, match=r"pass \d over the rows read others than the first"):
        list(itertools.islice(order, 400))


def test_two_processes_have_rows_of_their_own_in_each_step(
    prepare: Callable[..., RunData],
) -> None:
    found = []
    for rank in range(2):
        data = prepare([row(n) for n in range(100)], validation_split=0)
        batches = BatchSampler(order_of(data, num_steps=40), 1, drop_last=False)
        shard = BatchSamplerShard(batches, 2, rank)
        found.append([data.train_texts[n][0] for batch in shard for n in batch])
    [data] = [prepare([row(n) for n in range(100)], validation_split=0)]
    both = [name for pair in zip(*found, strict=True) for name in pair]
    numbers = order_of(data, num_steps=40)
    assert both == [data.train_texts[n][0] for n in numbers]


def test_rows_with_loss_weights_are_weighted_and_late_ones_refused(
    prepare: Callable[..., RunData],
) -> None:
    def chat(number: int, weight: float) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"what is {number}?"}]
        return {"messages": [*turns, {"role": "assistant", "content": "it", "weight": weight}]}

    early = [chat(n, 0.5 if n == 3 else 1) for n in range(60)]
    data = prepare(early, validation_split=0, shuffle=False)
    assert data.train[3]["loss_weights"].max() == 0.5
    assert data.train[4]["loss_weights"].max() == 1
    assert len(data.train[-1]["loss_weights"]) == 1
    late = [chat(n, 0.5 if n == 50 else 1) for n in range(60)]
    data = prepare(late, validation_split=0, shuffle=False)
    assert "loss_weights" not in data.train[3]
    with pytest.raises(DataError, match=r":51: the row has loss weights, and none of the first"):
        taken(data, 60, shuffle=False)


def test_plain_text_that_comes_late_is_refused_for_a_profile_that_rewrites_turns(
    prepare: Callable[..., RunData], tmp_path: Path
) -> None:
    first = write(tmp_path / "first.jsonl", [row(n) for n in range(60)])
    late = write(tmp_path / "late.jsonl", [{"text": "the quick brown fox"}] * 20)
    data = prepare(
        Path(f"{first},{late}"),
        validation_split=0,
        max_length=300,
        profile=get_profile("emoji_think", {}),
    )
    with pytest.raises(ConfigError, match=r"late\.jsonl:1 is plain text"):
        taken(data, 80)


def test_validation_path_is_read_whole_and_nothing_of_the_stream_is_held_out(
    prepare: Callable[..., RunData], tmp_path: Path
) -> None:
    other = write(tmp_path / "held.jsonl", [row(n) for n in range(500, 540)])
    data = prepare([row(n) for n in range(60)], validation_path=str(other))
    assert data.validation is not None
    assert len(data.validation) == 40
    names = taken(data, 60, group_by_length=False)
    assert sorted(names, key=int) == [str(n) for n in range(60)]


def test_rows_of_several_files_say_which_they_are_of(
    prepare: Callable[..., RunData], tmp_path: Path
) -> None:
    first = write(tmp_path / "first.jsonl", [row(n) for n in range(20)])
    second = write(tmp_path / "second.jsonl", [row(n) for n in range(20, 60)])
    section = {"validation_split": 0, "shuffle": False}
    data = prepare(Path(f"{first},{second}"), **section)
    assert len(data.train_sources) == data.card.num_train_rows == 24
    data = with_sources(DataSection(), data)
    data.train.wait(40)  # type: ignore[attr-defined]
    for number, source in ((0, 0), (19, 0), (20, 1), (40, 1)):
        assert set(data.train[number]["sources"].tolist()) == {source}


def test_a_stream_without_a_training_row_ends_with_what_became_of_all(
    prepare: Callable[..., RunData],
) -> None:
    with pytest.raises(DataError, match="nothing to train: 3 rows were rejected"):
        prepare([{**row(n), "answer": ""} for n in range(3)], on_bad_row="skip")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that encode, as they are started."""
    started: list[Any] = []
    original = encode_processes.Child

    def start(*args: Any, **options: Any) -> Any:
        started.append(original(*args, **options))
        return started[-1]

    monkeypatch.setattr(encode_processes, "Child", start)
    return started


def test_a_process_that_encodes_and_is_killed_ends_the_run_with_its_number(
    prepare: Callable[..., RunData], children: list[Any]
) -> None:
    data = prepare([row(n) for n in range(300)], validation_split=0, encode_processes=2)
    for child in children:
        child.process.kill()
    with pytest.raises(TrainerError, match="a process that encodes rows"):
        taken(data, 900)  # what was on its way are a few pieces


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_left_running_when_a_stream_is_closed(
    count: int, prepare: Callable[..., RunData], children: list[Any]
) -> None:
    before = set(threading.enumerate())  # what other tests left to the collector
    data = prepare([row(n) for n in range(300)], validation_split=0, encode_processes=count)
    taken(data, 20)
    assert set(threading.enumerate()) - before
    assert len(children) == (count if count > 1 else 0)
    data.train.close()  # type: ignore[attr-defined]
    assert not set(threading.enumerate()) - before
    assert all(child.process.poll() is not None for child in children)


# ---- the ring


def test_room_that_was_given_back_is_used_again(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 100)
    arrays = [np.full(40, number, np.uint8) for number in range(4)]
    first, second = ring.put(arrays[:1]), ring.put(arrays[1:2])
    assert (first, second) == (0, 40)
    assert ring.put(arrays[2:3]) is None
    ring.free(0)
    assert ring.put(arrays[2:3]) == 0
    assert ring.read(0, "u1", 40).tolist() == [2] * 40
    assert ring.read(40, "u1", 40).tolist() == [1] * 40
    assert not list(tmp_path.iterdir())  # the file has no name
    ring.close()


# ---- one template, two threads


def test_a_thread_that_encodes_and_one_that_renders_do_not_meet_in_the_template(
    tokenizer: Any,
) -> None:
    """transformers keeps one compiled template of each text, whoever renders it."""
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it is"}]
    rows = [[dict(turn) for turn in turns] for _ in range(40)]
    expected = RowEncoder(tokenizer, 64).encode_all(rows)
    problems: list[BaseException] = []

    def encode() -> None:
        encoder = pickle.loads(pickle.dumps(RowEncoder(tokenizer, 64)))
        try:
            for _ in range(20):
                found = encoder.encode_all(rows)
                assert [one.labels for one in found] == [one.labels for one in expected]
        except BaseException as error:
            problems.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=encode) for _ in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        sys.setswitchinterval(before)
    assert not problems
