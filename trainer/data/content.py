"""Texts of rows in the spellings that people bring, and rows that are nothing but text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from trainer.data.rows import (
    BadRowError,
    Example,
    RowNotes,
    cut,
    golden_ids,
    golden_text,
    is_given,
    kept_weights,
)
from trainer.profiles import Message

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold what it thinks."""

CONTENT_KEYS = frozenset(
    {"tool_plan", "image", "images", "audio", "audios", "video", "videos", "recipient", "channel"}
)
"""Keys of a turn with content that the model would miss: bad rows where they hold anything."""

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are words -> the key that holds them."""

THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


def take(row: dict[str, Any], key: str, kind: type) -> Any:
    """The value under `key`, which must be there and of this type.

    Raises:
        BadRowError: it is not.
    """
    if key not in row:
        raise BadRowError(f"row has no {key!r}; found keys {sorted(row)}", f"no {key}")
    value = row[key]
    if not isinstance(value, kind):
        raise BadRowError(
            f"{key!r} is {type(value).__name__}; it must be {kind.__name__}", f"{key} of wrong type"
        )
    return value


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
                f"{key!r} is text that is no JSON ({error})", f"{key} of wrong type"
            ) from error
    found: list[Any] = take({**row, key: value} if key in row else row, key, list)
    return found


def take_text(row: dict[str, Any], key: str, notes: RowNotes, where: str = "") -> str:
    """The text under `key`: as it is, the texts of a list of parts, or a number as JSON text.

    Raises:
        BadRowError: it is none of these, or a part is no text.
    """
    value = row.get(key)
    if isinstance(value, int | float):  # bool is an int
        notes.num_as_text += 1
        return _number_text(value, f"{where}{key}")
    if value and is_parts(value):
        words, thoughts = split_parts(value, f"{where}{key}", notes)
        if not thoughts:
            return words
    text: str = take(row, key, str)
    return text


def is_parts(value: Any) -> bool:
    """Whether a value is a list of content parts; a tool's result may be any JSON."""
    return isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    )


def split_parts(parts: list[Any], where: str, notes: RowNotes) -> tuple[str, str]:
    """The words and the thoughts of a list of content parts, each joined as they follow.

    Args:
        notes: told of keys of parts that are not used.
    Raises:
        BadRowError: a part is no text; it is named with its kind.
    """
    found: dict[bool, str] = {True: "", False: ""}
    for position, part in enumerate(parts):
        if isinstance(part, str) and len(parts) == 1:
            return part, ""
        at = f"{where}[{position}]"
        if not isinstance(part, dict):  # several texts may be alternatives, so they are not joined
            raise BadRowError(
                f"{at} is {type(part).__name__}; a part of a content is an object such as "
                '{"type": "text", "text": "..."}',
                "broken part",
            )
        kind = part.get("type") or ("text" if "text" in part else None)
        is_thought = kind in THOUGHT_PARTS
        key = {**TEXT_PARTS, **THOUGHT_PARTS}.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise BadRowError(
                f"{at} is a part of type {kind!r}; only parts of text can be trained on, such as "
                '{"type": "text", "text": "..."}',
                f"part of type {str(kind)[:40]}",
            )
        _check_part(part, key, at, notes)
        value = part.get(key)
        if is_thought and isinstance(value, list):
            value = "".join(split_parts(value, f"{at}.{key}", notes))
        if not isinstance(value, str):
            raise BadRowError(
                f"{at}.{key} is {type(value).__name__}; it must be str", "broken part"
            )
        found[is_thought] += value
    return found[False], found[True]


def _check_part(part: dict[str, Any], key: str, where: str, notes: RowNotes) -> None:
    """Refuse a part of text that brings other content, and count keys without an effect."""
    for other, value in part.items():
        if other in ("type", key) or not is_given(value):
            continue
        if other in CONTENT_KEYS:
            raise BadRowError(
                f"{where} has {other!r}, content that cannot be trained on here and would be lost",
                f"part with {other}",
            )
        notes.note_unused(f"content[].{other}")


def take_thought(turn: dict[str, Any], where: str, notes: RowNotes) -> str:
    """What a turn thinks, "" for nothing.

    Raises:
        BadRowError: it is no text, or is said twice and differently.
    """
    thoughts = {}
    for key in THOUGHT_KEYS:
        value = turn.get(key)
        if isinstance(value, list) and value:
            value = "".join(split_parts(value, f"{where}{key}", notes))
        if not is_given(value):
            continue
        if not isinstance(value, str):
            raise BadRowError(
                f"{where}{key} is {type(value).__name__}; a thought must be text", "broken thought"
            )
        if value.strip():
            thoughts[key] = value
    if len(set(thoughts.values())) > 1:
        raise BadRowError(
            f"{where}{' and '.join(thoughts)} differ; a turn has one thought", "two thoughts"
        )
    return next(iter(thoughts.values()), "")


