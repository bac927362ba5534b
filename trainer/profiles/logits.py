"""Logits processors for profiles: batch-safe, one state per row, reset by a new generation.

They look at the decoded text behind the prompt, never at the ids of an isolated string, so that
it does not matter how the tokenizer splits a marker in its context. torch tensors are only
handled, never made here, which keeps this package free of the import.
"""

from __future__ import annotations

from typing import Any

TAIL = 48
"""Tokens at the end of a row that are decoded: longer than any marker."""
THINK_TAGS = ("<think>", "</think>")


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """The text of every token id, special tokens included."""
    ids = [[index] for index in range(len(tokenizer))]
    texts: list[str] = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    return texts


class RowProcessor:
    """What both processors share: where the answers begin, and their decoded ends."""

    def __init__(self, tokenizer: Any) -> None:
        """No generation was seen yet."""
        self.tokenizer = tokenizer
        self.width = 0
        """Tokens of the padded prompt."""
        self._seen: Any = None

    def follow(self, input_ids: Any) -> list[str]:
        """Notice a new generation, and return the text at the end of each row's answer."""
        seen = self._seen
        is_next = (
            seen is not None
            and seen.shape == input_ids[:, :-1].shape
            and bool((seen == input_ids[:, :-1]).all())
        )
        if not is_next:
            self.width = input_ids.shape[1]
            self.reset(input_ids.shape[0])
        self._seen = input_ids.clone()
        tail = input_ids[:, max(self.width, input_ids.shape[1] - TAIL) :].tolist()
        texts: list[str] = self.tokenizer.batch_decode(tail, clean_up_tokenization_spaces=False)
        return texts

    def reset(self, num_rows: int) -> None:
        """Forget the rows of the generation before."""


class ThinkPenalty(RowProcessor):
    """Lowers tokens that would complete a think tag; the penalty falls linearly to zero."""

    def __init__(
        self, tokenizer: Any, texts: list[str], *, penalty: float, num_tokens: int
    ) -> None:
        """Take the vocabulary's texts, the first token's penalty (logits), and its length."""
        super().__init__(tokenizer)
        self.texts, self.penalty, self.num_tokens = texts, penalty, num_tokens
        self._whole = [i for i, text in enumerate(texts) if any(tag in text for tag in THINK_TAGS)]
        self._rests: dict[str, list[int]] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Take and return scores (B, V)."""
        tails = self.follow(input_ids)
        share = 1 - (input_ids.shape[1] - self.width) / self.num_tokens
        if share <= 0:
            return scores
        scores = scores.clone()
        for row, tail in enumerate(tails):
            ids = {*self._whole, *(i for rest in _rests(tail) for i in self._completing(rest))}
            scores[row, sorted(ids)] -= self.penalty * share
        return scores

    def _completing(self, rest: str) -> list[int]:
        if rest not in self._rests:
            self._rests[rest] = [i for i, text in enumerate(self.texts) if text.startswith(rest)]
        return self._rests[rest]


def _rests(tail: str) -> list[str]:
    """What is missing of think tags that the tail has begun."""
    return [
        tag[size:] for tag in THINK_TAGS for size in range(1, len(tag)) if tail.endswith(tag[:size])
    ]


class StopPush(RowProcessor):
    """Behind a stop sequence: lowers all tokens but the ends, and raises those, ever more."""

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...], end_ids: frozenset[int], *, force: float
    ) -> None:
        """Take the stop sequences, the tokens that end an answer, and the force of one step."""
        super().__init__(tokenizer)
        self.stops, self.end_ids, self.force = stops, sorted(end_ids), force
        self.steps_since_stop: list[int] = []
        """One per row: 0 before its stop sequence, then counted up at each token."""

    def reset(self, num_rows: int) -> None:
        """No row has stopped."""
        self.steps_since_stop = [0] * num_rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Take and return scores (B, V)."""
        tails = self.follow(input_ids)
        scores = scores.clone()
        for row, tail in enumerate(tails):
            steps = self.steps_since_stop[row]
            if steps or any(stop in tail for stop in self.stops):
                steps = self.steps_since_stop[row] = steps + 1
                scores[row] -= self.force * steps
                scores[row, self.end_ids] += 2 * self.force * steps
        return scores
