"""Tools that an assistant may call, and how a chat template wants turns and calls to be spelled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from trainer.data.rows import BadRowError
from trainer.errors import TemplateError
from trainer.models.chat_template import in_parts, takes_parts
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
        raise BadRowError(f"{where} is text that is not valid JSON ({error})", reason) from error


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
        what = "remove the tools, the calls and their results" if calls else "remove them"
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
            f"{where} has invalid tool_calls; those of an assistant turn are a list of "
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
            f"{where} has an invalid function_call; that of an assistant turn is "
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
            f'{where} is not a call; it must be JSON like {{"name": "...", "arguments": {{...}}}}',
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


# ---- the arguments of tool calls: JSON text or an object in the rows, one of the two in a template


ArgumentsForm = Literal["object", "text"]


def with_arguments(row: list[Message], form: ArgumentsForm | None) -> list[Message]:
    """The row with the arguments of its calls in the form that the chat template takes.

    Both spellings of the same arguments become the same; none, null and empty text are {}.

    Args:
        row: the turns; those without calls are handed on as they are.
        form: None where no form is known to be right, so that each stays as it is.
    Raises:
        BadRowError: text that is no JSON object, or that an object cannot hold exactly.
    """
    if not any(turn.get("tool_calls") for turn in row):
        return row
    turns = []
    for position, turn in enumerate(row):
        calls = turn.get("tool_calls")
        if calls:
            where = f"turn {position} ({turn['role']}), tool_calls"
            spelled = [_spelled(c, form, f"{where}[{n}]") for n, c in enumerate(calls)]
            turn = Message(**{**turn, "tool_calls": spelled})
        turns.append(turn)
    return turns


def _spelled(call: dict[str, Any], form: ArgumentsForm | None, where: str) -> dict[str, Any]:
    function = call["function"]
    value = parsed_arguments(function.get("arguments"), f"{where}.function.arguments")
    given: Any = json.dumps(value, ensure_ascii=False) if form == "text" else value
    return {**call, "function": {**function, "arguments": given}}


def parsed_arguments(value: Any, where: str) -> dict[str, Any]:
    """Arguments in either spelling as an object, members in their order.

    Raises:
        BadRowError: they are none, or would be changed by being read.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        value = _read(value, where)
    if not isinstance(value, dict):
        raise BadRowError(
            f"{where} is {json.dumps(value, ensure_ascii=False)[:60]}, a JSON "
            f"{type(value).__name__}; a call's arguments are an object such as "
            '{"city": "Oslo"}, or its JSON text',
            "broken arguments",
        )
    return value


def _read(text: str, where: str) -> Any:
    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice in one object")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is too large a number")
        return value

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(
            text, object_pairs_hook=members, parse_float=number, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            f"{where} is text that is not valid JSON ({error}): {text[:60]!r}; correct it, or "
            "write the arguments as an object",
            "broken arguments",
        ) from error


def missing_arguments(arguments: Any, said: str) -> list[str]:
    """Names and texts of a call's arguments that do not stand in what its turn says.

    Args:
        arguments: as the template was given them.
        said: the turn as the template wrote it.
    """
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [leaf for leaf in _texts(value) if not any(form in said for form in _spellings(leaf))]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, part in value.items() for text in (str(key), *_texts(part))]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return []


def _spellings(text: str) -> tuple[str, ...]:
    """A text as templates write it: as it is, in JSON, in JSON of ASCII only, in Python."""
    return (
        text,
        *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True)),
        repr(text)[1:-1],
    )


# ---- how a chat template wants turns to be spelled, found by rendering small conversations
#
# Templates disagree on three things: content is text or a list of parts, the arguments of a call
# are an object or JSON text, and a thought is a key of its turn, a stretch of its content, or
# nothing.


Render = Callable[[list[Message]], str]
"""The text of turns, which are handed to the template as they are."""

USER, SAYS, RESULT, THOUGHT = "quay zebra?", "juniper flax.", "oboe nine.", "vixen amber."

CALLED, ARGUMENTS = "probe_quartz", {"gnome": "wharf"}


