"""The layouts of rows that we know: which one a row has, its keys, and how it becomes messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trainer.data.rows import (
    TEXT_ROLE,
    BadRowError,
    RowNotes,
    is_text,
    is_tokens,
)
from trainer.data.token_rows import TOKEN_KEYS, turns_of_tokens
from trainer.data.tools import tool_names, tools_of, with_tools
from trainer.data.turn_flags import ROW_FLAGS, apply_row_flags, is_given, settle, speaks_of_training
from trainer.data.turns import (
    CALL_ROLES,
    CONTENT_KEYS,
    check_messages,
    check_text,
    from_turns,
    is_parts,
    leave_openings,
    take,
    take_text,
    take_thought,
)
from trainer.profiles import Message


@dataclass(frozen=True)
class Format:
    """A layout of rows."""

    keys: frozenset[str]
    """Keys that a row of this layout must have; they also tell it from the others."""
    optional: frozenset[str]
    """Keys that are used where they are."""
    convert: Callable[[dict[str, Any], RowNotes], list[Message]]
    """Makes the turns of a row, with the row's flags on them."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Another name -> the key it stands for, where the row does not have that."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Another name -> the key it stands for; where a row has both they must agree."""

    @property
    def takes(self) -> frozenset[str]:
        """Every key that has an effect, under any name."""
        return self.keys | self.optional | {*self.instead, *self.same}

    def under_own_keys(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with other names of keys replaced.

        Raises:
            BadRowError: two names of one key say different things.
        """
        named = dict(row)
        for name, key in self.instead.items():
            if name in named and key not in named:
                named[key] = named.pop(name)
        for name, key in self.same.items():
            if not is_given(named.get(name)):
                continue
            value = named.pop(name)
            if is_given(named.get(key)) and named[key] != value:
                raise BadRowError(
                    f"row has {key!r} and another {name!r}, which mean the same; keep one of them",
                    f"{key} and {name} differ",
                )
            named[key] = value
        return named

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a row has the keys of this layout."""
        others = {key for name, key in self.instead.items() if name in row}
        return self.keys <= {*row, *others}


def messages_of(row: dict[str, Any], name: str, notes: RowNotes) -> list[Message]:
    """The turns of a row of format `name`, with their weights, thoughts, calls and tools.

    Args:
        notes: told of keys that are not used and of numbers taken as text.
    Raises:
        BadRowError: it cannot be trained on as it says.
    """
    known = FORMATS[name]
    row = known.under_own_keys(row)
    _check_keys(row, known, notes)
    messages = known.convert(row, notes)
    if is_tokens(messages):
        return settle(messages)
    if is_text(messages):
        return _check_text(row, settle(messages), notes)
    messages = with_tools(row.get("tools"), _with_system(row, messages, notes))
    return check_messages(settle(leave_openings(messages)))


def _check_keys(row: dict[str, Any], known: Format, notes: RowNotes) -> None:
    """Refuse keys that would have to have an effect, and count those that have none."""
    for key, value in row.items():
        if key in known.keys or key in known.optional or not is_given(value):
            continue
        if key in REFUSED_KEYS or (key, value) == ("label", False):
            raise BadRowError(
                f"row has {key!r}, which {REFUSED_KEYS.get(key, NOT_WANTED)}; remove it if the "
                "row is right without it",
                f"row with {key}",
            )
        if speaks_of_training(key):
            raise BadRowError(
                f"row has {key!r}, which seems to say what is trained; known flags: "
                f"{', '.join(sorted(ROW_FLAGS))}. Rename or remove it",
                "unknown flag",
            )
        notes.note_unused(key)


def _from_list(key: str, row: dict[str, Any], notes: RowNotes) -> list[Message]:
    """The turns under `key`."""
    turns = take_list(row, key)
    return joined_calls(_flagged(row, from_turns(turns, key, notes)), turns)


def _from_pair(
    asked: str, answered: str, extra: str | None, row: dict[str, Any], notes: RowNotes
) -> list[Message]:
    """Two turns behind those of `history`; what is under `extra` belongs to the question."""
    question = take_text(row, asked, notes)
    if extra is not None and is_given(row.get(extra)):
        more = take_text(row, extra, notes)
        question = f"{question}\n\n{more}" if more.strip() else question
    turns: list[Message] = []
    history = take_list(row, "history") if is_given(row.get("history")) else []
    for position, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise BadRowError(
                f"history[{position}] must be a pair of texts, [question, answer]",
                "broken history",
            )
        turns += _two_turns(*pair)
    turns += _two_turns(question, take_text(row, answered, notes))
    # A column called `reasoning` explains an answer as often as it is the thought before it.
    thought = take_thought({k: v for k, v in row.items() if k in PAIRS}, "", notes)
    if thought:
        turns[-1]["reasoning_content"] = thought
    return _flagged(row, turns)


def _from_prompt_completion(row: dict[str, Any], notes: RowNotes) -> list[Message]:
    """Both are texts, or both are lists of turns, of which the completion's are trained."""
    if not _is_turns(row.get("prompt")):
        return _from_pair("prompt", "completion", None, row, notes)
    for key in sorted(PAIRS):
        if is_given(row.get(key)):
            raise BadRowError(
                f"row has {key!r} beside a list of turns; put it into the turns", f"row with {key}"
            )
    turns = [*row["prompt"], *take(row, "completion", list)]
    prompt = from_turns(row["prompt"], "prompt", notes)
    for turn in prompt:
        if turn["role"] == "assistant":  # read like the rest of the prompt
            turn.setdefault("weight", 0.0)
    messages = [*prompt, *from_turns(row["completion"], "completion", notes)]
    return joined_calls(_flagged(row, messages), turns)


def take_list(row: dict[str, Any], key: str) -> list[Any]:
    """The list under `key`, or its JSON text, as tables hold it.

    Raises:
        BadRowError: it is neither.
    """
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(
                f"{key!r} is text that is not valid JSON ({error})", f"{key} of wrong type"
            ) from error
    found: list[Any] = take({**row, key: value} if key in row else row, key, list)
    return found


def _is_turns(value: Any) -> bool:
    """Whether a prompt is a list of turns, and not of the parts of one text."""
    return isinstance(value, list) and not (value and is_parts(value))


def joined_calls(messages: list[Message], turns: list[Any]) -> list[Message]:
    """Calls that files write as turns of their own, one after the other, are one turn.

    Args:
        turns: what the messages were made of, one for one.
    """
    if not any("tool_calls" in message for message in messages):
        return messages
    joined: list[Message] = []
    was_call = False
    for message, turn in zip(messages, turns, strict=True):
        is_call = str(turn.get("role") or turn.get("from")).strip().lower() in CALL_ROLES
        if is_call and was_call and joined[-1].get("weight") == message.get("weight"):
            joined[-1]["tool_calls"] = [*joined[-1]["tool_calls"], *message["tool_calls"]]
        else:
            joined.append(message)
        was_call = is_call
    return joined


def _from_text(row: dict[str, Any], notes: RowNotes) -> list[Message]:
    text: str = take(row, "text", str)
    return _flagged(row, [check_text_row(text)])


def check_text_row(text: str) -> Message:
    """The turn of a plain text.

    Raises:
        BadRowError: there is nothing in it to train, or it is text that no tokenizer takes.
    """
    if not text.strip():
        raise BadRowError("the text is empty, so nothing to train", "empty text")
    check_text(text, "the text")
    return Message(role=TEXT_ROLE, content=text)


def _check_text(row: dict[str, Any], messages: list[Message], notes: RowNotes) -> list[Message]:
    """Plain text has no system turn and no tools: what stands beside it must be part of it."""
    [turn] = messages
    if turn.get("weight", 1.0) == 0:
        raise BadRowError("the row's flags leave nothing of it to train", "nothing to train")
    system = take_text(row, "system", notes) if is_given(row.get("system")) else ""
    tools = tools_of(with_tools(row.get("tools"), [Message(role="user", content="")]))
    lost = [name for name in tool_names(tools or []) if name not in turn["content"]]
    if system.strip() not in turn["content"] or lost:
        what = f"the tools {', '.join(map(repr, lost))}" if lost else "a 'system'"
        raise BadRowError(
            f"row has {what} beside a 'text' that does not contain it; plain text has no turns, so "
            "put it into the text, or write the row as 'messages'",
            "system or tools beside text",
        )
    return messages


def _flagged(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    apply_row_flags(row, messages)
    return messages


def _two_turns(user: str, assistant: str) -> list[Message]:
    return [Message(role="user", content=user), Message(role="assistant", content=assistant)]


def _with_system(row: dict[str, Any], messages: list[Message], notes: RowNotes) -> list[Message]:
    """The messages with the row's own system prompt first.

    Raises:
        BadRowError: they begin with another one.
    """
    text = take_text(row, "system", notes) if is_given(row.get("system")) else ""
    if not text.strip():
        return messages
    if not messages or messages[0]["role"] != "system":
        return [Message(role="system", content=text), *messages]
    if messages[0]["content"].strip() != text.strip():
        raise BadRowError(
            "row has a 'system' and its turns begin with another system turn; keep one of them",
            "two system prompts",
        )
    return messages


NOT_WANTED = "marks the answer as one that is not wanted"

REFUSED_KEYS = {
    **dict.fromkeys(
        sorted((CONTENT_KEYS - {"recipient", "channel"}) | {"function_call"}),
        "holds content that is not supported and would be lost",
    ),
    **dict.fromkeys(
        ("assistant_mask", "assistant_masks", "completion_mask"),
        "marks single tokens to train, which is not supported",
    ),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs"),
        "asks for a template other than the model's, which is not supported",
    ),
}
"""Keys of a row that change what it means and cannot be obeyed -> why; bad rows where given."""

ALL_ROWS = {"system", "tools", *ROW_FLAGS}

PAIRS = {"history", "reasoning_content", "thinking"}

SAME = {"system_prompt": "system", "system_message": "system", "functions": "tools"}

FORMATS: dict[str, Format] = {
    # First: who has tokenized the rows may have left their text beside the ids.
    "tokens": Format(
        frozenset({"input_ids"}),
        frozenset(TOKEN_KEYS | ALL_ROWS),
        lambda row, notes: turns_of_tokens(row),
        same=SAME,
    ),
    "messages": Format(
        frozenset({"messages"}),
        frozenset(ALL_ROWS),
        partial(_from_list, "messages"),
        instead={"conversation": "messages"},
        same=SAME,
    ),
    "sharegpt": Format(
        frozenset({"conversations"}),
        frozenset(ALL_ROWS),
        partial(_from_list, "conversations"),
        same=SAME,
    ),
    "question_answer": Format(
        frozenset({"question", "answer"}),
        frozenset({"context", *ALL_ROWS, *PAIRS}),
        partial(_from_pair, "question", "answer", "context"),
        same=SAME,
    ),
    "prompt_completion": Format(
        frozenset({"prompt", "completion"}),
        frozenset(ALL_ROWS | PAIRS),
        _from_prompt_completion,
        same=SAME,
    ),
    "alpaca": Format(
        frozenset({"instruction", "output"}),
        frozenset({"input", *ALL_ROWS, *PAIRS}),
        partial(_from_pair, "instruction", "output", "input"),
        instead={"response": "output"},
        same={"context": "input", **SAME},
    ),
    "text": Format(frozenset({"text"}), frozenset(ALL_ROWS), _from_text, same=SAME),
}
"""The layouts by name, in the order in which they are looked for."""


# ---- which layout a row has


NO_FORMAT = "no known format"


def under_format(
    row: dict[str, Any], columns: Mapping[str, str], known: str | None, *, is_found: bool
) -> tuple[dict[str, Any], str]:
    """The row under the keys of its format, and the format's name.

    Args:
        columns: a format's key -> the file's name for it.
        known: the file's format; None: this row tells it.
        is_found: the file's first row told it, not data.format.
    Raises:
        BadRowError: the row is of no format, or of another one than its file.
    """
    row = _in_usual_spelling(_renamed(row, columns), known)
    name = known or detect_format(row)
    _refuse_change(row, name, is_found=is_found)
    return row, name


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's own keys."""
    renamed = {key: value for key, value in row.items() if key not in columns}
    for key, column in columns.items():
        if column not in row:
            raise BadRowError(
                f"row has no {column!r}, which data.columns names for {key!r}; "
                f"found keys {sorted(row)}",
                f"no {column}",
            )
        renamed.pop(column, None)
    return renamed | {key: row[column] for key, column in columns.items()}


def _in_usual_spelling(row: dict[str, Any], known: str | None) -> dict[str, Any]:
    """The row with a format's own keys where its keys differ in capitals or outer spaces only."""
    formats = [FORMATS[known]] if known else list(FORMATS.values())
    folded = {key.strip().casefold() for key in row}
    if any(layout.keys <= set(row) for layout in formats) or len(folded) < len(row):
        return row
    for layout in formats:
        if layout.keys <= folded:
            names = layout.keys | layout.optional
            usual = {key: key.strip().casefold() for key in row}
            return {usual[key] if usual[key] in names else key: row[key] for key in row}
    return row


def detect_format(row: dict[str, Any]) -> str:
    """Name the format of a row by its keys.

    Raises:
        BadRowError: no format has these keys.
    """
    for name, known in FORMATS.items():
        if known.fits(row):
            return name
    wanted = "; ".join(" and ".join(sorted(known.keys)) for known in FORMATS.values())
    raise BadRowError(
        f"row has the keys {sorted(row)}; it needs one of: {wanted} "
        "(data.columns maps other names to these)",
        NO_FORMAT,
    )


def _refuse_change(row: dict[str, Any], name: str, *, is_found: bool) -> None:
    """A row of another layout than the file's is named as that, not as a row with holes."""
    if FORMATS[name].fits(row):
        return
    others = [other for other, known in FORMATS.items() if known.fits(row)]
    if others:
        why = "as its first row says" if is_found else "as data.format says"
        raise BadRowError(
            f"row is of format {others[0]!r}, but the file is {name!r}, {why}; "
            "put rows of one format into a file",
            "another format",
        )
