"""Drift: how far a model has moved on prompts that have nothing to do with what it is taught.

What the weights before training answer to the prompts of `monitoring.canary_set`, and what is
measured against that. No torch here: the publisher and the wire between machines import this
module; `measure_drift.py` does the computing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.files import replace_file

BASE_NAME = "drift_base.json"
"""In the run folder: the answers of the weights before training, kept for resume."""

ANSWER_TOKENS = 64
"""Longest base answer, in tokens."""

TOP = 64
"""Likeliest tokens whose probability is kept at each place of a base answer; all others are one."""

DIGITS = 6
"""Decimals of a kept log-probability."""

MAX_PROMPTS = 256

TEXT_CHARS = 20_000

TokenId = Annotated[int, Field(ge=0, lt=2**31)]

Logprob = Annotated[float, Field(le=1e-3, ge=-1e4, allow_inf_nan=False)]


class DriftPart(BaseModel):
    """Closed and bounded: parts of it travel between machines."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseAnswer(DriftPart):
    """What the weights before training say to one prompt, and how sure they are of each token."""

    answer_ids: Annotated[list[TokenId], Field(min_length=1, max_length=512)]
    """(T,): the greedy answer, with the token that ends it."""
    text: Annotated[str, Field(max_length=TEXT_CHARS)]
    """The same, for people."""
    top_ids: Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, max_length=256)]], Field(max_length=512)
    ]
    """(T, K): the likeliest tokens at each place, the likeliest first."""
    top_logprobs: Annotated[
        list[Annotated[list[Logprob], Field(min_length=1, max_length=256)]], Field(max_length=512)
    ]
    """(T, K): their log-probabilities, nats."""

    @model_validator(mode="after")
    def _fit_together(self) -> BaseAnswer:
        widths = {len(row) for row in self.top_ids} | {len(row) for row in self.top_logprobs}
        lengths = {len(self.answer_ids), len(self.top_ids), len(self.top_logprobs)}
        if len(lengths) != 1 or len(widths) != 1:
            raise ValueError("top_ids and top_logprobs need one row of one width per answer token")
        return self


class DriftRequest(DriftPart):
    """What a server is asked: to answer as the base, or how far its weights are from one."""

    prompts: Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, max_length=131_072)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    """Token ids, template included."""
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = ANSWER_TOKENS
    base: Annotated[list[BaseAnswer], Field(max_length=MAX_PROMPTS)] | None = None
    """Of each prompt; None: the weights that answer now are the base."""

    @model_validator(mode="after")
    def _one_answer_each(self) -> DriftRequest:
        if self.base is not None and len(self.base) != len(self.prompts):
            raise ValueError("base needs one answer for each prompt")
        return self


class Drift(DriftPart):
    """How far the weights of a step are from those before training."""

    kl: Annotated[list[float], Field(max_length=MAX_PROMPTS)] = []
    """Of each prompt: KL(base || now), the mean over the tokens of the base answer, nats."""
    is_changed: Annotated[list[bool], Field(max_length=MAX_PROMPTS)] = []
    """Of each prompt: the greedy answer is another one."""
    seconds: float = 0.0
    """What it took, where it was measured."""
    base: list[BaseAnswer] | None = None
    """The base answers, where they were just made."""
    error: str | None = None
    """Why there is nothing."""

    @property
    def mean_kl(self) -> float:
        """Over the prompts, each counting the same."""
        return statistics.fmean(self.kl)

    def is_of(self, num_prompts: int) -> bool:
        """Whether it is one that `num_prompts` prompts can have; a server may say anything."""
        return self.error is not None or (
            (len(self.kl) == len(self.is_changed) == num_prompts)
            and all(math.isfinite(one) and one >= 0 for one in self.kl)
        )


def of_base(base: Sequence[BaseAnswer]) -> Drift:
    """What the base is against itself."""
    return Drift(kl=[0.0] * len(base), is_changed=[False] * len(base))


# ---- the base answers, kept in the run folder


def save_base(path: Path, prompts: Sequence[Sequence[int]], base: Sequence[BaseAnswer]) -> None:
    """Keep them as a whole.

    Raises:
        OSError: the file cannot be written.
    """
    values = {
        "prompts": [list(one) for one in prompts],
        "base": [one.model_dump(mode="json") for one in base],
    }
    replace_file(path, json.dumps(values) + "\n")


def load_base(path: Path, prompts: Sequence[Sequence[int]]) -> list[BaseAnswer] | None:
    """What was kept for these prompts; None where nothing was, or for others."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = DriftRequest.model_validate(values)
    except (OSError, ValueError, TypeError, ValidationError):
        return None
    return found.base if found.prompts == [list(one) for one in prompts] else None
