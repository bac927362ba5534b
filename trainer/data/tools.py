"""Tools that a row's assistant may call: definitions, calls, and how formats write them."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.rows import BadRowError
from trainer.profiles import Message


def with_tools(tools: Any, messages: list[Message]) -> list[Message]:
    """The messages, the first of which carries the row's tools; they go to the chat template.

    Raises:
        BadRowError: `tools` is no list of function definitions, nor JSON text of one.
    """
    if not tools or not messages:
        return messages
    if isinstance(tools, str):
        if not tools.strip():
            return messages
        tools = _parsed(tools, "'tools'", "broken tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _broken("'tools' must be a list of objects")
    if not all(isinstance(_definition(tool).get("name"), str) for tool in tools):
        raise _broken("each of 'tools' must name its function")
    # Templates want {"type": "function", "function": ...}; some files hold the inner part only.
    whole = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return [Message(**{**messages[0], "tools": whole}), *messages[1:]] if whole else messages


def _broken(what: str) -> BadRowError:
    return BadRowError(
        f'{what}, such as {{"type": "function", "function": {{"name": "...", "parameters": '
        "{...}}}",
        "broken tools",
    )


def _definition(tool: dict[str, Any]) -> dict[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, dict) else {}


def _parsed(text: str, where: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{where} is text that is no JSON ({error})", reason) from error


def tools_of(messages: list[Message]) -> list[dict[str, Any]] | None:
    """The tools of a row; None for most rows."""
    return next((turn["tools"] for turn in messages if turn.get("tools")), None)


def tool_names(calls: list[dict[str, Any]]) -> list[str]:
    """The functions' names; "" for a call that names none."""
    functions = [call.get("function") for call in calls]
    names = [f.get("name") if isinstance(f, dict) else None for f in functions]
    return [name if isinstance(name, str) else "" for name in names]


def refuse_lost_tools(messages: list[Message], text: str) -> None:
    """Refuse a row whose tools the chat template leaves out.

    Args:
        text: the row as the template renders it.
    Raises:
        BadRowError: the name of one is not in the text.
    """
    missing = [name for name in tool_names(tools_of(messages) or []) if name not in text]
    if missing:
        calls = any(turn.get("tool_calls") for turn in messages)
        what = "take the tools, the calls and their results out" if calls else "take them out"
        raise BadRowError(
            f"row defines the tools {', '.join(map(repr, missing))}, which the model's chat "
            f"template does not write; {what}, or choose a template that takes tools",
            "template without tools",
        )


def check_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """The `tool_calls` of an assistant turn, each {"function": {"name": ..., "arguments": ...}}.

    Raises:
        BadRowError: they are none, or the turn is not the assistant's.
    """
    if isinstance(calls, str):
        calls = _parsed(calls, f"{where}.tool_calls", "broken tool_calls")
    is_list = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    # Some files hold the inner part only.
    whole = [_whole_call(call) for call in calls] if is_list else []
    if role != "assistant" or not is_list or not all(tool_names(whole)):
        raise BadRowError(
            f"{where} has tool_calls that are none; an assistant turn's are a list of "
            '{"type": "function", "function": {"name": "...", "arguments": {...}}}',
            "broken tool_calls",
        )
    return whole


def _whole_call(call: dict[str, Any]) -> dict[str, Any]:
    return call if "function" in call else {"type": "function", "function": call}


def call_of_function(call: Any, role: str, where: str) -> dict[str, Any]:
    """The call of an older `function_call`: {"name": ..., "arguments": JSON text}.

    Raises:
        BadRowError: it is none, or the turn is not the assistant's.
    """
    if isinstance(call, str):
        call = _parsed(call, f"{where}.function_call", "broken function_call")
    if role != "assistant" or not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRowError(
            f"{where} has a function_call that is none; an assistant turn's is "
            '{"name": "...", "arguments": "{...}"}',
            "broken function_call",
        )
    return {"type": "function", "function": call}


def calls_from_value(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a turn that is nothing but calls: JSON, or its text, of one or of several.

    Raises:
        BadRowError: it is none.
    """
    found = _parsed(value, where, "broken function_call") if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        calls = [{}]
    calls = [_with_arguments(call.get("function", call)) for call in calls]
    if not all(isinstance(call.get("name"), str) for call in calls):
        raise BadRowError(
            f'{where} is no call; it must be JSON like {{"name": "...", "arguments": {{...}}}}',
            "broken function_call",
        )
    return [{"type": "function", "function": call} for call in calls]


def _with_arguments(call: Any) -> dict[str, Any]:
    """A call under the usual names; Llama's own format calls the arguments `parameters`."""
    if not isinstance(call, dict):
        return {}
    if "arguments" not in call and "parameters" in call:
        return {"arguments" if k == "parameters" else k: v for k, v in call.items()}
    return call
