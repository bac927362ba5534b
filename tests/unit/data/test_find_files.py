"""Folders, patterns, packed files: which files a name means, in which order, what is not read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.find_files import find_files
from trainer.data.row_files import raw_rows
from trainer.data.rows import RowErrors
from trainer.data.sources import Source, check_files, find_sources, read_rows
from trainer.errors import ConfigError, DataError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"question": f"{name}{n}", "answer": f"a{n}"} for n in range(count)]


def lines_of(name: str, count: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows_of(name, count)).encode()


def write(folder: Path, **counts: int) -> None:
    """`a__b` is the file `a/b.jsonl`."""
    for name, count in counts.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines_of(name, count))


def questions(name: str, **options: Any) -> list[str]:
    section = DataSection(dataset_path=name, **options)
    rows, _ = collected(
        read_rows(find_sources(name), section, RowErrors("strict"), max_rows=section.max_rows)
    )
    return [row.messages[0]["content"] for row in rows]


@pytest.fixture
def prepare(tokenizer: Any) -> Callable[..., RunData]:
    def run(path: str, **section: Any) -> RunData:
        options = {"validation_split": 0.0, "cache": False, **section}
        return prepare_data(
            DataSection(dataset_path=path, **options), encoder=RowEncoder(tokenizer, 256)
        )

    return run


def test_a_pattern_is_its_files_sorted_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, rows__b=1, rows__a=2, rows__deep__c=1, rows__d=1)
    (tmp_path / "rows" / "d.jsonl").rename(tmp_path / "rows" / ".d.jsonl")
    monkeypatch.chdir(tmp_path)
    assert questions("rows/*.jsonl") == ["rows__a0", "rows__a1", "rows__b0"]
    assert questions("rows/**/*.jsonl")[-1] == "rows__deep__c0"
    assert questions("rows/[b]*") == ["rows__b0"]


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].jsonl"
    path.write_bytes(lines_of("x", 1))
    (tmp_path / "a1.jsonl").write_bytes(lines_of("y", 1))
    assert questions(str(path)) == ["x0"]


def test_a_folder_is_all_its_files_of_rows_and_the_card_names_the_others(
    tmp_path: Path, prepare: Callable[..., RunData]
) -> None:
    write(tmp_path, b=1, a__c=2)
    (tmp_path / "d.csv").write_text("question,answer\nd0,x\n")
    (tmp_path / "README.md").write_text("# rows\n")
    (tmp_path / ".hidden").write_text("x")
    data = prepare(str(tmp_path))
    assert [prompt for prompt, _ in data.train_texts] == ["a__c0", "a__c1", "b0", "d0"]
    assert data.source_names == (str(tmp_path),)
    line = dict(card_lines(data.card))["not read"]
    assert line == f"1 file of no known kind: {tmp_path}/README.md"


def test_files_of_a_folder_can_have_formats_of_their_own_and_be_empty(tmp_path: Path) -> None:
    write(tmp_path, a=1, b=0)
    (tmp_path / "c.jsonl").write_text('{"instruction": "c0", "output": "x"}\n')
    assert questions(str(tmp_path)) == ["a0", "c0"]
    for name in ("a", "c"):
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(DataError, match="none of its 3 files has a row"):
        questions(str(tmp_path))


def test_weights_and_max_rows_are_of_a_whole_folder_or_pattern(
    tmp_path: Path, prepare: Callable[..., RunData]
) -> None:
    write(tmp_path, one__a=2, one__b=2, two=3)
    name = f"{tmp_path}/one/*.jsonl,{tmp_path}/two.jsonl"
    data = prepare(name, weights=(2, 1))
    assert len(data.train) == 11
    assert data.train_sources.tolist() == [0] * 8 + [1] * 3
    assert f"{tmp_path}/one/*.jsonl x 2 (4 -> 8 rows)" in data.card.mix
    assert questions(name, max_rows=3) == ["one__a0", "one__a1", "one__b0", "two0", "two1", "two2"]


def test_the_hash_of_a_folder_is_another_when_a_file_of_it_is(tmp_path: Path) -> None:
    write(tmp_path, a=1, b=2)

    def content_hash() -> str:
        return Source(str(tmp_path)).content_hash()

    seen = {content_hash(), content_hash()}
    assert len(seen) == 1
    for name, count in (("b", 3), ("c", 1)):
        write(tmp_path, **{name: count})
        seen.add(content_hash())
    (tmp_path / "c.jsonl").rename(tmp_path / "d.jsonl")
    seen.add(content_hash())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rows/*.csv", "matches no file"),
        ("empty", "holds no file of rows.*Files of rows end in"),
        ("odd", r"holds no file of rows \(there are .*notes.txt\)"),
        ("nothing.jsonl", "does not exist"),
        ("dangling", "b.jsonl: does not exist"),
    ],
)
def test_a_name_that_means_no_file_is_one_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    write(tmp_path, rows__a=1, dangling__a=1)
    (tmp_path / "dangling" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        check_files(DataSection(dataset_path=name))


@pytest.mark.parametrize("other", ["test", "sub__validation", "my__dev__rows"])
@pytest.mark.parametrize("ending", ["", "/**/*.jsonl"])
def test_files_to_train_on_beside_files_to_test_on_are_not_one_data_set(
    tmp_path: Path, other: str, ending: str
) -> None:
    write(tmp_path, train=1, more=1, **{other: 1})
    with pytest.raises(DataError, match=r"files to train on \(train.jsonl\) and others that seem"):
        find_files(f"{tmp_path}{ending}")
    write(tmp_path / "latest", attest=1, train=1)
    assert len(find_files(str(tmp_path / "latest")).files) == 2


# ---- packed


@pytest.mark.parametrize("ending", sorted(PACK))
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_packed_files_have_the_rows_of_unpacked_ones(
    tmp_path: Path, ending: str, kind: str
) -> None:
    texts = {
        "jsonl": lines_of("x", 500),
        "csv": b"question,answer\n" + b"".join(b"x%d,a%d\n" % (n, n) for n in range(500)),
        "json": json.dumps(rows_of("x", 500)).encode(),
    }
    path = tmp_path / f"rows.{kind}{ending}"
    path.write_bytes(PACK[ending](b"\xef\xbb\xbf" + texts[kind]))
    assert [row for _, row in raw_rows(path)] == rows_of("x", 500)


def test_frames_of_zstd_one_after_the_other_and_of_any_window_are_one_file(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    large = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    parts = [PACK[".zst"](lines_of("x", 3)), large.compress(lines_of("y", 2)) + large.flush()]
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(parts))
    assert questions(str(path)) == ["x0", "x1", "x2", "y0", "y1"]


@pytest.mark.parametrize("ending", sorted(PACK))
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_packed_file_that_is_cut_off_or_damaged_is_one_error(
    tmp_path: Path, ending: str, damage: str
) -> None:
    whole = bytearray(PACK[ending](lines_of("x", 3000)))
    if damage == "cut":
        del whole[-len(whole) // 3 :]
    else:
        middle = len(whole) // 2
        whole[middle : middle + 40] = bytes(40)
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole)
    with pytest.raises(DataError, match=rf"a.jsonl{ending}: the \w+ file is damaged or cut off"):
        questions(str(tmp_path))


def test_a_bad_row_at_the_end_of_a_large_file_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of("x", 60_000) + b'{"question": "y", "answer"}\n')
    errors = RowErrors("skip")
    rows, _ = collected(
        read_rows(find_sources(str(tmp_path)), DataSection(), errors, max_rows=None)
    )
    assert len(rows) == 60_000
    [error] = errors.errors
    assert error.startswith(f"{tmp_path}/a.jsonl:60001: not valid JSON")


# ---- Arrow


def test_a_saved_data_set_is_read_as_its_own_files_and_no_others(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(rows_of("x", 7))
    folder = tmp_path / "saved"
    whole.save_to_disk(str(folder), num_shards=2)
    stale = folder / "cache-0123.arrow"
    stale.write_bytes(next(folder.glob("data-*.arrow")).read_bytes())
    assert questions(str(folder)) == [f"x{n}" for n in range(7)]
    next(folder.glob("data-00001*.arrow")).unlink()
    with pytest.raises(DataError, match=r"state.json names data-00001.*which is not there"):
        questions(str(folder))


def test_a_saved_set_of_splits_asks_which_one(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list(rows_of(name, 2)) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    with pytest.raises(DataError, match=r"name one of them: .*/all/train, .*/all/test"):
        questions(str(tmp_path / "all"))
    assert questions(str(tmp_path / "all" / "train")) == ["train0", "train1"]
    datasets.DatasetDict(train=parts["train"]).save_to_disk(str(tmp_path / "one"))
    assert questions(str(tmp_path / "one")) == ["train0", "train1"]


def test_arrow_files_are_read_with_an_index_and_as_streams_and_a_cut_is_found(
    tmp_path: Path,
) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows_of("x", 3000))
    for make, name in ((pyarrow.ipc.new_file, "a"), (pyarrow.ipc.new_stream, "b")):
        path = tmp_path / f"{name}.arrow"
        with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        assert [row for _, row in raw_rows(path)] == rows_of("x", 3000)
        where, _ = list(raw_rows(path))[-1]
        assert where == f"{path}[2999]"
        content = path.read_bytes()
        for size in (len(content) // 2, len(content) - 8):
            path.write_bytes(content[:size])
            with pytest.raises(DataError, match=r"not a readable Arrow file|cannot be read"):
                list(raw_rows(path))


def test_a_file_that_two_names_hold_is_refused(tmp_path: Path) -> None:
    write(tmp_path, rows__a=2, rows__b=2, rows__held=2, other=2)
    folder, pattern, file = (str(tmp_path / "rows" / end) for end in ("", "*.jsonl", "a.jsonl"))

    def check(dataset: str, validation: str | None = None) -> None:
        check_files(DataSection(dataset_path=dataset, validation_path=validation))

    for twice in (f"{folder},{file}", f"{file},{pattern}", f"{folder},{pattern}"):
        with pytest.raises(ConfigError, match=r"a\.jsonl is in .*; name it once"):
            check(twice)
    for held_out in (f"{tmp_path}/rows/held.jsonl", f"{tmp_path}/rows/../rows/h*.jsonl"):
        with pytest.raises(ConfigError, match="is among the files"):
            check(folder, held_out)
    (tmp_path / "link.jsonl").symlink_to(file)
    with pytest.raises(ConfigError, match="name it once"):
        check(f"{folder},{tmp_path}/link.jsonl")
    check_files(DataSection(dataset_path=f"{folder},{file}"), is_resumed=True)
    check(folder, f"{tmp_path}/other.jsonl")
    with pytest.raises(ConfigError, match="is among the files"):
        check(file, pattern)
    for name in (file, folder):  # said on both sides: to see how well it is learned by heart
        check(name, name)
