"""Tools that a row's assistant may call: definitions, calls, and how formats write them."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.rows import BadRowError
from trainer.profiles import Message


def with_tools(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, the first of which carries the row's `tools`; they go to the chat template.

    Raises:
        BadRowError: `tools` is no list of function definitions, nor JSON text of one.
    """
    tools = row.get("tools")
    if not tools or not messages:
        return messages
    if isinstance(tools, str):
        tools = _parsed(tools, "'tools'", "broken tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _broken("'tools' must be a list of objects")
    if not all(isinstance(_definition(tool).get("name"), str) for tool in tools):
        raise _broken("each of 'tools' must name its function")
    # Templates want {"type": "function", "function": ...}; some files hold the inner part only.
    whole = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return [Message(**{**messages[0], "tools": whole}), *messages[1:]]


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
        raise BadRowError(
            f"row defines the tools {', '.join(map(repr, missing))}, which the model's chat "
            "template does not write; take them out, or choose a template that takes tools",
            "template without tools",
        )


def calls_from_text(text: str, where: str) -> list[dict[str, Any]]:
    """The calls of a sharegpt `function_call` turn: JSON of one call or of several.

    Raises:
        BadRowError: it is none.
    """
    found = _parsed(text, where, "broken function_call")
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        raise BadRowError(
            f'{where} is no call; it must be JSON like {{"name": "...", "arguments": {{...}}}}',
            "broken function_call",
        )
    return [{"type": "function", "function": call} for call in calls]
