"""Alpaca, sharegpt and turn lists become messages; renamed columns; a change of format is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data.layouts import FORMATS, REFUSED_KEYS
from trainer.data.row_files import raw_rows, to_rows
from trainer.data.rows import Row, RowErrors
from trainer.data.sources import find_sources, read_rows
from trainer.data.turn_flags import TURN_FLAGS
from trainer.data.turns import CONTENT_KEYS, ROLES, TURN_KEYS
from trainer.errors import ConfigError


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def read(path: Path, name: str = "auto", **options: Any) -> tuple[list[Row], str, RowErrors]:
    errors = RowErrors("strict")
    rows, found = collected(to_rows(raw_rows(path), str(path), name, errors, None, **options))
    return rows, found, errors


LAYOUTS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "id": 7},
        turns(("system", "S"), ("user", "Add.\n\n1 2"), ("assistant", "3")),
    ),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "output": "Ho", "system": None},
        turns(("user", "Hi"), ("assistant", "Ho")),
    ),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]]},
        turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ),
    "sharegpt": (
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
        turns(("system", "S"), ("user", "a"), ("assistant", "b")),
    ),
    "prompt_completion of turns": (
        {"prompt": turns(("system", "S"), ("user", "a")), "completion": turns(("assistant", "b"))},
        turns(("system", "S"), ("user", "a"), ("assistant", "b")),
    ),
    "question_answer with system": (
        {"question": "a", "answer": "b", "system": "S"},
        turns(("system", "S"), ("user", "a"), ("assistant", "b")),
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_each_layout_is_found_and_becomes_these_messages(
    write_rows: Callable[..., Path], case: str
) -> None:
    row, wanted = LAYOUTS[case]
    rows, found, errors = read(write_rows([row]))
    assert not errors.errors
    assert found == case.split(" ")[0]
    assert rows[0].messages == wanted


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
REFUSED = {
    "speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'"),
    "sharegpt tools": (
        {"conversations": [{"from": "human", "value": "a"}], "tools": "[1]"},
        "'tools' must be a list of objects",
    ),
    "tools that are no JSON": ({"messages": [USER, ASSISTANT], "tools": "{"}, "not valid JSON"),
    "a tool without a name": ({"messages": [USER, ASSISTANT], "tools": [{}]}, "name its function"),
    "a call that is none": (
        {"conversations": [{"from": "function_call", "value": '{"arguments": 1}'}]},
        "conversations[0].value is not a call",
    ),
    "two systems": (
        {"system": "S", "conversations": [{"from": "system", "value": "T"}]},
        "begin with another system turn",
    ),
    "weight 0": ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "flags leave none"),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, "history[0]"),
    "history of another type": (
        {"instruction": "a", "output": "b", "history": 5},
        "'history' is int",
    ),
    "input": ({"instruction": "a", "output": "b", "input": {"c": 3}}, "'input' is dict"),
    "mixed prompt": ({"prompt": [USER], "completion": "a"}, "'completion' is str"),
    "nothing to train": ({"instruction": "a", "output": ""}, "empty"),
    "no turns": ({"messages": []}, "no assistant turn"),
}


WEATHER = {"name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize("tools", [[WEATHER], [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize("as_text", [False, True])
def test_sharegpt_calls_observations_and_tools_become_messages(
    write_rows: Callable[..., Path], tools: list[Any], as_text: bool
) -> None:
    talk = [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "drizzle"},
        {"from": "gpt", "value": "a drizzle"},
    ]
    row = {"conversations": talk, "tools": json.dumps(tools) if as_text else tools}
    rows, _, errors = read(write_rows([row]))
    assert not errors.errors
    messages = rows[0].messages
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[0]["tools"] == [{"type": "function", "function": WEATHER}]
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert messages[1]["tool_calls"] == [{"type": "function", "function": call}]


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_does_not_allow_is_a_bad_row_with_its_reason(
    write_rows: Callable[..., Path], case: str
) -> None:
    row, reason = REFUSED[case]
    path = write_rows([row])
    rows, _, errors = read(path)
    assert not rows
    assert errors.errors[0].startswith(f"{path}:1: ")
    assert reason in errors.errors[0]


def test_a_weight_of_one_changes_nothing(write_rows: Callable[..., Path]) -> None:
    rows, _, errors = read(write_rows([{"messages": [USER, {**ASSISTANT, "weight": 1}]}]))
    assert not errors.errors
    assert rows[0].messages == [USER, ASSISTANT]


@pytest.mark.parametrize("name", ["auto", "question_answer"])
def test_a_row_of_another_format_is_an_error_at_that_row(
    write_rows: Callable[..., Path], name: str
) -> None:
    good = {"question": "q", "answer": "a"}
    path = write_rows([good, {"instruction": "i", "output": "o"}, good])
    rows, _, errors = read(path, name)
    assert len(rows) == 2
    assert len(errors.errors) == 1
    assert errors.errors[0].startswith(f"{path}:2: row is of format 'alpaca'")


def test_columns_rename_and_missing_ones_are_named(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"frage": "q", "answer": "a"}, {"question": "q", "answer": "a"}])
    rows, found, errors = read(path, columns={"question": "frage"})
    assert found == "question_answer"
    assert rows[0].messages == turns(("user", "q"), ("assistant", "a"))
    assert errors.errors[0].startswith(f"{path}:2: row has no 'frage'")


def test_columns_may_swap_two_names(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"question": "a", "answer": "q"}])
    rows, _, _ = read(path, columns={"question": "answer", "answer": "question"})
    assert rows[0].messages == turns(("user", "q"), ("assistant", "a"))


def test_a_column_for_a_key_that_the_format_lacks_is_an_error(
    write_rows: Callable[..., Path],
) -> None:
    path = str(write_rows([{"question": "q", "answer": "a", "x": "y"}]))
    section = DataSection(dataset_path=path, columns={"output": "x"})
    with pytest.raises(ConfigError, match="'output'"):
        collected(read_rows(find_sources(path), section, RowErrors("strict"), max_rows=None))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted(TURN_KEYS | TURN_FLAGS | CONTENT_KEYS | {"type", "text"})),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = sorted({key for known in FORMATS.values() for key in known.takes} | {*REFUSED_KEYS})
SPEAKERS = st.sampled_from(sorted(ROLES)) | VALUES
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": SPEAKERS,
            "from": SPEAKERS,
            "content": VALUES,
            "value": VALUES,
            "tool_calls": VALUES,
            "function_call": VALUES,
            "thinking": VALUES,
            "loss": VALUES,
        },
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), VALUES | TURNS, max_size=5) | VALUES)
def test_any_json_value_is_a_row_or_a_bad_row(row: Any) -> None:
    errors = RowErrors("skip")
    rows, _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    assert len(rows) + len(errors.errors) == 1
    for found in rows:
        assert all(isinstance(turn["content"], str) for turn in found.messages)
        assert all(turn.get("weight", 1.0) >= 0 for turn in found.messages)


@settings(max_examples=80, deadline=None)
@given(turns=TURNS, flags=VALUES)
def test_any_list_of_turns_is_a_row_or_a_bad_row(turns: Any, flags: Any) -> None:
    for key in ("messages", "conversations"):
        errors = RowErrors("skip")
        rows, _ = collected(
            to_rows([("f:1", {key: turns, "loss_mask": flags})], "f", "auto", errors, None)
        )
        assert len(rows) + len(errors.errors) == 1
