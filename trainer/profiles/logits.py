"""Batch-safe logits processors: state per row, reset when a new generation begins.

A processor sees only what was generated, never the prompt, and looks at text, not at token ids:
a tokenizer may split the same characters differently in different company.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

TAIL_TOKENS = 32
"""Generated tokens that are decoded at each step: more than any sequence looked for."""
THINK_PUSH = (10.0, 2.0, 64)
"""Logits that `<think>` loses: at the first token, after the last of the schedule, its length."""
STOP_FORCE = 4.0
"""Logits that everything but the end loses per token written since the stop sequence."""
STOP_REWARD = 2.0
"""Logits that the end gains per token written since the stop sequence."""
MAX_FORCE = 40.0
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character that is not complete yet are decoded to."""


class TailProcessor(LogitsProcessor):  # type: ignore[misc]
    """Knows the generated text of each row, and when a new generation begins."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer that decodes; nothing of it is changed."""
        self.tokenizer = tokenizer
        self._prompt_width = 0
        self._seen: tuple[int, int] | None = None

    def tails(self, input_ids: torch.Tensor) -> list[str]:
        """The last generated text of each row of input_ids (B, T); calls `reset` at a start."""
        rows, width = input_ids.shape
        if self._seen != (rows, width - 1):
            self._prompt_width = width
            self.reset(rows)
        self._seen = (rows, width)
        start = max(self._prompt_width, width - TAIL_TOKENS)
        texts: list[str] = self.tokenizer.batch_decode(
            input_ids[:, start:].tolist(), clean_up_tokenization_spaces=False
        )
        return texts

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, the same for all rows."""
        return self._seen[1] - self._prompt_width if self._seen else 0

    def reset(self, rows: int) -> None:
        """Forget all rows; subclasses with state override it."""


class SuppressThinkTags(TailProcessor):
    """Pushes down whatever would write `<think>` or `</think>`, less and less."""

    def __init__(self, tokenizer: Any) -> None:
        """Find the tokens that are a tag, and those that would close one."""
        super().__init__(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._tags = [vocabulary[tag] for tag in ("<think>", "</think>") if tag in vocabulary]
        self._closing = [index for token, index in vocabulary.items() if token.startswith(">")]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take scores (B, V), return scores (B, V)."""
        tails = self.tails(input_ids)
        first, last, length = THINK_PUSH
        push = max(last, first - (first - last) * self.num_generated / length)
        scores = scores.clone()
        scores[:, self._tags] -= push
        for row, tail in enumerate(tails):
            if tail.endswith(("<think", "</think")):
                scores[row, self._closing] -= push
        return scores


class StopAfterSequence(TailProcessor):
    """Ends a row soon after `least` to `most` of one stop string were written.

    Once a run is written, everything but end-of-text loses logits, more with every further token;
    one more of the same string, up to `most`, starts that anew.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: Sequence[str],
        *,
        least: int,
        most: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Take the strings of which a run ends an answer, and the tokens that end it."""
        super().__init__(tokenizer)
        self.most = most
        choices = "|".join(map(re.escape, stop_strings))
        self._run = re.compile(rf"({choices})\1{{{least - 1},}}$")
        self._ends = sorted(stop_ids or {tokenizer.eos_token_id} - {None})
        self._levels: list[int] = []
        self._counts: list[int] = []

    def reset(self, rows: int) -> None:
        """No row has written a run."""
        self._levels, self._counts = [0] * rows, [0] * rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take scores (B, V), return scores (B, V)."""
        scores = scores.clone()
        for row, tail in enumerate(self.tails(input_ids)):
            self._update(row, tail)
            level = self._levels[row]
            if level:
                ends = scores[row, self._ends] + min(STOP_REWARD * level, MAX_FORCE)
                scores[row] -= min(STOP_FORCE * level, MAX_FORCE)
                scores[row, self._ends] = ends
        return scores

    def _update(self, row: int, tail: str) -> None:
        """Tokens since the row's run was last made longer; 0 before there is one."""
        found = self._run.search(tail)
        count = len(found[0]) // len(found[1]) if found else 0
        if self._counts[row] < count <= self.most:
            self._levels[row], self._counts[row] = 1, count
        elif self._levels[row] and not self._is_unfinished(tail):
            self._levels[row] += 1

    def _is_unfinished(self, tail: str) -> bool:
        """Whether the next character of a run is under way: its first bytes are written."""
        body = tail.removesuffix(UNFINISHED)
        return body != tail and self._run.search(body) is not None
