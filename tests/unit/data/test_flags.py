"""Flags of turns and rows say what is trained, in every spelling; what cannot be obeyed is a bad
row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.collected import collected
from trainer.data.row_files import to_rows
from trainer.data.rows import Row, RowErrors

FLAGS = ["train", "trainable", "training", "loss", "loss_mask", "weight"]


def read(row: dict[str, Any]) -> tuple[list[Row], list[str]]:
    errors = RowErrors("skip")
    rows, _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    return rows, errors.errors


def weights(row: dict[str, Any]) -> list[float]:
    """Of the assistant's turns."""
    rows, errors = read(row)
    assert not errors
    return [t.get("weight", 1.0) for t in rows[0].messages if t["role"] == "assistant"]


def refusal(row: dict[str, Any]) -> str:
    rows, errors = read(row)
    assert not rows
    return errors[0]


def messages(*flags: dict[str, Any], user: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row with an assistant turn for each dict of flags."""
    turns: list[dict[str, Any]] = []
    for number, given in enumerate(flags):
        turns.append({"role": "user", "content": f"q{number}", **(user or {})})
        turns.append({"role": "assistant", "content": f"a{number}", **given})
    return {"messages": turns}


def sharegpt(*flags: dict[str, Any]) -> dict[str, Any]:
    names = {"role": "from", "content": "value"}
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [
        {names.get(key, key): speakers.get(value, value) for key, value in turn.items()}
        for turn in messages(*flags)["messages"]
    ]
    return {"conversations": turns}


def prompt_completion(*flags: dict[str, Any]) -> dict[str, Any]:
    turns = messages(*flags)["messages"]
    return {"prompt": turns[:1], "completion": turns[1:]}


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("made", [messages, sharegpt, prompt_completion])
@pytest.mark.parametrize("off", [False, 0, 0.0, "false", "0", "False"])
def test_a_turn_whose_flag_is_off_is_not_trained(made: Any, key: str, off: Any) -> None:
    assert weights(made({key: off}, {})) == [0.0, 1.0]
    assert weights(made({key: None}, {key: off}, {})) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("on", [True, 1, "true", "1"])
def test_a_turn_whose_flag_is_on_is_trained_like_one_without(key: str, on: Any) -> None:
    rows, errors = read(messages({key: on}, {}))
    assert not errors
    assert all("weight" not in turn for turn in rows[0].messages)


@pytest.mark.parametrize("key", FLAGS)
def test_fractions_are_weights(key: str) -> None:
    assert weights(messages({key: 0.25}, {key: "0.75"})) == [0.25, 0.75]
    if key == "weight":
        assert weights(messages({key: 1.5}, {key: "2"})) == [1.5, 2.0]


@pytest.mark.parametrize("key", [*FLAGS, "weights", "loss_weights", "train_mask"])
def test_a_rows_list_counts_all_turns_or_the_assistants(key: str) -> None:
    assert weights({**sharegpt({}, {}), key: [0, 1]}) == [0.0, 1.0]
    assert weights({**messages({}, {}), key: [0, 0, 0, 0.5]}) == [0.0, 0.5]
    assert weights({**messages({}, {}), key: [False, True]}) == [0.0, 1.0]
    assert weights({**messages({}, {}), key: "[0, 1]"}) == [0.0, 1.0]


def test_a_rows_list_does_not_count_the_rows_own_system_prompt() -> None:
    row = {"system": "S", **messages({}, {}), "loss_mask": [0, 0, 0, 1]}
    assert weights(row) == [0.0, 1.0]


@pytest.mark.parametrize("key", [*FLAGS, "weights"])
@pytest.mark.parametrize("value", [0.5, "0.5"])
def test_a_rows_single_value_speaks_of_all_its_turns(key: str, value: Any) -> None:
    assert weights({**messages({}, {"weight": 0}), key: value}) == [0.5, 0.0]
    assert weights({"question": "q", "answer": "a", key: value}) == [0.5]
    assert weights({"instruction": "q", "output": "a", key: value}) == [0.5]
    rows, _ = read({"text": "some words", key: value})
    assert rows[0].messages[0]["weight"] == 0.5


BROKEN = {
    "negative": (messages({"weight": -1}), "'weight' says what is trained and is -1"),
    "words": (sharegpt({"train": "maybe"}), "'train' says what is trained and is 'maybe'"),
    "a measured loss": ({**messages({}), "loss": 2.31}, "a number from 0 to 1"),
    "not a number": (messages({"weight": "nan"}), "a number from 0 up"),
    "an object": (messages({"loss": {"a": 1}}), "'loss' says"),
    "two that disagree": (messages({"train": True, "loss": 0}, {}), "flags that disagree"),
    "two amounts": (messages({"weight": 0.5, "loss": 0.25}, {}), "flags that disagree"),
    "turn and row": (
        {**messages({"train": False}, {}), "loss_mask": [1, 1]},
        "loss_mask[0] is 1, but that turn says 0",
    ),
    "length": ({**messages({}, {}), "weights": [1, 0, 1]}, "one for each of the 4 turns"),
    "tokens": ({**messages({}, {}), "loss_mask": [[1], [0]]}, "'loss_mask' says what is trained"),
    "a user's": (messages({}, user={"train": True}), "messages[0] (user) asks to be trained"),
    "a user's in a list": ({**messages({}), "train_mask": [1, 1]}, "train_mask[0] (user) asks"),
    "nothing left": (messages({"loss": False}), "flags leave none"),
    "nothing left by the row": ({**messages({}), "weight": 0}, "flags leave none"),
    "no text left": ({"text": "words", "weight": 0}, "flags leave nothing"),
    "unknown of a turn": (messages({"train_detail": [1]}), "'train_detail', which seems to say"),
    "unknown of a row": ({**messages({}), "mask_history": True}, "'mask_history', which seems"),
    "another unknown": ({"question": "q", "answer": "a", "Loss_scale": 2}, "'Loss_scale'"),
    "a row's words": ({**messages({}), "train": "split"}, "row: 'train' says what is trained"),
    "by token": ({**messages({}), "assistant_masks": [0, 1]}, "marks single tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_flag_that_cannot_be_obeyed_is_a_bad_row(case: str) -> None:
    row, reason = BROKEN[case]
    assert reason in refusal(row)


def test_a_flag_that_is_off_on_a_turn_of_another_changes_nothing() -> None:
    row = {**messages({}, user={"loss": False, "weight": 0}), "train_mask": [0, 1]}
    rows, errors = read(row)
    assert not errors
    assert all("weight" not in turn for turn in rows[0].messages)


def test_true_agrees_with_any_amount_and_empty_values_say_nothing() -> None:
    assert weights(messages({"train": True, "weight": 0.5, "loss": None, "training": ""})) == [0.5]


def test_answers_in_a_prompt_are_read_unless_a_flag_asks_for_them() -> None:
    turns = messages({}, {})["messages"]
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert weights(row) == [0.0, 1.0]
    turns[1]["train"] = True
    assert weights(row) == [1.0, 1.0]


def test_a_greeting_is_read_and_not_trained() -> None:
    hello = {"from": "gpt", "value": "hello"}
    for before in ([], [{"from": "system", "value": "S"}]):
        row = sharegpt({}, {})
        row["conversations"] = [*before, hello, *row["conversations"]]
        assert weights(row) == [0.0, 1.0, 1.0]
        assert weights({**row, "loss_mask": [0, 0, 1]}) == [0.0, 0.0, 1.0]
    row["conversations"][1] = {**hello, "loss": True}
    assert "asks to be trained, and no prompt asks for it" in refusal(row)
    assert "no user turn that an assistant turn answers" in refusal({"conversations": [hello]})


def test_calls_in_a_row_are_one_turn_and_lists_count_them_each() -> None:
    call = {"from": "tool_call", "value": json.dumps({"name": "f", "arguments": {}})}
    result = {"from": "tool_response", "value": "1"}
    talk = [{"from": "human", "value": "q"}, call, call, result, {"from": "gpt", "value": "a"}]
    rows, errors = read({"conversations": talk, "loss_mask": [0, 0, 0, 0, 1]})
    assert not errors
    assert [turn["role"] for turn in rows[0].messages] == ["user", "assistant", "tool", "assistant"]
    assert [call["function"]["name"] for call in rows[0].messages[1]["tool_calls"]] == ["f", "f"]
    assert weights({"conversations": talk, "loss_mask": [0, 0, 0, 0, 1]}) == [0.0, 1.0]
