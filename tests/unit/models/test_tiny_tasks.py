"""The demo's data and the tokenizer made from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError, OutputError
from trainer.models.make_tiny_tokenizer import save_tokenizer
from trainer.models.tiny import (
    DEMO_SYSTEM_PROMPT,
    OPERATIONS,
    TINY_TOKENIZER_DIR,
    DemoData,
    Task,
    load_tiny_tokenizer,
    make_tasks,
    operation_of,
    write_demo_data,
)
from trainer.profiles.profile import wrap_answer


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, *, rows: int = 2000, seed: int = 0, **options: Any) -> DemoData:
    return write_demo_data(folder, num_train_rows=rows, seed=seed, **options)


def test_questions_and_answers_read_as_documented() -> None:
    rows = [
        (Task("max", (17, 42)), "max of 17 and 42?", "(max 17 42) = 42"),
        (Task("min", (42, 17)), "min of 42 and 17?", "(min 42 17) = 17"),
        (Task("first", (42, 17)), "first of 42 and 17?", "(first 42 17) = 42"),
        (Task("last", (42, 17)), "last of 42 and 17?", "(last 42 17) = 17"),
        (Task("rev", (120,)), "rev of 120?", "(rev 120) = 021"),
    ]
    assert [task.operation for task, _, _ in rows] == list(OPERATIONS)
    for task, question, answer in rows:
        assert (task.question, task.answer) == (question, answer)
        assert operation_of(question) == task.operation


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_question_is_trained_on(tmp_path: Path, seed: int) -> None:
    data = write(tmp_path, rows=20_000, seed=seed)
    # The operation and its arguments stand in brackets at the start of the answer.
    train, held_out = (
        {row["answer"].split(" = ")[0] for row in read(path)}
        for path in (data.train_path, data.validation_path)
    )
    assert len(held_out) == 200
    assert not train & held_out


def test_rows_are_spread_evenly_and_held_out_ones_are_all_different(tmp_path: Path) -> None:
    data = write(tmp_path, rows=1003)
    train, held_out = read(data.train_path), read(data.validation_path)
    assert len(train) == 1003
    assert len({row["question"] for row in held_out}) == 200
    counts = Counter(operation_of(row["question"]) for row in train)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(Counter(operation_of(row["question"]) for row in held_out).values()) == {40}
    assert data.operations == OPERATIONS
    # In random order: the first rows are not all of one operation.
    assert len({operation_of(row["question"]) for row in train[:30]}) == len(OPERATIONS)


def test_the_same_seed_writes_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from trainer.models.tiny import write_demo_data; "
        "write_demo_data(Path(sys.argv[1]), num_train_rows=500, seed=3)"
    )
    for name, hash_seed in (("a", "1"), ("b", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment)
    for file in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_seed_holds_out_other_questions(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", seed=1), write(tmp_path / "b", seed=2)
    questions = [{row["question"] for row in read(d.validation_path)} for d in (first, second)]
    assert len(questions[0] & questions[1]) < 20


def test_the_baselines_are_counted_from_the_files(tmp_path: Path) -> None:
    data = write(tmp_path, rows=16_640)
    train, held_out = read(data.train_path), read(data.validation_path)
    answers = Counter(row["answer"] for row in train)
    assert data.commonest_answer_share == 0.0
    assert not answers.keys() & {row["answer"] for row in held_out}
    results = Counter(row["answer"].split(" = ")[1] for row in train).most_common(1)[0][0]
    hits = sum(row["answer"].split(" = ")[1] == results for row in held_out)
    assert hits > 0, "this seed tells nothing"
    assert data.commonest_result_share == hits / 200


@pytest.mark.parametrize(("rows", "held_out"), [(4, 200), (100, 4), (100, 5 * 226)])
def test_sizes_that_cannot_work_are_refused(tmp_path: Path, rows: int, held_out: int) -> None:
    with pytest.raises(ConfigError, match=r"at (least|most)"):
        write(tmp_path, rows=rows, num_validation_rows=held_out)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write(tmp_path / "file")


def test_the_committed_tokenizer_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in TINY_TOKENIZER_DIR.iterdir()}
    assert made == committed


def test_a_demo_row_is_at_most_46_tokens() -> None:
    train, _ = make_tasks(500, 200, seed=0)
    rows = [
        [
            {"role": "system", "content": DEMO_SYSTEM_PROMPT},
            {"role": "user", "content": task.question},
            {"role": "assistant", "content": wrap_answer(task.answer)},
        ]
        for task in train
    ]
    ids = load_tiny_tokenizer().apply_chat_template(rows, return_dict=True)["input_ids"]
    assert max(map(len, ids)) <= 46
