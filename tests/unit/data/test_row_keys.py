"""What stands beside the turns of a row: system prompts, tools, context, and keys without use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.collected import collected
from trainer.data.layouts import FORMATS
from trainer.data.row_files import to_rows
from trainer.data.rows import Row, RowErrors

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN: dict[str, dict[str, Any]] = {
    "messages": {"messages": [U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "question_answer": {"question": "q", "answer": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion of turns": {"prompt": [U], "completion": [A]},
    "alpaca": {"instruction": "q", "output": "a"},
    "dolly": {"instruction": "q", "response": "a"},
}
TOOL = {"name": "weather", "parameters": {"type": "object"}}


def read(row: dict[str, Any]) -> tuple[list[Row], list[str]]:
    errors = RowErrors("skip")
    rows, _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    return rows, errors.errors


def turns(row: dict[str, Any]) -> list[Any]:
    rows, errors = read(row)
    assert not errors
    return rows[0].messages


def refusal(row: dict[str, Any]) -> str:
    rows, errors = read(row)
    assert not rows
    return errors[0]


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_every_layout_takes_a_system_prompt(layout: str, key: str) -> None:
    assert turns({**PLAIN[layout], key: "S"}) == [{"role": "system", "content": "S"}, U, A]
    assert turns({**PLAIN[layout], key: None}) == turns({**PLAIN[layout], key: "  "}) == [U, A]
    assert turns({**PLAIN[layout], "system": "S", "system_prompt": "S"})[0]["content"] == "S"
    assert "mean the same" in refusal({**PLAIN[layout], "system": "S", "system_prompt": "T"})


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_every_layout_takes_tools(layout: str, key: str) -> None:
    for tools in ([TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL])):
        found = turns({**PLAIN[layout], key: tools})
        assert found[0]["tools"] == [{"type": "function", "function": TOOL}]
    assert "mean the same" in refusal({**PLAIN[layout], "tools": [TOOL], "functions": [{}]})


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation"])
def test_a_system_prompt_beside_an_equal_system_turn_is_one_and_beside_another_a_bad_row(
    name: str,
) -> None:
    row = {name: [{"role": "system", "content": "S "}, U, A], "system": "S"}
    assert [turn["role"] for turn in turns(row)] == ["system", "user", "assistant"]
    assert "begin with another system turn" in refusal({**row, "system": "T"})


def test_text_must_say_what_stands_beside_it() -> None:
    assert turns({"text": "S: be brief", "system": "be brief"})[0]["role"] == "text"
    assert turns({"text": "call weather", "tools": [TOOL]})[0]["content"] == "call weather"
    assert "a 'system' beside a 'text'" in refusal({"text": "words", "system": "be brief"})
    assert "the tools 'weather' beside a 'text'" in refusal({"text": "words", "functions": [TOOL]})


def test_context_goes_under_the_question_where_the_layout_is_known() -> None:
    for row in (
        {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"},
        {"question": "q", "context": "c", "answer": "a"},
        {"instruction": "q", "input": "c", "output": "a"},
    ):
        assert turns(row) == [{"role": "user", "content": "q\n\nc"}, A]
    assert "mean the same" in refusal({**PLAIN["alpaca"], "input": "c", "context": "d"})
    rows, _ = read({**PLAIN["messages"], "context": "c"})
    assert rows[0].notes.unused == {"context": 1}


def test_history_and_thoughts_belong_to_every_pair() -> None:
    more = {"history": [["e", "f"]], "thinking": "hm"}
    for layout in ("question_answer", "prompt_completion", "alpaca"):
        found = turns({**PLAIN[layout], **more})
        assert [turn["content"] for turn in found] == ["e", "f", "q", "a"]
        assert found[-1]["reasoning_content"] == "hm"
    assert "put it into the turns" in refusal({**PLAIN["prompt_completion of turns"], **more})


LOST = ["tool_plan", "image", "images", "audio", "audios", "video", "videos"]


@pytest.mark.parametrize("key", LOST)
@pytest.mark.parametrize("layout", PLAIN)
def test_content_that_the_model_would_miss_is_a_bad_row(layout: str, key: str) -> None:
    assert f"row has {key!r}" in refusal({**PLAIN[layout], key: ["x"]})
    for nothing in (None, "", [], {}):
        assert turns({**PLAIN[layout], key: nothing}) == [U, A]
    for list_key in ("messages", "conversations", "completion"):
        if list_key in PLAIN[layout] and isinstance(PLAIN[layout][list_key], list):
            *first, last = PLAIN[layout][list_key]
            row = {**PLAIN[layout], list_key: [*first, {**last, key: "x"}]}
            assert f"has {key!r}, content that is not supported" in refusal(row)


CHANGED = {
    "function_call of a row": {**PLAIN["messages"], "function_call": {"name": "f"}},
    "function_call of a user": {"messages": [{**U, "function_call": {"name": "f"}}, A]},
    "function_call without a name": {"messages": [U, {**A, "function_call": {"arguments": "{}"}}]},
    "an unwanted answer": {**PLAIN["prompt_completion"], "label": False},
    "another template": {**PLAIN["messages"], "chat_template_kwargs": {"enable_thinking": True}},
    "a channel": {"messages": [U, {**A, "channel": "analysis"}, A]},
    "two calls": {
        "messages": [
            U,
            {
                **A,
                "function_call": {"name": "f"},
                "tool_calls": [{"function": {"name": "g"}}],
            },
        ]
    },
}


@pytest.mark.parametrize("case", CHANGED)
def test_keys_that_change_what_a_row_means_are_bad_rows(case: str) -> None:
    assert refusal(CHANGED[case]).startswith("f:1: ")


@pytest.mark.parametrize("list_key", ["messages", "conversations"])
def test_an_older_function_call_becomes_a_tool_call(list_key: str) -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    told = {"role": "function", "name": "f", "content": "1"}
    said = {"role": "assistant", "content": None, "function_call": call}
    found = turns({list_key: [U, said, told, A]})
    assert found[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert found[2] == {"role": "tool", "name": "f", "content": "1"}


WILDCHAT = {
    "conversation_hash": "ab",
    "model": "gpt-4",
    "timestamp": "2023-04-09T00:02:53",
    "conversation": [
        {**U, "language": "English", "toxic": False, "redacted": False, "turn_identifier": 7},
        {**A, "language": "English", "toxic": False, "redacted": False, "turn_identifier": 7},
    ],
    "turn": 1,
    "language": "English",
    "openai_moderation": [{"flagged": False}],
    "toxic": False,
    "redacted": False,
    "state": None,
}
LMSYS = {
    "conversation_id": "c1",
    "model": "vicuna-13b",
    "conversation": [U, A, {**U, "name": ""}, A],
    "turn": 2,
    "language": "English",
    "openai_moderation": [{"categories": {}}],
    "redacted": True,
}
ULTRACHAT = {"prompt": "q", "prompt_id": "x", "messages": [U, A], "score": 4.5}


@pytest.mark.parametrize("row", [WILDCHAT, LMSYS, ULTRACHAT])
def test_keys_without_an_effect_are_counted_and_refuse_no_row(row: dict[str, Any]) -> None:
    rows, errors = read(row)
    assert not errors
    assert {turn["role"] for turn in rows[0].messages} == {"user", "assistant"}
    known = FORMATS["messages"].takes
    given = {key for key, value in row.items() if key not in known and value is not None}
    found = {key: n for key, n in rows[0].notes.unused.items() if "[]" not in key}
    assert found == dict.fromkeys(given, 1)
    assert rows[0].notes.unused.get("messages[].toxic", 0) == (2 if row is WILDCHAT else 0)


def test_lists_may_be_json_text_as_tables_hold_them() -> None:
    for key in ("messages", "conversations", "conversation"):
        assert turns({key: json.dumps([U, A]), "tools": "[]"}) == [U, A]
    assert "'messages' is text that is not valid JSON" in refusal(
        {"messages": "[{'role': 'user'}]"}
    )
    assert "'messages' is str" in refusal({"messages": "hello"})
