"""Encoded rows come from the cache only where every input is the same; damage is noticed."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data import cache as cache_module
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import TrainerError
from trainer.profiles import DataProfile, get_profile
from trainer.profiles.profile import Regime3Profile

Prepare = Callable[..., RunData]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def prepare(tokenizer: Any, folder: Path, qa_file: Path) -> Prepare:
    def run(
        *, profile: str | DataProfile = "plain", encoder: Any = None, **changes: Any
    ) -> RunData:
        options = {
            "system_prompt": None,
            "is_prompt_configured": False,
            "seed": 1,
            "num_preview": 3,
            "num_final": 2,
        }
        section = {k: changes.pop(k) for k in list(changes) if k not in options}
        return prepare_data(
            DataSection(
                **{"dataset_path": str(qa_file), "cache_dir": str(folder), **section},
            ),
            profile=get_profile(profile) if isinstance(profile, str) else profile,
            encoder=encoder or RowEncoder(tokenizer, 256),
            **{**options, **changes},
        )

    return run


def is_cached(data: RunData) -> bool:
    return data.card.cache.startswith("read from ")


def without_cache_line(data: RunData) -> dict[str, Any]:
    return {**data.card.as_json(), "cache": ""}


def test_the_second_start_reads_the_same_rows_prompts_and_card(prepare: Prepare) -> None:
    one, two = prepare(), prepare()
    assert not is_cached(one)
    assert is_cached(two)
    assert one.validation is not None
    assert two.validation is not None
    assert one.train.fingerprint() == two.train.fingerprint()
    assert one.validation.fingerprint() == two.validation.fingerprint()
    assert two.train.lengths == one.train.lengths
    assert two.train[5]["labels"].equal(one.train[5]["labels"])
    assert without_cache_line(one) == without_cache_line(two)
    for name in ("preview_prompts", "final_prompts", "train_texts", "file_hashes"):
        assert getattr(one, name) == getattr(two, name)


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2},
    "profile": {"profile": "regime3"},
    "system prompt": {"system_prompt": "Be terse."},
    "previews": {"num_preview": 4},
    "split": {"validation_split": 0.25},
    "rows": {"max_rows": 30},
    "policy": {"on_bad_row": "skip"},
    "format": {"format": "question_answer"},
    "weights": {"weights": (2.0,)},
}


@pytest.mark.parametrize("case", CHANGES)
def test_any_other_input_is_encoded_anew(prepare: Prepare, case: str) -> None:
    prepare()
    assert not is_cached(prepare(**CHANGES[case]))
    assert is_cached(prepare(**CHANGES[case]))
    assert is_cached(prepare())


def test_options_without_an_effect_on_rows_keep_the_entry(prepare: Prepare) -> None:
    prepare()
    assert is_cached(prepare(shuffle=False))


def test_changed_content_under_the_same_name_size_and_time_is_encoded_anew(
    prepare: Prepare, qa_file: Path
) -> None:
    prepare(validation_split=0)
    before = qa_file.stat()
    qa_file.write_text(qa_file.read_text().replace("3 plus 3", "3 plus 4", 1))
    os.utime(qa_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert qa_file.stat().st_size == before.st_size
    data = prepare(validation_split=0)
    assert not is_cached(data)
    assert any("3 plus 4" in prompt for prompt, _ in data.train_texts)


def test_another_length_template_or_tokenizer_is_encoded_anew(
    prepare: Prepare, tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    prepare()
    assert is_cached(prepare(encoder=RowEncoder(make_tokenizer(), 256)))
    assert not is_cached(prepare(encoder=RowEncoder(tokenizer, 255)))
    other = make_tokenizer(tokenizer.chat_template.replace("\n", " "))
    assert not is_cached(prepare(encoder=RowEncoder(other, 256)))
    grown = make_tokenizer()
    grown.add_tokens(["plus"])
    assert not is_cached(prepare(encoder=RowEncoder(grown, 256)))


def test_another_version_of_our_code_is_encoded_anew(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    monkeypatch.setattr(cache_module, "own_code_hash", lambda: "changed")
    assert not is_cached(prepare())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_told_and_replaced(
    prepare: Prepare, folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = prepare().train.fingerprint()
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": content[:-5], "empty": b""}[damage])
    data = prepare()
    assert data.card.cache.startswith("damaged entry replaced")
    assert "checksum" in caplog.text
    assert data.train.fingerprint() == whole
    assert is_cached(prepare())


def test_a_folder_that_cannot_be_written_costs_the_cache_only(
    prepare: Prepare, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file, not a folder")
    data = prepare()
    assert "not written" in data.card.cache
    assert "cannot be written" in caplog.text
    assert len(data.train) > 0


def test_a_write_that_fails_half_way_leaves_no_entry_and_no_rest(
    prepare: Prepare, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        assert prepare().card.cache == "not written: No space left on device"
    assert list(folder.iterdir()) == []
    prepare()
    assert is_cached(prepare())


def test_nothing_is_kept_when_the_cache_is_off_or_rows_are_refused(
    prepare: Prepare, folder: Path, write_rows: Callable[..., Path]
) -> None:
    from trainer.errors import DataError

    assert "off" in prepare(cache=False).card.cache
    with pytest.raises(DataError):
        prepare(dataset_path=str(write_rows(["nope"], "bad.jsonl")))
    assert not folder.exists()


PROFILE = """
from trainer.profiles import DataProfile, Message
import {helper}

