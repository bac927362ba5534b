"""What a preview is: request, result (the wire format too), health, the backend protocol.

No torch here: the monitor, a server and a client in another process import this module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from trainer.data.rows import PreviewRequest as PreviewRequest

FinishReason = Literal["stop", "length", "error"]

WeightsProof = Literal["in_process", "verified", "published", "unverified"]


class ServerAnswer(BaseModel):
    """What a preview server must send for one prompt; unknown fields are left alone, as servers
    grow."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    text: str
    tokens_generated: int = 0
    tokens_per_sec: float | None = None
    generation_time_sec: float | None = None
    finish_reason: FinishReason = "stop"
    weights_id: str | None = None
    run: str | None = None
    step: int | None = None
    raw_text: str | None = None


IF_KNOWN = Field(exclude_if=lambda value: value is None)
"""Left out of files where it is not known: there is a line for each prompt and step."""


class PreviewSample(BaseModel):
    """A further answer to a prompt by the same weights; fields as in `PreviewResult`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    raw_text: str = ""
    matches: bool | None = None
    scores: dict[str, float | None] = {}
    tokens_generated: int = 0
    finish_reason: FinishReason = "stop"
    health: tuple[str, ...] = ()
    error_message: str | None = None

    @property
    def ok(self) -> bool:
        """True when there is an answer to show."""
        return self.error_message is None


class PreviewResult(BaseModel):
    """One answer, with everything needed to judge it and to trust it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    prompt: str
    text: str
    """The answer without its stop token, decoded as the golden answer is: markers of calls and
    thoughts are shown, special tokens or not. "" when there was an error."""
    raw_text: str = ""
    """The answer up to and including the stop."""
    golden_answer: str | None = None
    matches: bool | None = None
    """The profile's comparison of text with golden; None without golden or after an error."""
    tokens_generated: int = 0
    """Generated tokens, pads and everything after the stop excluded; the stop token counts."""
    generation_time_sec: float = 0.0
    """Seconds of the generate call this answer was part of (the whole batch)."""
    tokens_per_sec: float = 0.0
    finish_reason: FinishReason = "stop"
    weights_id: str | None = None
    """Identity of the weights that wrote the text; None: the backend cannot tell (unverified)."""
    weights: WeightsProof = "unverified"
    """What is known of these weights: `in_process` (the training process answered), `verified` (the
    worker names the published id, and its canary agrees), `published` (the id agrees, there was
    no canary), `unverified` (nobody can tell)."""
    backend_type: str = "local"
    prompt_id: str = ""
    held_out: bool = True
    health: tuple[str, ...] = ()
    """Flags: empty, repeats, never_stopped, template_leak, copies_prompt."""
    golden_tokens: tuple[str, ...] | None = None
    """Texts of the golden answer's tokens; with `golden_logprobs` only."""
    golden_token_ids: Annotated[tuple[int, ...] | None, IF_KNOWN] = None
    """Their ids."""
    golden_token_bytes: Annotated[tuple[str, ...] | None, IF_KNOWN] = None
    """Their UTF-8 bytes in hex: a token may hold a part of a character."""
    golden_is_frame: Annotated[tuple[bool, ...] | None, IF_KNOWN] = None
    """Whether each only frames the answer: the profile's markers or emoji, the end of the turn."""
    golden_logprobs: tuple[float, ...] | None = None
    """Nats of each golden token under these weights, given the prompt and the golden tokens
    before it; None where not asked for."""
    golden_probability: float | None = None
    """Mean probability of the golden tokens that are no frame, from 0 to 1; None where not asked
    for."""
    scores: dict[str, float | None] = {}
    """By the names of `monitoring.scores`; None: the score says nothing of this answer."""
    samples: tuple[PreviewSample, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Further answers to the same prompt, sample 1 first, where monitoring.num_preview_samples is
    above 1. Servers know nothing of them: where there are none, nothing travels."""
    received_step: int | None = None
    """The step training was at when the answer arrived: minus `step`, how far behind it is."""
    visible_s: float | None = None
    """Seconds from the end of `step` until the answer arrived."""
    is_superseded: bool = False
    """Not answered, because a newer step took its place; `error_message` says which."""
    error_message: str | None = None
    created_at: float = Field(default_factory=time.time)
    """Unix seconds."""

    @property
    def ok(self) -> bool:
        """True when there is an answer to show."""
        return self.error_message is None

    @property
    def answers(self) -> list[PreviewResult | PreviewSample]:
        """This answer and the further ones, by the number of the sample."""
        return [self, *self.samples]

    @classmethod
    def failed(
        cls, request: PreviewRequest, step: int, message: str, backend_type: str
    ) -> PreviewResult:
        """The result of a request that could not be answered."""
        return cls(
            step=step,
            prompt=request.prompt,
            text="",
            golden_answer=request.golden_answer,
            finish_reason="error",
            backend_type=backend_type,
            prompt_id=request.prompt_id,
            held_out=request.held_out,
            error_message=message,
        )


@runtime_checkable
class PreviewBackend(Protocol):
    """Anything that answers prompts with a model. Failures come back as results, not exceptions."""

    backend_type: str

    def preview(
        self,
        prompt: str,
        golden_answer: str | None,
        step: int,
        *,
        max_new_tokens: int | None = None,
    ) -> PreviewResult:
        """Answer one user turn, rendered with the system prompt."""
        ...

    def preview_batch(
        self, requests: list[PreviewRequest], step: int, *, max_new_tokens: int | None = None
    ) -> list[PreviewResult]:
        """Answer all requests as one batch of fixed composition, in their order."""
        ...

    def close(self) -> None:
        """Give back what the backend holds; may be called twice."""
        ...


def golden_figures(nats: Sequence[float], is_frame: Sequence[bool] | None = None) -> dict[str, Any]:
    """What a result says of its golden tokens' log-probabilities.

    Args:
        nats: of each token.
        is_frame: of each token: `golden_is_frame`. The mean is over the others, so that a profile
            that frames answers is comparable with one that does not; over all where there are none.
    """
    told = said_nats(nats, is_frame)
    probabilities = [math.exp(min(one, 0.0)) for one in told]
    mean = sum(probabilities) / len(probabilities) if probabilities else None
    # Files hold a number for each token of each prompt and step: no more digits than anybody reads.
    return {"golden_logprobs": tuple(round(one, 5) for one in nats), "golden_probability": mean}


def said_nats(nats: Sequence[float], is_frame: Sequence[bool] | None) -> list[float]:
    """The log-probabilities of what a golden answer says, without its frame."""
    if is_frame is None or len(is_frame) != len(nats) or all(is_frame):
        return list(nats)
    return [one for one, framed in zip(nats, is_frame, strict=True) if not framed]


def is_match(
    request: PreviewRequest, text: str, compare: Callable[[str, str], bool] | None
) -> bool | None:
    """Whether an answer says what the golden answer says; None without golden or comparison.

    Nothing says what a blank golden answer says. Where the golden answer is what was trained, its
    repetition is right whatever the comparison looks for: a profile that compares what stands
    between two markers would else refuse a perfect call.
    """
    golden = request.golden_answer
    if golden is None or compare is None:
        return None
    if not golden.strip():
        return False
    if request.golden_token_ids is not None and text.split() == golden.split():
        return True
    return bool(compare(text, golden))


def to_json_line(result: PreviewResult) -> dict[str, Any]:
    """The result as plain JSON values, one object per line of previews.jsonl."""
    return result.model_dump(mode="json")


# ---- text-health flags: what is visibly wrong with an answer, golden or not


REPEATS_MIN_TOKENS = 24
"""Shorter answers are not called repetitive."""

REPEATS_SHARE = 0.5
"""An answer repeats itself when at most this share of its 4-token windows are different ones."""

COPY_MIN_CHARS = 24


def health_flags(
    *,
    text: str,
    token_ids: list[int],
    prompt: str,
    golden: str | None,
    is_stopped: bool,
    leak_ids: Collection[int],
) -> tuple[str, ...]:
    """Name what is wrong with an answer.

    Args:
        text: the answer without special tokens.
        token_ids: its tokens, the stop token excluded.
        golden: the golden answer; what it does as well is no fault.
        is_stopped: the answer ended by itself.
        leak_ids: control tokens that belong to the template, not to an answer.
    Returns:
        Some of empty, repeats, never_stopped, template_leak, copies_prompt.
    """
    copied = prompt.strip()
    flags = {
        "empty": not text.strip(),
        "repeats": _repeats(token_ids),
        "never_stopped": not is_stopped,
        "template_leak": any(token in leak_ids for token in token_ids),
        "copies_prompt": len(copied) >= COPY_MIN_CHARS
        and copied in text
        and copied not in (golden or ""),
    }
    return tuple(name for name, is_set in flags.items() if is_set)


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Control tokens of a tokenizer: id -> text."""
    ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {
        index: str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
        for index in ids | set(tokenizer.all_special_ids)
    }


def leak_ids(special: Mapping[int, str], goldens: Iterable[str | None]) -> frozenset[int]:
    """Control tokens that belong to no answer: those of golden answers, such as the markers of a
    call, do."""
    texts = "\n".join(golden or "" for golden in goldens)
    return frozenset(index for index, text in special.items() if text not in texts)


def _repeats(token_ids: list[int]) -> bool:
    if len(token_ids) < REPEATS_MIN_TOKENS:
        return False
    windows = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    return len(set(windows)) <= REPEATS_SHARE * len(windows)
