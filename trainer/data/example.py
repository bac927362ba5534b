"""One encoded row, whatever it was made from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from trainer.data.truncation import IGNORE_INDEX


@dataclass(frozen=True)
class Example:
    """One encoded row."""

    input_ids: list[int]
    labels: list[int]
    """As long as input_ids; IGNORE_INDEX where nothing is trained."""
    prompt: str
    """The turn that the first assistant turn (with keep_end: the first one kept) answers."""
    golden_answer: str
    """That assistant turn."""
    prompt_length: int
    """Tokens before that assistant turn."""
    is_truncated: bool
    ends_with_stop: bool
    """Every trained turn that was not cut off ends with its stop token."""
    num_removed: int = 0
    """Tokens that were cut off."""
    stripped: tuple[str, ...] = ()
    """Text of the row's turns that the chat template leaves out."""
    num_thoughts: int = 0
    """Turns whose thought stands in the tokens."""
    is_opened: bool = False
    """The chat template's prompt opens a thought that the row does not have."""
    weights: list[float] | None = None
    """How much each token of `labels` counts in the loss, as long as input_ids; None: each trained
    token counts 1. A token with label IGNORE_INDEX has weight 0, every other one more than 0."""

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the first answer: what a preview continues."""
        return self.input_ids[: self.prompt_length]

    @property
    def golden_ids(self) -> list[int]:
        """The trained ids of the first answer, its stop token included."""
        labels = self.labels[self.prompt_length :]
        return list(itertools.takewhile(lambda label: label != IGNORE_INDEX, labels))