class Mine(DataProfile):
    name = "mine"

    def transform(self, messages, *, index, seed):
        return [*messages[:-1], Message(role="assistant", content={helper}.WORD)]
"""


@pytest.fixture
def write_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = ("cached_profile", "cached_helper")

    def write(word: str, *, is_old: bool = True) -> DataProfile:
        (tmp_path / "cached_profile.py").write_text(PROFILE.format(helper="cached_helper"))
        (tmp_path / "cached_helper.py").write_text(f"WORD = {word!r}\n")
        if is_old:  # as if written before this process began
            for name in names:
                os.utime(tmp_path / f"{name}.py", (1e9, 1e9))
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return get_profile("cached_profile:Mine")

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_custom_profile_is_cached_until_its_code_or_what_it_imports_changes(
    prepare: Prepare, write_profile: Callable[..., Any]
) -> None:
    prepare(profile=write_profile("one"))
    assert is_cached(prepare(profile=write_profile("one")))
    data = prepare(profile=write_profile("two!"))
    assert not is_cached(data)
    assert data.train_texts[0][1] == "two!"


def test_a_profile_edited_since_the_process_began_is_not_cached(
    prepare: Prepare, write_profile: Callable[..., Any], folder: Path
) -> None:
    data = prepare(profile=write_profile("one", is_old=False))
    assert data.card.cache.startswith("not used: code edited since")
    assert not folder.exists()


def test_when_a_process_began_is_known_to_a_tick_so_files_written_just_before_are_older() -> None:
    code = "from trainer.data import cache_key; print(cache_key._began_at())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.02 <= float(done.stdout) <= time.time()


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    prepare: Prepare, qa_file: Path, folder: Path
) -> None:
    class Writing(Regime3Profile):
        """Rows are transformed after the file was read and before it is hashed again."""

        def transform(self, messages: Any, *, index: int, seed: int) -> Any:
            qa_file.write_text(qa_file.read_text() + "\n")
            return messages

    Writing.__module__ = "trainer.test"  # cacheable like one of our own
    data = prepare(profile=Writing())
    assert data.card.cache == "not written: a file changed while read"
    assert not folder.exists()


def test_a_profile_without_a_source_file_is_not_cached(prepare: Prepare, folder: Path) -> None:
    made = type("Made", (DataProfile,), {"__module__": "made_of_nothing", "name": "made"})
    data = prepare(profile=made())
    assert data.card.cache.startswith("not used: profile code without a source file")
    assert not folder.exists()


def test_what_cannot_be_described_is_refused_and_not_guessed() -> None:
    with pytest.raises(cache_module.NotCacheableError):
        cache_module.describe({"x": object()})
    with pytest.raises(cache_module.NotCacheableError):
        cache_module.describe(lambda: 1)
    assert cache_module.describe(Regime3Profile()) != cache_module.describe(get_profile("plain"))


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULTIMATE_TRAINER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_module.default_cache_dir() == Path("/somewhere/ultimate-trainer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_module.default_cache_dir() == Path.home() / ".cache" / "ultimate-trainer"
    monkeypatch.setenv("ULTIMATE_TRAINER_CACHE", "/own")
    assert cache_module.default_cache_dir() == Path("/own")


def test_rows_stay_in_the_file_also_where_its_name_is_gone(prepare: Prepare, folder: Path) -> None:
    data, plain = prepare(), prepare(cache=False)
    (path,) = folder.iterdir()
    path.unlink()
    assert data.train.fingerprint() == plain.train.fingerprint()
    assert data.train_texts == plain.train_texts
    again = pickle.loads(pickle.dumps(plain.train))
    assert again.fingerprint() == plain.train.fingerprint()


def test_an_entry_that_another_run_removes_at_once_costs_nothing(
    prepare: Prepare, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepare(cache=False)
    write = cache_module.CacheEntry.write

    def removed(self: Any, *rest: Any) -> Any:
        found = write(self, *rest)
        self.path.unlink()
        return found

    monkeypatch.setattr(cache_module.CacheEntry, "write", removed)
    data = prepare()
    assert data.train.fingerprint() == plain.train.fingerprint()
    assert list(folder.iterdir()) == []


def test_a_file_that_is_cut_off_under_a_run_is_an_error_with_words(
    prepare: Prepare, folder: Path
) -> None:
    data = prepare()
    (path,) = folder.iterdir()
    os.truncate(path, 200)
    with pytest.raises(TrainerError, match=r"cannot be read any more \(it was cut off\)"):
        data.train[3]