@dataclass(frozen=True)
class Dialect:
    """What a template takes."""

    takes_parts: bool = False
    """Content is a list of {"type": "text", "text": ...}."""
    arguments: ArgumentsForm | None = None
    """How the arguments of calls are given; None: it writes them in neither form."""
    thought: Literal["key", "content"] | None = None
    """Where a thought is given: as the key `reasoning_content`, or between <think> and </think>
    before what is said; None: it writes none."""

    def spelled(self, turns: list[Message]) -> list[Message]:
        """The turns as the template takes them; their calls must have been spelled before."""
        return [self._turn(turn) for turn in turns]

    def _turn(self, turn: Message) -> Message:
        copy: dict[str, Any] = {
            key: part for key, part in turn.items() if key != "weight" and part is not None
        }
        thought = copy.get("reasoning_content")
        if thought is not None and self.thought != "key":
            del copy["reasoning_content"]
            if self.thought == "content":
                said = f"\n\n{turn['content']}" if turn["content"] else ""
                copy["content"] = f"<think>\n{thought.strip()}\n</think>{said}"
        if self.takes_parts:
            [copy] = in_parts([copy])
        return cast(Message, copy)


def find_dialect(tokenizer: Any, render: Render) -> Dialect:
    """Find what a tokenizer's template takes.

    Args:
        tokenizer: with the template.
        render: renders turns by it.
    """
    is_parts = takes_parts(tokenizer)

    def spelled(turns: list[Message]) -> str:
        return render(Dialect(is_parts, thought="key").spelled(turns))

    form = _arguments(spelled)
    return Dialect(is_parts, form, _thought(spelled, form, tokenizer.chat_template))


def question(content: str = USER) -> Message:
    """A user's turn."""
    return Message(role="user", content=content)


def answer(content: str = SAYS, **more: Any) -> Message:
    """An assistant's turn."""
    return cast("Message", {"role": "assistant", "content": content, **more})


def call_turn(form: ArgumentsForm | None, **more: Any) -> Message:
    """An assistant's turn that calls a function."""
    arguments = json.dumps(ARGUMENTS) if form == "text" else ARGUMENTS
    function = {"name": CALLED, "arguments": arguments}
    return answer(
        "", tool_calls=[{"id": CALL_ID, "type": "function", "function": function}], **more
    )


def result_turn() -> Message:
    """What the function called answers."""
    return Message(role="tool", content=RESULT, name=CALLED, tool_call_id=CALL_ID)


CALL_ID = "call00001"  # nine letters and digits: some templates refuse others


def _arguments(render: Render) -> ArgumentsForm | None:
    """The form in which the arguments stand once, decoded."""
    forms: tuple[ArgumentsForm, ...] = ("object", "text")
    for form in forms:
        try:
            text = render([question(), call_turn(form), result_turn(), answer()])
        except TemplateError:
            continue
        [(name, value)] = ARGUMENTS.items()
        is_once = text.count(name) == text.count(value) == 1
        if form == "text" and is_once and json.dumps(ARGUMENTS) in text:
            return form
        # An object put into text by Python is no JSON: such a template wants text.
        if form == "object" and is_once and repr(ARGUMENTS) not in text:
            return form
    return None


def _thought(
    render: Render, form: ArgumentsForm | None, source: str
) -> Literal["key", "content"] | None:
    """Where a thought must be given to stand in an answer, or at least in a call."""
    turns = [answer(reasoning_content=THOUGHT), call_turn(form, reasoning_content=THOUGHT)]
    if any(_count(render, [question(), turn]) == 1 for turn in turns):
        return "key"
    # A template that speaks of thoughts and drops them is not to be led round that.
    if "</think>" in source or not re.search("reasoning|think", source):
        inside = Dialect(thought="content").spelled([question(), turns[0]])
        if _count(render, inside) == 1:
            return "content"
    return None


def _count(render: Render, turns: list[Message]) -> int:
    """How often a template writes the thought of turns; 0 where it refuses them."""
    try:
        return render(turns).count(THOUGHT)
    except TemplateError:
        return 0
