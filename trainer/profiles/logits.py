"""Logits processors for profiles: batch-safe, one state per row, reset by a new generation.

They look at the decoded text behind the prompt, never at the ids of an isolated string, so that
it does not matter how the tokenizer splits a marker in its context. torch tensors are only
handled, never made here, which keeps this package free of the import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

TAIL = 48
"""Tokens at the end of a row that are decoded: longer than any marker."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character that is not complete yet are decoded to."""

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
    """Behind a run of one stop: lowers all tokens but the ends, and raises those, ever more.

    One more of the same stop, while the run may still grow, starts the force anew: an answer that
    was asked to end with four must not be cut after two.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        end_ids: frozenset[int],
        *,
        run_range: Sequence[int],
        force: float,
    ) -> None:
        """Take what may end an answer.

        Args:
            stops: texts, a run of one of which says that the answer is over.
            end_ids: tokens that end an answer.
            run_range: how often the text stands in a run, at least and at most.
            force: logits of the first step behind a run.
        """
        super().__init__(tokenizer)
        self.end_ids, self.force = sorted(end_ids), force
        least, self.most = run_range
        choices = "|".join(map(re.escape, sorted(stops, key=len, reverse=True)))
        self._run = re.compile(rf"({choices})\1{{{least - 1},}}(?P<rest>.*)$", re.DOTALL)
        self.steps_since_stop: list[int] = []
        """One per row: 0 before its run, then counted up at each token."""
        self._lengths: list[int] = []

    def reset(self, num_rows: int) -> None:
        """No row has stopped."""
        self.steps_since_stop, self._lengths = [0] * num_rows, [0] * num_rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Take and return scores (B, V)."""
        tails = self.follow(input_ids)
        scores = scores.clone()
        for row, tail in enumerate(tails):
            self._count(row, tail)
            steps = self.steps_since_stop[row]
            if steps:
                scores[row] -= self.force * steps
                scores[row, self.end_ids] += 2 * self.force * steps
        return scores

    def _count(self, row: int, tail: str) -> None:
        found = self._run.search(tail)
        length = (found.end(0) - found.start(0) - len(found["rest"])) if found else 0
        runs = length // len(found[1]) if found else 0
        if self._lengths[row] < runs <= self.most:
            self.steps_since_stop[row], self._lengths[row] = 1, runs
        elif self.steps_since_stop[row] and not (
            found and found["rest"] == UNFINISHED and runs < self.most
        ):
            self.steps_since_stop[row] += 1
