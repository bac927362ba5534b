"""Rows of plain text -> examples: every token is trained, an end-of-text token stands behind.

A preview needs a prompt, and such rows have none: it is the first half of the text, at most
MAX_PROMPT_CHARS of it, up to a border between two words where there is one.

With `data.truncation=split` a text that is longer than max_length becomes several examples: windows
that overlap by one token, which is trained at the end of the one and read at the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from trainer.data.rows import (
    IGNORE_INDEX,
    MARKED_ROLE,
    BadRowError,
    Example,
    cut,
    golden_text,
    kept_weights,
)
from trainer.profiles import Message

MAX_PROMPT_CHARS = 300


class TextEncoder:
    """Turns texts into examples with one tokenizer and one length."""

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: str, end_ids: Collection[int]
    ) -> None:
        """The arguments are those of `RowEncoder`, and the tokens that end an answer."""
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.end_ids = frozenset({*end_ids, tokenizer.eos_token_id} - {None})

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
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text brings its own
            ids, offsets = ids[1:], offsets[1:]
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        if self.truncation == "split" and len(ids) > self.max_length:
            first, *rest = self._windows(turn, ids, offsets)
            return replace(first, rest=tuple(rest))
        kept_ids, kept_labels = cut(ids, list(ids), self.max_length, self.truncation)
        removed = len(ids) - len(kept_ids)
        shown = offsets[removed:] if self.truncation == "keep_end" else offsets
        begin = shown[0][0] if removed and self.truncation == "keep_end" else 0
        return replace(
            self._made(turn, kept_ids, kept_labels, shown, begin),
            is_truncated=removed > 0,
            ends_with_stop=kept_ids[-1] == eos or removed > 0,
            num_removed=removed,
        )

    def _windows(
        self, turn: Message, ids: list[int], offsets: list[tuple[int, int]]
    ) -> list[Example]:
        """Examples of at most max_length tokens; each token but the first one is a label once."""
        windows = []
        for begin in range(0, len(ids) - 1, self.max_length - 1):
            part = ids[begin : begin + self.max_length]
            labels = [IGNORE_INDEX, *part[1:]]
            first = offsets[begin][0] if begin else 0
            windows.append(self._made(turn, part, labels, offsets[begin:], first))
        return windows

    def _made(
        self,
        turn: Message,
        ids: list[int],
        labels: list[int],
        offsets: list[tuple[int, int]],
        begin: int,
    ) -> Example:
        """The example of some consecutive tokens of a text.

        Args:
            offsets: of the tokens from the first one on.
            begin: the character that they begin with.
        """
        length, border = prompt_border(turn["content"], offsets[: len(ids) - 1])
        return Example(
            input_ids=ids,
            labels=labels,
            prompt=turn["content"][begin:border],
            say=self.say,
            prompt_length=length,
            is_truncated=False,
            ends_with_stop=True,
            weights=kept_weights([turn.get("weight", 1.0)] * len(ids), labels),
        )

    def say(self, ids: list[int]) -> str:
        """The text of an answer's ids, without what ends it."""
        return golden_text(self.tokenizer, ids, self.end_ids)


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
