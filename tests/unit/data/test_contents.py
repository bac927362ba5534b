"""Contents as people bring them: parts, numbers, thoughts, and speakers under many names."""

from __future__ import annotations

from typing import Any

import pytest

from tests.collected import collected
from trainer.data.row_files import to_rows
from trainer.data.rows import Row, RowErrors

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row: dict[str, Any]) -> tuple[list[Row], list[str]]:
    errors = RowErrors("skip")
    rows, _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    return rows, errors.errors


def last(row: dict[str, Any]) -> Any:
    rows, errors = read(row)
    assert not errors
    return rows[0].messages[-1]


def refusal(row: dict[str, Any]) -> str:
    rows, errors = read(row)
    assert not rows
    return errors[0]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_parts_of_text_are_one_text() -> None:
    for parts in ([part("a"), part("b")], [{"type": "output_text", "text": "ab"}], ["ab"]):
        assert last({"messages": [Q, {**A, "content": parts}]})["content"] == "ab"
        assert last({"conversations": [Q, {"from": "gpt", "value": parts}]})["content"] == "ab"
    assert last({"question": [part("q")], "answer": [part("a"), part("b")]})["content"] == "ab"
    assert last({"prompt": [part("q")], "completion": [part("ab")]})["content"] == "ab"


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_audio", "video", "file", "tool_use", "tool_result"]
)
def test_a_part_that_is_no_text_is_a_bad_row_that_names_it(kind: str) -> None:
    bad = [part("see"), {"type": kind, kind: "x"}]
    said = refusal({"messages": [{**Q, "content": bad}, A]})
    assert f"messages[0].content[1] is a part of type {kind!r}" in said


def test_texts_that_may_be_alternatives_are_not_joined() -> None:
    assert "content[0] is str" in refusal({"messages": [{**Q, "content": ["a", "b"]}, A]})
    assert "'answer' is list" in refusal({"question": "q", "answer": ["a", "b"]})


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (0, "0"), (2.5, "2.5"), (True, "true"), (False, "false")]
)
def test_numbers_and_booleans_are_taken_as_json_text_and_counted(value: Any, text: str) -> None:
    for row in (
        {"question": "q", "answer": value},
        {"messages": [Q, {**A, "content": value}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": value}]},
        {"prompt": "q", "completion": value},
        {"instruction": "q", "output": value},
    ):
        assert last(row)["content"] == text
        assert read(row)[0][0].notes.num_as_text == 1


def test_a_tools_result_may_be_any_json() -> None:
    call = {**A, "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    for value, text in (({"x": 1}, '{"x": 1}'), ([1, 2], "[1, 2]"), ([part("y")], "y")):
        told = {"role": "tool", "content": value}
        rows, errors = read({"messages": [Q, call, told, A]})
        assert not errors
        assert rows[0].messages[2]["content"] == text
    assert rows[0].messages[1]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_kept_apart_from_the_words(key: str) -> None:
    for thought in ("hm", [part("hm")]):
        assert last({"messages": [Q, {**A, key: thought}]})["reasoning_content"] == "hm"
    assert last({"conversations": [Q, {"from": "gpt", "value": "a", key: "hm"}]}) == {
        **A,
        "reasoning_content": "hm",
    }
    assert "reasoning_content" not in last({"messages": [Q, {**A, key: None}]})
    assert "only the assistant thinks" in refusal({"messages": [{**Q, key: "hm"}, A]})
    assert "a thought must be text" in refusal({"messages": [Q, {**A, key: 3}]})


def test_a_thought_may_be_a_part_or_stand_under_two_equal_keys() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, part("a")]
    assert last({"messages": [Q, {**A, "content": parts}]}) == {**A, "reasoning_content": "hm"}
    both = {**A, "thinking": "hm", "reasoning": "hm"}
    assert last({"messages": [Q, both]})["reasoning_content"] == "hm"
    assert "differ" in refusal({"messages": [Q, {**both, "reasoning": "no"}]})


SPEAKERS = {
    "developer": "system",
    "human": "user",
    "model": "assistant",
    "gpt": "assistant",
    "Assistant": "assistant",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "observation": "tool",
}


@pytest.mark.parametrize("name", SPEAKERS)
@pytest.mark.parametrize(("key", "said"), [("role", "content"), ("from", "value")])
def test_speakers_are_known_under_their_other_names(name: str, key: str, said: str) -> None:
    turns = [{key: name, said: "x"}, {key: "user", said: "q"}, {key: "assistant", said: "a"}]
    if SPEAKERS[name] in ("tool", "assistant"):
        turns = [turns[1], {key: "assistant", said: "b"}, *turns]
    for list_key in ("messages", "conversations"):
        rows, errors = read({list_key: turns})
        assert not errors
        assert SPEAKERS[name] in [
            turn["role"] for turn in rows[0].messages if turn["content"] == "x"
        ]


@pytest.mark.parametrize("name", ["tool_call", "function_call"])
@pytest.mark.parametrize(
    "value",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        '[{"name": "f", "parameters": {"x": 1}}]',
        {"name": "f", "arguments": {"x": 1}},
    ],
)
def test_turns_that_are_calls_become_the_assistants(name: str, value: Any) -> None:
    for key, said, list_key in (
        ("from", "value", "conversations"),
        ("role", "content", "messages"),
    ):
        rows, errors = read({list_key: [{key: "user", said: "q"}, {key: name, said: value}]})
        assert not errors
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        assert rows[0].messages[1]["tool_calls"] == [call]


def test_system_turns_may_stand_anywhere_among_the_turns() -> None:
    late = {"role": "system", "content": "be brief"}
    for turns in ([Q, A, late, Q, A], [late, {**late, "role": "developer"}, Q, A]):
        rows, errors = read({"messages": turns})
        assert not errors
        assert sum(turn["role"] == "system" for turn in rows[0].messages) in (1, 2)


def test_other_keys_of_parts_are_counted_or_refused_like_those_of_turns() -> None:
    cached = {**part("x"), "cache_control": {"type": "ephemeral"}, "image": None}
    rows, errors = read({"messages": [{**Q, "content": [cached, cached]}, A]})
    assert not errors
    assert rows[0].notes.unused == {"content[].cache_control": 2}
    seen = {**part("x"), "image": "cat.png"}
    assert "content[0] has 'image'" in refusal({"messages": [{**Q, "content": [seen]}, A]})
