"""Several files, weights, hub ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import RowErrors
from trainer.data.sources import Source, find_sources, read_rows
from trainer.errors import ConfigError, DataError
from trainer.profiles import get_profile


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"question": f"{name}{n}", "answer": f"a{n}"} for n in range(count)]


@pytest.fixture
def prepare(tokenizer: Any) -> Callable[..., RunData]:
    def run(dataset_path: str, **section: Any) -> RunData:
        options = {"validation_split": 0.0, "cache": False, **section}
        return prepare_data(
            DataSection(dataset_path=dataset_path, **options),
            profile=get_profile("plain"),
            encoder=RowEncoder(tokenizer, 256),
            system_prompt=None,
            is_prompt_configured=False,
            seed=1,
            num_preview=3,
        )

    return run


def prompts(data: RunData) -> list[str]:
    return [prompt for prompt, _ in data.train_texts]


def test_files_with_commas_between_are_read_in_order_each_in_its_format(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    one = write_rows(rows_of("x", 2), "x.jsonl")
    two = write_rows([{"instruction": "y0", "output": "b"}], "y.jsonl")
    data = prepare(f"{one}, {two}")
    assert prompts(data) == ["x0", "x1", "y0"]
    assert data.card.format == "question_answer, alpaca"
    assert set(data.file_hashes) == {str(one), str(two)}
    assert len({prompt.prompt_id for prompt in data.preview_prompts}) == 3


def test_a_comma_in_the_name_of_one_file_does_not_cut_it(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    assert prompts(prepare(str(write_rows(rows_of("x", 1), "a, b.jsonl")))) == ["x0"]


def test_weights_repeat_rows_or_take_a_part_by_content(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    one = write_rows(rows_of("x", 4), "x.jsonl")
    two = write_rows(rows_of("y", 10), "y.jsonl")
    turned = write_rows(rows_of("y", 10)[::-1], "z.jsonl")
    data = prepare(f"{one},{two}", weights=(2.5, 0.3))
    found = prompts(data)
    assert sorted(found[:8]) == sorted(["x0", "x1", "x2", "x3"] * 2)
    assert len(found) == 8 + 2 + 3
    assert data.card.num_train_rows == len(data.train) == 13
    assert data.card.num_rows == 14
    assert f"{one} x 2.5 (4 -> 10 rows)" in data.card.mix
    again = prompts(prepare(f"{one},{turned}", weights=(2.5, 0.3)))
    assert set(again[10:]) == set(found[10:])


def test_rows_held_out_are_not_repeated_and_never_trained_on(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    path = write_rows(rows_of("x", 20))
    data = prepare(str(path), weights=(3,), validation_split=0.2)
    assert data.validation is not None
    assert len(data.validation) == 4
    assert len(data.train) == 48
    held_out = {prompt.prompt for prompt in data.preview_prompts}
    assert not held_out & set(prompts(data))


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [("a.jsonl,b.jsonl", (1.0,), "has 1 number,"), ("a.jsonl,a.jsonl", (), "named twice")],
)
def test_weights_that_do_not_fit_and_twin_names_are_errors(
    text: str, weights: tuple[float, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_sources(text, weights)


def test_weights_that_leave_nothing_are_an_error(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="leaves no training row"):
        prepare(str(write_rows(rows_of("x", 2))), weights=(0.1,))


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [
        ("owner/name", True),
        ("owner/name:test", True),
        ("owner/name.jsonl", False),
        ("name", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("tests/nothing", False),
    ],
)
def test_a_hub_id_is_told_from_a_file(
    name: str, is_hub: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert Source(name).is_hub == is_hub


def test_a_hub_dataset_offline_is_one_clear_error(prepare: Callable[..., RunData]) -> None:
    with pytest.raises(DataError, match="owner-of-nothing/nothing: no such file") as caught:
        prepare("owner-of-nothing/nothing")
    assert "offline" in str(caught.value)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_of_the_datasets_library_are_read_like_those_of_a_file(
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_streamed: bool,
) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_rows(rows_of("x", 3), "owner/name/train.jsonl")
    import datasets

    # The library takes a folder for an id; only the name differs from what a hub would give.
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, **options: load(str(tmp_path / path), cache_dir=str(tmp_path), **options),
    )
    source = Source("owner/name", is_streamed=is_streamed)
    rows, found = collected(read_rows([source], DataSection(), RowErrors("strict"), max_rows=None))
    assert found == "question_answer"
    assert [row.where for row in rows] == [f"owner/name[{n}]" for n in range(3)]
    assert isinstance(source._hub_dataset, datasets.IterableDataset) == is_streamed
    if not is_streamed:
        assert source.content_hash().startswith("hub:")
