"""What an OpenAI-compatible server is sent and what it may answer, by shape. No HTTP, no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainer.errors import PreviewError

LENGTH = {"length", "max_tokens", "model_length", "max_output_tokens"}

WITHHELD = {"content_filter", "safety", "error", "abort", "cancelled"}
"""Finish reasons of answers that are not what the model says."""

TURN_KEYS = ("role", "content", "name", "tool_call_id", "reasoning_content")


def wire_messages(turns: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns and their tools as the chat endpoint takes them.

    Calls get the ids that the endpoint wants where the data has none, their results the same ones
    in order, and arguments become JSON text.
    """
    messages: list[dict[str, Any]] = []
    tools: list[Any] = []
    open_calls: list[str] = []
    for turn in turns:
        tools = tools or list(turn.get("tools") or ())
        message = {key: turn[key] for key in TURN_KEYS if turn.get(key) not in (None, "")}
        message.setdefault("content", "")
        if turn.get("tool_calls"):
            calls = [
                _wire_call(call, f"call_{len(messages)}_{n}")
                for n, call in enumerate(turn["tool_calls"])
            ]
            open_calls += [call["id"] for call in calls]
            message |= {"tool_calls": calls, "content": message["content"] or None}
        if turn["role"] == "tool":
            answered = message.get("tool_call_id") or (open_calls[0] if open_calls else "call_0")
            message["tool_call_id"] = answered
            open_calls = [one for one in open_calls if one != answered]
        messages.append(message)
    return messages, tools


def _wire_call(call: Mapping[str, Any], default_id: str) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    name = str(function.get("name", ""))
    return {
        "id": str(call.get("id") or default_id),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


class Answer(BaseModel):
    """What the model said, whichever way the server put it."""

    model_config = ConfigDict(frozen=True)

    content: str = ""
    thought: str = ""
    """What servers that take thoughts out of the text send beside it."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """The same with calls; arguments are objects where they are JSON."""
    is_cut: bool = False
    """The limit ended it."""
    num_tokens: int | None = None
    """None: the server does not say."""

    def turn(self) -> dict[str, Any]:
        """As the assistant's turn of a conversation."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thought:
            turn["reasoning_content"] = self.thought
        if self.tool_calls:
            turn["tool_calls"] = list(self.tool_calls)
        return turn

    def plain_text(self) -> str:
        """Thought, words and calls one after the other, where no template says how."""
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in self.tool_calls]
        text = "\n".join([*([self.content] if self.content else []), *calls])
        if not self.thought:
            return text
        return f"<think>\n{self.thought}" + (f"\n</think>\n\n{text}" if text else "")


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    completion_tokens: int | None = None

    @field_validator("completion_tokens", mode="before")
    @classmethod
    def _count_or_none(cls, value: Any) -> int | None:
        return value if type(value) is int and value >= 0 else None


class _Completion(BaseModel):
    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def read_answer(found: Any, limit: int) -> Answer:
    """The first choice of a completion or chat completion.

    Args:
        limit: tokens that were asked for at most.
    Raises:
        ValueError: it has another shape.
        PreviewError: the server withheld the answer.
    """
    whole = _Completion.model_validate(found)
    choice = whole.choices[0]
    reason = (choice.finish_reason or "").lower()
    if reason in WITHHELD:
        raise PreviewError(f"the server withheld the answer (finish_reason {reason!r}).")
    count = whole.usage.completion_tokens if whole.usage is not None else None
    # Without a reason, an answer as long as the limit was cut there.
    is_cut = reason in LENGTH or (not reason and count is not None and count >= limit)
    if choice.message is None:
        if choice.text is None:
            raise ValueError("a choice has neither message nor text")
        return Answer(content=choice.text, is_cut=is_cut, num_tokens=count)
    said = choice.message
    words, thoughts = _parts(said.content)
    return Answer(
        content=words or said.refusal or "",
        thought=said.reasoning_content or said.reasoning or thoughts,
        tool_calls=tuple(_read_call(call) for call in said.tool_calls or ()),
        is_cut=is_cut,
        num_tokens=count,
    )


def _parts(content: Any) -> tuple[str, str]:
    """Words and thoughts of a content that is text, a list of parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or "", ""
    words, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif isinstance(part, dict) and "thinking" in part:
            thoughts.append("".join(_parts(part["thinking"])))
        else:
            raise ValueError("a part of the content is no text")
    return "".join(words), "".join(thoughts)


def _read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call names no function")
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str):
        # What the model wrote need not be JSON: it is shown as it is then.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
