"""`trainer data`: rows with their trained tokens marked, nothing trained; the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.cli import main


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULTIMATE_TRAINER_CACHE", str(tmp_path / "cache"))


def test_inspect_prints_the_card_and_rows_with_the_answer_marked_and_writes_no_run(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([{"question": f"q{n}\x1b[31m", "answer": f"a{n}"} for n in range(8)])
    words = ["--model", "tiny", "--rows", "2", "--data.validation_split", "0.25"]
    assert main(["data", "inspect", str(path), *words]) == 0
    text = capsys.readouterr().out
    assert "6 training, 2 validation, of 8 read" in text
    assert text.count("[a") == 4
    assert "training row 2" in text
    assert "validation row 2" in text
    assert r"q0\x1b[31m" in text.replace("q1", "q0").replace("q2", "q0")
    assert "\x1b[31m" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data.jsonl"]


def test_inspect_names_mistakes_and_exits_with_2(
    write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_rows(["nope"]))
    for words, reason in [
        (["inspect", path, "--model", "tiny"], "data.jsonl:1: not valid JSON"),
        (["inspect", path], "model.model_path is empty"),
        (["inspect", path, "--model", "tiny", "--rows", "-1"], "--rows"),
        (["look"], "inspect, cache"),
        (["cache", "empty"], "invalid choice"),
    ]:
        assert main(["data", *words]) == 2
        assert reason in capsys.readouterr().err


def test_inspect_lists_the_rows_that_were_left_out(
    write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([{"question": "q", "answer": "a"}, "nope"])
    words = ["--model", "tiny", "--data.on_bad_row", "skip"]
    assert main(["data", "inspect", str(path), *words]) == 0
    assert f"rejected  {path}:2: not valid JSON" in capsys.readouterr().out


def test_cache_show_and_clear_count_entries_and_leave_other_files(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "cache", "show"]) == 0
    assert "0 entries" in capsys.readouterr().out
    path = write_rows([{"question": "q", "answer": "a"}])
    main(["data", "inspect", str(path), "--model", "tiny", "--rows", "0"])
    (tmp_path / "cache" / "mine.txt").write_text("keep")
    capsys.readouterr()
    assert main(["data", "cache", "show"]) == 0
    assert "1 entry," in capsys.readouterr().out
    assert main(["data", "cache", "clear"]) == 0
    assert "removed 1 entry" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("option", ["file", "--data.validation_path"])
def test_a_missing_file_is_named_before_the_tokenizer_is_loaded(
    option: str, qa_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> None:
        raise AssertionError("a tokenizer in a .gguf file takes a minute")

    monkeypatch.setattr("trainer.core.preparation.load_tokenizer", slow)
    words = {
        "file": ["absent.jsonl"],
        "--data.validation_path": [str(qa_file), "--data.validation_path", "absent.jsonl"],
    }[option]
    assert main(["data", "inspect", *words, "--model", "tiny"]) == 2
    assert "absent.jsonl: does not exist" in capsys.readouterr().err
