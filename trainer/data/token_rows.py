"""Rows that are tokens already: `input_ids`, maybe with `labels` or masks, trained as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from trainer.data.rows import (
    IGNORE_INDEX,
    TOKENS_ROLE,
    BadRowError,
    Example,
    cut,
    decoded,
    kept_weights,
)
from trainer.data.turn_flags import apply_row_flags, is_given
from trainer.profiles import Message

TOKEN_MASKS = ("assistant_masks", "assistant_mask", "completion_mask", "loss_mask")
"""Lists of 1 for each token that is trained and 0 for each other one."""

TOKEN_KEYS = frozenset({"labels", "attention_mask", "position_ids", "seq_lengths", *TOKEN_MASKS})

MAX_PROMPT_TOKENS = 100
"""Of a row of which every token is trained."""

WRONG = "wrong labels or masks"


def turns_of_tokens(row: Mapping[str, Any]) -> list[Message]:
    """The only turn of such a row: ids and labels without padding.

    Raises:
        BadRowError: they are not what they must be, or the row says what cannot be done to tokens.
    """
    for key in ("system", "tools"):
        if is_given(row.get(key)):
            raise BadRowError(
                f"row has {key!r} beside 'input_ids', which are trained as they are; put it into "
                "the text before it is tokenized, or set data.format to read the row as turns",
                "system or tools beside tokens",
            )
    ids = _ints(row, "input_ids")
    if not ids:
        raise BadRowError("'input_ids' is empty, so nothing to train", "empty text")
    begin, end = _unpadded(row, len(ids))
    _refuse_packed(row, begin, end)
    labels = _labels(row, ids)[begin:end]
    turn = Message(role=TOKENS_ROLE, content="", input_ids=ids[begin:end], labels=labels)
    flags = {key: value for key, value in row.items() if not _is_token_mask(key, value)}
    apply_row_flags(flags, [turn])
    if turn.get("weight", 1.0) == 0 or labels.count(IGNORE_INDEX) == len(labels):
        raise BadRowError("the row's labels or flags leave nothing to train", "nothing to train")
    return [turn]


def _ints(row: Mapping[str, Any], key: str) -> list[int]:
    values = row[key]
    # A bool is an int.
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise BadRowError(f"{key!r} must be a list of whole numbers", WRONG)
    return values


def _like_ids(row: Mapping[str, Any], key: str, count: int) -> list[int] | None:
    """A list that has one number for each id; None where the row has none."""
    if not is_given(row.get(key)):
        return None
    values = [int(value) if type(value) is bool else value for value in _list(row, key)]
    if len(values) != count:
        raise BadRowError(
            f"{key!r} has {len(values)} numbers, 'input_ids' has {count}; there must be one for "
            "each",
            WRONG,
        )
    return _ints({key: values}, key)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise BadRowError(f"{key!r} must be a list of whole numbers", WRONG)
    found: list[Any] = row[key]
    return found


def _ones(row: Mapping[str, Any], key: str, count: int) -> list[int] | None:
    values = _like_ids(row, key, count)
    if values is not None and set(values) - {0, 1}:
        raise BadRowError(f"{key!r} must have 1 and 0 only", WRONG)
    return values


def _unpadded(row: Mapping[str, Any], count: int) -> tuple[int, int]:
    """Where the tokens begin and end that are no padding."""
    mask = _ones(row, "attention_mask", count)
    if mask is None:
        return 0, count
    if 1 not in mask:
        raise BadRowError("'attention_mask' has no 1, so nothing to train", "empty text")
    begin, end = mask.index(1), count - mask[::-1].index(1)
    if 0 in mask[begin:end]:
        raise BadRowError(
            "'attention_mask' has a 0 between two 1s: only padding at the ends can be left out",
            WRONG,
        )
    return begin, end


def _refuse_packed(row: Mapping[str, Any], begin: int, end: int) -> None:
    """Several texts in one row would see each other."""
    is_restarted = is_given(row.get("position_ids")) and (
        _list(row, "position_ids")[begin:end] != list(range(end - begin))
    )
    is_several = is_given(row.get("seq_lengths")) and len(_list(row, "seq_lengths")) > 1
    if is_restarted or is_several:
        key = "position_ids" if is_restarted else "seq_lengths"
        raise BadRowError(
            f"{key!r} says that several texts are packed into this row, and they would see each "
            "other; give one text a row and set data.enable_packing=true",
            "packed row",
        )


def _is_token_mask(key: str, value: Any) -> bool:
    return key in TOKEN_MASKS and isinstance(value, list)


def _labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    """One for each id: the id itself, or IGNORE_INDEX where nothing is trained."""
    labels = _like_ids(row, "labels", len(ids))
    if labels is not None:
        _check_labels(ids, labels)
    labels = list(labels or ids)
    for key in TOKEN_MASKS:
        if _is_token_mask(key, row.get(key)):
            mask = _ones(row, key, len(ids)) or []
            labels = [
                label if is_trained else IGNORE_INDEX
                for label, is_trained in zip(labels, mask, strict=True)
            ]
    return labels


def _check_labels(ids: list[int], labels: list[int]) -> None:
    pairs = zip(ids, labels, strict=True)
    wrong = [
        place for place, (token, label) in enumerate(pairs) if label not in (token, IGNORE_INDEX)
    ]
    if not wrong:
        return
    place = wrong[0]
    shifted = zip(ids[1:], labels, strict=False)
    is_shifted = all(label in (token, IGNORE_INDEX) for token, label in shifted)
    why = "they seem to be shifted by one, which the loss does itself; " if is_shifted else ""
    raise BadRowError(
        f"labels[{place}] is {labels[place]}, input_ids[{place}] is {ids[place]}: {why}a label is "
        f"the token of its own place, or {IGNORE_INDEX} where nothing is trained",
        WRONG,
    )


class TokenEncoder:
    """Turns such rows into examples for one tokenizer and one length."""

    def __init__(self, tokenizer: Any, max_length: int, truncation: str) -> None:
        """The arguments are those of `RowEncoder`."""
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self._num_ids: int | None = None

    def encode(
        self, turn: Message, say: Callable[[list[int]], str], end_ids: Collection[int]
    ) -> Example | BadRowError:
        """One row; what cannot be used comes back as its error.

        Args:
            turn: as `turns_of_tokens` gives it.
            say: as `Example.say`.
            end_ids: tokens that end an answer.
        """
        try:
            return self._example(turn, say, end_ids)
        except BadRowError as error:
            return error

    def _example(
        self, turn: Message, say: Callable[[list[int]], str], end_ids: Collection[int]
    ) -> Example:
        ids, labels = turn["input_ids"], list(turn["labels"])
        self._check_ids(ids, labels, end_ids)
        is_text = IGNORE_INDEX not in labels[1:]
        if self.truncation == "split" and is_text and len(ids) > self.max_length:
            first, *rest = self._windows(turn, ids, say)
            return replace(first, rest=tuple(rest))
        kept_ids, kept_labels = cut(ids, labels, self.max_length, self.truncation)
        removed = len(ids) - len(kept_ids)
        last = max(place for place, label in enumerate(kept_labels) if label != IGNORE_INDEX)
        is_cut = removed > 0 and self.truncation != "keep_end"
        return replace(
            self._made(turn, kept_ids, kept_labels, say),
            is_truncated=removed > 0,
            ends_with_stop=kept_ids[last] in end_ids or is_cut,
            num_removed=removed,
        )

    def _windows(
        self, turn: Message, ids: list[int], say: Callable[[list[int]], str]
    ) -> list[Example]:
        """As those of a plain text: each token but the first one is a label once."""
        size = self.max_length
        parts = [ids[begin : begin + size] for begin in range(0, len(ids) - 1, size - 1)]
        return [self._made(turn, part, [IGNORE_INDEX, *part[1:]], say) for part in parts]

    def _made(
        self, turn: Message, ids: list[int], labels: list[int], say: Callable[[list[int]], str]
    ) -> Example:
        weights = [turn["weight"]] * len(ids) if "weight" in turn else None
        length = self._prompt_length(ids, labels)
        return Example(
            input_ids=ids,
            labels=labels,
            prompt=decoded(self.tokenizer, ids[:length]),
            say=say,
            prompt_length=length,
            is_truncated=False,
            ends_with_stop=True,
            weights=kept_weights(weights, labels),
        )

    def _check_ids(self, ids: list[int], labels: list[int], end_ids: Collection[int]) -> None:
        if self._num_ids is None:
            self._num_ids = max(self.tokenizer.get_vocab().values()) + 1
        if min(ids) < 0 or max(ids) >= self._num_ids:
            place = next(n for n, i in enumerate(ids) if not 0 <= i < self._num_ids)
            raise BadRowError(
                f"input_ids[{place}] is {ids[place]}, and the model's tokenizer has the ids 0 to "
                f"{self._num_ids - 1}: the row was made with another tokenizer",
                "id out of the vocabulary",
            )
        pad = self.tokenizer.pad_token_id
        if len(ids) > 1 and pad is not None and pad not in end_ids and labels[-1] == pad:
            raise BadRowError(
                f"the row ends with the padding token (id {pad}), which would be trained; give "
                "'attention_mask', or labels of -100 there",
                "trained padding",
            )

    def _prompt_length(self, ids: list[int], labels: list[int]) -> int:
        """Tokens before the first trained one; where that is all but the first, half of the row."""
        length = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        if length > 1 or IGNORE_INDEX in labels[1:]:
            return length
        length = max(min(len(ids) // 2, MAX_PROMPT_TOKENS), 1)
        # Bytes of one character can be several tokens: no border there.
        while length > 1 and decoded(self.tokenizer, ids[:length]).endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):
            length -= 1
        return length
