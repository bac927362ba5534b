"""Rows that are tokens already: trained as they are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError, DataError
from trainer.profiles import get_profile

TURNS = [
    [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"it is {n}"}]
    for n in range(12)
]


@pytest.fixture
def prepare(tokenizer: Any, write_rows: Callable[..., Path]) -> Callable[..., RunData]:
    def run(rows: list[dict[str, Any]] | Path, *, max_length: int = 64, **options: Any) -> RunData:
        path = rows if isinstance(rows, Path) else write_rows(rows)
        section = {"validation_split": 0.0, "cache": False, **options.pop("section", {})}
        encoder = RowEncoder(tokenizer, max_length, truncation=section.pop("cut", "keep_start"))
        return prepare_data(
            DataSection(dataset_path=str(path), **section), encoder=encoder, **options
        )

    return run


def ids_of(data: RunData) -> list[tuple[list[int], list[int]]]:
    rows = [data.train[n] for n in range(len(data.train))]
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]


def test_tokens_and_labels_of_a_saved_data_set_are_trained_as_the_turns_they_were_made_from(
    prepare: Callable[..., RunData], tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_preview": 4, "section": {"validation_split": 0.25}}
    turns = prepare([{"messages": row} for row in TURNS], **options)
    encoder = RowEncoder(tokenizer, 64)
    examples = [encoder.encode(row) for row in TURNS]  # type: ignore[arg-type]
    width = max(len(example.input_ids) for example in examples)

    def padded(values: Any, pad: int) -> list[int]:
        return [*values, *[pad] * (width - len(values))]

    table = datasets.Dataset.from_list(
        [
            {
                "input_ids": padded(one.input_ids, 0),
                "labels": padded(one.labels, IGNORE_INDEX),
                "attention_mask": padded([1] * len(one.input_ids), 0),
                "text": "left there",
            }
            for one in examples
        ]
    )
    table.save_to_disk(str(tmp_path / "saved"))
    tokens = prepare(tmp_path / "saved", **options)
    whole = {tuple(ids): tuple(labels) for ids, labels in map(tuple, _all(turns))}
    assert {tuple(ids): tuple(labels) for ids, labels in map(tuple, _all(tokens))} == whole
    assert len(tokens.train) == len(turns.train) == 9
    by_ids = {tuple(one.input_ids[: one.prompt_length]): one.golden_answer for one in examples}
    for prompt in tokens.preview_prompts:
        assert prompt.prompt_token_ids is not None
        assert prompt.golden_answer == by_ids[prompt.prompt_token_ids]
        assert prompt.prompt == tokenizer.decode(prompt.prompt_token_ids)
        assert prompt.held_out
    card = dict(card_lines(tokens.card))
    assert card["trained"].startswith("12 rows are tokens already (input_ids), trained as they are")
    assert card["unused keys"] == "text (12)"
    assert tokens.card.format == "tokens"
    assert tokens.card.is_stop_trained


def _all(data: RunData) -> list[tuple[list[int], list[int]]]:
    held_out = [] if data.validation is None else [data.validation[n] for n in range(3)]
    return ids_of(data) + [(row["input_ids"].tolist(), row["labels"].tolist()) for row in held_out]


def test_without_labels_every_token_is_trained_and_half_of_the_row_is_the_prompt(
    prepare: Callable[..., RunData], tokenizer: Any
) -> None:
    ids = [*tokenizer("one two three four five six seven")["input_ids"], tokenizer.eos_token_id]
    data = prepare([{"input_ids": ids}], num_preview=1)
    assert ids_of(data) == [(ids, [IGNORE_INDEX, *ids[1:]])]
    [prompt] = data.preview_prompts
    half = len(ids) // 2
    assert prompt.prompt_token_ids == tuple(ids[:half])
    assert prompt.golden_token_ids == tuple(ids[half:])
    assert prompt.golden_answer == tokenizer.decode(ids[half:-1])


@pytest.mark.parametrize(
    "key", ["assistant_masks", "assistant_mask", "completion_mask", "loss_mask"]
)
def test_a_mask_says_which_tokens_are_trained(prepare: Callable[..., RunData], key: str) -> None:
    data = prepare([{"input_ids": [5, 6, 7, 8], key: [0, 0, 1, 1]}])
    assert ids_of(data) == [([5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 7, 8])]


def test_padding_in_front_is_left_out_and_a_weight_of_the_row_counts(
    prepare: Callable[..., RunData],
) -> None:
    row = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "weight": 0.5}
    data = prepare([row, {"input_ids": [5, 6]}])
    assert ids_of(data)[0] == ([5, 6, 7], [IGNORE_INDEX, 6, 7])
    assert data.train[0]["loss_weights"].tolist() == [0.0, 0.5, 0.5]


def test_rows_of_one_prompt_go_to_one_side(prepare: Callable[..., RunData]) -> None:
    rows = [
        {
            "input_ids": [5, 6 + prompt, 40 + answer, 3],
            "labels": [IGNORE_INDEX, IGNORE_INDEX, 40 + answer, 3],
        }
        for prompt in range(20)
        for answer in range(2)
    ]
    data = prepare(rows, section={"validation_split": 0.2})
    assert data.validation is not None
    held_out = {data.validation[n]["input_ids"][1].item() for n in range(len(data.validation))}
    trained = {ids[1] for ids, _ in ids_of(data)}
    assert (len(data.validation), held_out & trained) == (8, set())
    assert data.card.num_leaked == 0


@pytest.mark.parametrize(
    ("cut", "kept", "labels"),
    [
        ("keep_start", [5, 6, 7], [IGNORE_INDEX, IGNORE_INDEX, 7]),
        ("keep_end", [7, 8, 9], [IGNORE_INDEX, 8, 9]),
    ],
)
def test_long_rows_are_cut_as_any_other(
    prepare: Callable[..., RunData], cut: str, kept: list[int], labels: list[int]
) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE_INDEX, IGNORE_INDEX, 7, 8, 9]}
    data = prepare([row], max_length=3, section={"cut": cut})
    assert ids_of(data) == [(kept, labels)]
    assert (data.card.num_truncated, data.card.num_cut_tokens) == (1, 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [5, 999_999]}, r"input_ids\[1\] is 999999, and the model's tokenizer has"),
        ({"input_ids": [5, -1]}, r"input_ids\[1\] is -1"),
        ({"input_ids": [5, "6"]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": "5 6"}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [5, 6], "labels": [6]}, "'labels' has 1 numbers, 'input_ids' has 2"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "seem to be shifted by one"),
        ({"input_ids": [5, 6], "labels": [5, 9]}, r"labels\[1\] is 9, input_ids\[1\] is 6: a lab"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "leave nothing to train"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "has a 0 between two 1s"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "has no 1"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "must have 1 and 0 only"),
        ({"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}, "packed into this row"),
        ({"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]}, "packed into this row"),
        ({"input_ids": [5, 6], "system": "be kind"}, "row has 'system' beside 'input_ids'"),
        ({"input_ids": [5, 6], "weight": 0}, "leave nothing to train"),
    ],
)
def test_a_row_that_cannot_be_trained_as_it_is_is_a_bad_row(
    prepare: Callable[..., RunData], row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        prepare([{"input_ids": [5, 6, 7]}, row])


def test_padding_that_would_be_trained_is_a_bad_row(
    prepare: Callable[..., RunData], tokenizer: Any
) -> None:
    pad = tokenizer.pad_token_id
    rows = [{"input_ids": [5, 6, pad, pad]}]
    if pad == tokenizer.eos_token_id:
        pytest.skip("this tokenizer pads with its end-of-text token")
    with pytest.raises(DataError, match="ends with the padding token"):
        prepare(rows)
    assert ids_of(prepare([{**rows[0], "labels": [5, 6, -100, -100]}]))


def test_what_speaks_of_turns_is_refused_for_tokens(prepare: Callable[..., RunData]) -> None:
    rows = [{"input_ids": [5, 6, 7]}]
    with pytest.raises(ConfigError, match="or is tokens, which has none"):
        prepare(rows, system_prompt="be kind", is_prompt_configured=True)
    with pytest.raises(ConfigError, match=r"1 row is tokens, which has none"):
        prepare(rows, profile=get_profile("emoji_think"))


def test_another_format_can_be_asked_for(prepare: Callable[..., RunData]) -> None:
    rows = [{"input_ids": [5, 6, 7], "text": "one two"}]
    assert ids_of(prepare(rows))[0][0] == [5, 6, 7]
    data = prepare(rows, section={"format": "text"})
    assert ids_of(data)[0][0] != [5, 6, 7]
    assert data.card.unused_keys == {"input_ids": 1}


def test_processes_encode_tokens_alike(prepare: Callable[..., RunData]) -> None:
    rows = [{"input_ids": [5, 6 + n % 20, 7]} for n in range(600)]
    one, two = (prepare(rows, section={"encode_processes": n}) for n in (1, 2))
    assert ids_of(one) == ids_of(two)
    assert len(one.train) == 600


def test_split_cuts_tokens_of_a_text_into_windows_and_refuses_those_of_an_answer(
    prepare: Callable[..., RunData],
) -> None:
    ids = [*range(5, 15)]
    data = prepare([{"input_ids": ids}], max_length=4, section={"cut": "split"})
    found = ids_of(data)
    assert [row for row, _ in found] == [ids[:4], ids[3:7], ids[6:]]
    assert [label for _, labels in found for label in labels if label != IGNORE_INDEX] == ids[1:]
    with pytest.raises(DataError, match="cuts plain text only"):
        prepare(
            [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}],
            max_length=4,
            section={"cut": "split"},
        )
