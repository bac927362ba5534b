"""Rows of plain text: every token is trained, an end-of-text token stands behind, no template.

A preview needs a prompt, and such rows have none: it is the first half of the text, at most
MAX_PROMPT_CHARS of it, up to a border between two words where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.data.content import check_text
from trainer.data.example import Example, golden_ids, golden_text
from trainer.data.rows import BadRowError
from trainer.data.truncation import cut, kept_weights
from trainer.profiles import Message

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