def as_json_text(value: Any) -> str:
    """A value as JSON text in one line."""
    return json.dumps(value, ensure_ascii=False)


def _number_text(value: float, where: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(f"{where} is {value}, which is no number", "not a number")
    return as_json_text(value)


def check_text(text: str, where: str) -> None:
    """JSON can spell characters that are no text: half of a pair, and NUL.

    Raises:
        BadRowError: `where` holds one of them.
    """
    if "\0" in text:
        raise BadRowError(f"{where} contains a NUL character", "NUL in text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{where} contains half of a surrogate pair at character {error.start}, which is no "
            "text",
            "not text",
        ) from error


# ---- rows of plain text: every token is trained, an end-of-text token stands behind, no template
#
# A preview needs a prompt, and such rows have none: it is the first half of the text, at most
# MAX_PROMPT_CHARS of it, up to a border between two words where there is one.


TEXT_ROLE = "text"
"""Role of the only turn of such a row; no turn of a conversation can have it."""

MARKED_ROLE = "text with markers"
"""The same where control tokens in the text are meant (`data.text_markers=tokens`)."""

MAX_PROMPT_CHARS = 300


def is_text(messages: list[Message]) -> bool:
    """Whether a row is plain text and no conversation."""
    return bool(messages) and messages[0]["role"] in (TEXT_ROLE, MARKED_ROLE)


def check_text_row(text: str) -> Message:
    """The turn of a plain text.

    Raises:
        BadRowError: there is nothing in it to train, or it is text that no tokenizer takes.
    """
    if not text.strip():
        raise BadRowError("the text is empty, so nothing to train", "empty text")
    check_text(text, "the text")
    return Message(role=TEXT_ROLE, content=text)


class TextEncoder:
    """Turns texts into examples with one tokenizer and one length."""

    def __init__(self, tokenizer: Any, max_length: int, truncation: str) -> None:
        """Take a fast tokenizer; the other arguments are those of `RowEncoder`."""
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation

    def encode_chunk(
        self, turns: list[Message], refuse: Callable[[str], None]
    ) -> list[Example | BadRowError]:
        """Encode texts, in order; what cannot be encoded comes back as its error.

        Args:
            turns: the only turn of each row.
            refuse: raises BadRowError for text that holds a control token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            error = BadRowError(
                "the tokenizer has no end-of-text token, so a model trained on plain text could "
                "never stop; set eos_token in its tokenizer_config.json",
                "no end-of-text token",
            )
            return [error for _ in turns]
        texts = [turn["content"] for turn in turns]
        # With the tokenizer's own special tokens: one that begins texts with BOS does so here.
        tokens = self.tokenizer(texts, return_offsets_mapping=True)
        results: list[Example | BadRowError] = []
        for turn, ids, offsets in zip(
            turns, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            try:
                if turn["role"] != MARKED_ROLE:
                    refuse(turn["content"])
                results.append(self._example(turn, ids, offsets, eos))
            except BadRowError as error:
                results.append(error)
        return results

    def _example(
        self, turn: Message, ids: list[int], offsets: list[tuple[int, int]], eos: int
    ) -> Example:
        text, weights = turn["content"], [turn.get("weight", 1.0)] * (len(ids) + 1)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text brings its own
            ids, offsets = ids[1:], offsets[1:]
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        kept_ids, kept_labels = cut(ids, list(ids), self.max_length, self.truncation)
        removed = len(ids) - len(kept_ids)
        shown = offsets[removed:] if self.truncation == "keep_end" else offsets
        length, border = prompt_border(text, shown[: len(kept_ids) - 1])
        begin = shown[0][0] if removed and self.truncation == "keep_end" else 0
        return Example(
            input_ids=kept_ids,
            labels=kept_labels,
            prompt=text[begin:border],
            golden_answer=golden_text(self.tokenizer, golden_ids(kept_labels, length), {eos}),
            prompt_length=length,
            is_truncated=removed > 0,
            ends_with_stop=kept_ids[-1] == eos or removed > 0,
            num_removed=removed,
            weights=kept_weights(weights, kept_labels),
        )


def prompt_border(text: str, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """How many leading tokens a preview continues, at least one, and the character they end at.

    Args:
        offsets: (begin, end) in characters of each token; (0, 0) for a BOS.
    """
    begin, end = offsets[0][0], offsets[-1][1] if offsets else 0
    limit = begin + min((end - begin) // 2, MAX_PROMPT_CHARS)
    clean = [
        count
        for count in range(1, len(offsets))
        # Bytes of one character can be several tokens with the same place: no border there.
        if offsets[count - 1][1] <= limit and offsets[count][0] >= offsets[count - 1][1]
    ]
    words = [
        count
        for count in clean
        if text[offsets[count][0] : offsets[count][0] + 1].isspace()
        or text[offsets[count - 1][1] - 1 : offsets[count - 1][1]].isspace()
    ]
    count = (words or clean or [1])[-1]
    return count, offsets[count - 1][1]
