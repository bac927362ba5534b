"""Bad input: exit code 2, one message that says what to do, no traceback, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main

GOOD = {"question": "what is 1 plus 1?", "answer": "2"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A function that runs `trainer train WORDS`, expects a refusal, and returns the message."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("COLUMNS", "TRAINER_HYPERPARAMS__MAX_STEPS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> str:
        usual = {"--model": "tiny", "--output": "out", "--max-steps": "2"}
        given = [word for pair in usual.items() if pair[0] not in words for word in pair]
        code = main(["train", *given, *words])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        assert error.count("error: ") == 1, error
        assert list(here.iterdir()) == []
        return error

    return run


def messages(turns: list[dict[str, str]]) -> dict[str, Any]:
    return {"messages": turns}


ROWS: dict[str, tuple[list[Any], str]] = {
    "bad json": ([GOOD, "{nope"], "data.jsonl:2: not valid JSON"),
    "bad utf-8": ([GOOD, b'{"question": "\xff", "answer": "a"}'], "data.jsonl:2: not UTF-8"),
    "no assistant": ([messages(TURNS), messages(TURNS[:1])], "data.jsonl:2: row has no assistant"),
    "unknown role": (
        [messages([{"role": "robot", "content": "x"}, *TURNS])],
        "data.jsonl:1: messages[0] has role 'robot'",
    ),
    "wrong type": ([{"question": ["a"], "answer": "a"}], "data.jsonl:1: 'question' is list"),
    "other keys": ([{"foo": 1}], "data.jsonl:1: row has the keys ['foo']"),
    "empty answer": (
        [{"question": "q", "answer": "  "}],
        "data.jsonl:1: an assistant turn is empt",
    ),
    "not an object": (["[1, 2]"], "data.jsonl:1: row is a JSON list"),
    "no rows": ([], "the file is empty"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_by_file_and_line(
    name: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    rows, expected = ROWS[name]
    path = tmp_path / "data.jsonl"
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert expected in refused("--dataset", str(path))


def test_all_bad_rows_are_named_at_once(
    refused: Callable[..., str], write_rows: Callable[..., Path]
) -> None:
    error = refused("--dataset", str(write_rows([GOOD, "{", GOOD, "}"])))
    assert "data.jsonl:2" in error
    assert "data.jsonl:4" in error
    assert "data.on_bad_row=skip" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataset", "absent.jsonl"], "absent.jsonl: does not exist"),
        (["--dataset", "."], ".: holds no file of rows"),
        (["--dataset", "*.jsonl"], "*.jsonl: matches no file"),
        ([], "--dataset"),
        (["--dataset", "DATA", "--model", "./absent"], "there is no such folder"),
        (["--dataset", "DATA", "--model", "qwen33"], "Did you mean --model qwen3?"),
        (["--dataset", "DATA", "--profile", "regime4"], "regime3"),
        (["--dataset", "DATA", "--profile", "absent:Class"], "cannot import"),
        (["--dataset", "DATA", "--profile.options", "x=1"], "does not know"),
        (["--dataset", "DATA", "--batch-size", "zero"], "batch_size"),
        (["--dataset", "DATA", "--batch-size", "0"], "batch_size"),
        (["--dataset", "DATA", "--nope", "1"], "unknown flag --nope"),
        (["--dataset", "DATA", "--fp16"], "fp16 needs a CUDA GPU"),
        (["--dataset", "DATA", "--max-length", "99999"], "context of 2048"),
        (["--dataset", "DATA", "--max-length", "8"], "nothing to train"),
        (["--dataset", "DATA", "--resume"], "nothing to resume"),
        (["--dataset", "DATA", "--resume", "step-1"], "nothing to resume"),
        (["--resume", "--output", "absent"], "absent holds no run"),
        (["--dataset", "DATA", "--locked.vocab_size", "7"], "locked.vocab_size=7"),
        (["--dataset", "DATA", "--hyperparams.warmup_steps", "9"], "max_steps"),
        (["--dataset", "DATA", "--environment.device", "cuda:7"], "CUDA devices"),
        (["--dataset", "DATA", "--config", "absent.json"], "no such config file"),
        (["--dataset", "DATA", "--monitoring.preview_backend", "remote_3090"], "remote_3090_host"),
        (["--dataset", "DATA", "--monitoring.report_to", "wandb_"], "Did you mean 'wandb'?"),
        (["--dataset", "DATA", "--model.revision", "main"], "model.revision='main'"),
        (
            ["--dataset", "DATA", "--model.attn_implementation", "flash_attention_2"],
            "model.attn_implementation=flash_attention_2",
        ),
        (
            ["--dataset", "DATA", "--model.attn_implementation", "flash_atention_2"],
            "did you mean 'flash_attention_2'?",
        ),
        (
            ["--dataset", "DATA", "--model.attn_implementation", "flex_attention"],
            "no backward pass on the CPU",
        ),
        (
            ["--dataset", "DATA", "--model.attn_implementation", "owner/kernel"],
            "pip install 'ultimate-trainer[kernels]'",
        ),
        (["--dataset", "DATA", "--epochs", "inf"], "finite number"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_bad_option_is_named(
    words: list[str], expected: str, refused: Callable[..., str], qa_file: Path
) -> None:
    assert expected in refused(*[str(qa_file) if word == "DATA" else word for word in words])


def test_an_unknown_variable_is_refused(
    refused: Callable[..., str], qa_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_NOPE", "1")
    assert "TRAINER_NOPE" in refused("--dataset", str(qa_file))


def test_an_output_that_cannot_be_written_is_refused(
    refused: Callable[..., str], qa_file: Path
) -> None:
    assert "cannot be written" in refused("--dataset", str(qa_file), "--output", "/proc/run")


def test_a_folder_that_holds_a_run_is_left_as_it_is(
    refused: Callable[..., str], qa_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "earlier"
    out.mkdir()
    (out / "run.json").write_text("{}")
    error = refused("--dataset", str(qa_file), "--output", str(out))
    assert "holds a run already" in error
    assert "--resume" in error
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_template_that_cannot_be_proved_is_refused_before_the_weights(
    refused: Callable[..., str],
    qa_file: Path,
    tmp_path: Path,
    make_tokenizer: Callable[..., Any],
    make_model: Callable[..., Any],
) -> None:
    folder = tmp_path / "odd"
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}")
    tokenizer.save_pretrained(folder)
    make_model(vocab_size=len(tokenizer)).config.save_pretrained(folder)
    assert "template" in refused("--dataset", str(qa_file), "--model", str(folder))


def test_a_vocabulary_larger_than_the_embedding_is_refused(
    refused: Callable[..., str],
    qa_file: Path,
    tmp_path: Path,
    tokenizer: Any,
    make_model: Callable[..., Any],
) -> None:
    folder = tmp_path / "small"
    make_model(vocab_size=100).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    error = refused("--dataset", str(qa_file), "--model", str(folder))
    assert "embedding has 100 rows" in error


def test_a_refused_run_leaves_the_other_files_of_its_folder(
    refused: Callable[..., str],
    qa_file: Path,
    tmp_path: Path,
    tokenizer: Any,
    make_model: Callable[..., Any],
) -> None:
    folder, out = tmp_path / "no_weights", tmp_path / "mine"
    make_model(vocab_size=len(tokenizer)).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = ["--dataset", str(qa_file), "--model", str(folder), "--output", str(out)]
    assert "cannot load the model" in refused(*words)
    names = {path.name for path in out.iterdir()}
    assert "notes.txt" in names
    assert not names & {"run.json", "status.json", "checkpoints", ".lock"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_two_and_three_rows_train_and_say_what_is_validated(
    count: int,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"question": f"what is {n}?", "answer": str(n)} for n in range(count)]
    out = tmp_path / "out"
    words = ["--model", "tiny", "--output", str(out), "--max-steps", "1", "--fp32"]
    words += ["--monitoring.preview_max_tokens", "4"]
    assert main(["train", "--dataset", str(write_rows(rows)), *words]) == 0
    assert "fewer than two" in capsys.readouterr().out
    card = json.loads((out / "run.json").read_text())["data_card"]
    assert (card["num_train_rows"], card["num_validation_rows"]) == (count, 0)


def test_bad_rows_are_counted_and_left_out_when_asked_to(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_rows([GOOD, "{nope", GOOD]), tmp_path / "out"
    words = ["--model", "tiny", "--max-steps", "1", "--monitoring.preview_max_tokens", "4"]
    words += ["--data.on_bad_row", "skip", "--output", str(out)]
    assert main(["train", "--dataset", str(path), *words]) == 0
    assert "1 row: 1 not JSON" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["data_card"]["num_rejected"] == 1
