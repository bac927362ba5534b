"""A row of a file as messages, what of it is trained, what is cut off, and why a row is bad."""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer.counts import counted
from trainer.errors import DataError
from trainer.profiles import Message

MAX_ERRORS_SHOWN = 20


@dataclass
class RowNotes:
    """What is to be said about a row that is used; the data card sums it up."""

    unused: dict[str, int] = field(default_factory=dict)
    """Key that nothing was done with -> how often it stands in the row."""
    num_as_text: int = 0
    """Numbers and booleans that were taken as their JSON text."""

    def note_unused(self, key: str) -> None:
        """Count one key that nothing is done with."""
        self.unused[key] = self.unused.get(key, 0) + 1


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str
    """`file:line` for text files, `file[index]` for arrays and tables."""
    index: int
    """Position among all rows of the run's files from 0, bad rows counted."""
    messages: list[Message]
    source: int = 0
    """Which of the run's files it is from."""
    notes: RowNotes = field(default_factory=RowNotes)
    is_rendered: bool = False
    """It was text with the chat template's markers, and was read back into these turns."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All that the file says of it, by the file's own names; kept for scores only."""


TEXT_ROLE = "text"
"""Role of the only turn of such a row; no turn of a conversation can have it."""

MARKED_ROLE = "text with markers"
"""The same where control tokens in the text are meant (`data.text_markers=tokens`)."""


TOKENS_ROLE = "tokens"
"""Role of the only turn of a row whose tokens are given."""


def is_tokens(messages: list[Message]) -> bool:
    """Whether a row is tokens, which are trained as they are."""
    return bool(messages) and messages[0]["role"] == TOKENS_ROLE


def is_text(messages: list[Message]) -> bool:
    """Whether a row is plain text and no conversation."""
    return bool(messages) and messages[0]["role"] in (TEXT_ROLE, MARKED_ROLE)


TOO_LONG = ("longer than max_length", "no trained token within max_length")
"""Reasons of rows that are right, but longer than hyperparams.max_length."""


@dataclass
class _Reason:
    """Bad rows of one kind."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class RowErrors:
    """Rows that could not be used, and why: all are counted, and the first are kept."""

    policy: str
    """`strict` or `skip` (data.on_bad_row)."""
    max_bad_rows: int | None = None
    """More bad rows than this stop the run under `skip` too."""
    errors: list[str] = field(default_factory=list)
    """The first MAX_ERRORS_SHOWN."""
    by_reason: dict[str, _Reason] = field(default_factory=dict)
    """By the short name of what is wrong."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows each reason has."""
        return {reason: found.count for reason, found in self.by_reason.items()}

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.reasons.values())

    @property
    def num_bad(self) -> int:
        """Rows that are wrong; one that is only too long is none of them."""
        return sum(n for reason, n in self.reasons.items() if reason not in TOO_LONG)

    def add(self, where: str, message: str, reason: str) -> None:
        """Note one bad row."""
        self._add(reason, 1, [f"{where}: {message}"])
        self.errors = [*self.errors, f"{where}: {message}"][:MAX_ERRORS_SHOWN]

    def add_all(self, others: Iterable[RowErrors]) -> None:
        """Note what others have noted, one after the other."""
        for other in others:
            for reason, found in other.by_reason.items():
                self._add(reason, found.count, found.first)
            self.errors = [*self.errors, *other.errors][:MAX_ERRORS_SHOWN]

    def add_known(self, reason: str, count: int) -> None:
        """Count bad rows that were told before."""
        self._add(reason, count, [])

    def _add(self, reason: str, count: int, first: list[str]) -> None:
        found = self.by_reason.setdefault(reason, _Reason())
        found.count += count
        found.first += first[: MAX_ERRORS_SHOWN - len(found.first)]

    def raise_if_strict(self) -> None:
        """Stop with the first 20 errors when the policy says so.

        Raises:
            DataError: there is a bad row and the policy is strict, or there are more than
                `max_bad_rows`.
        """
        if self.policy == "strict":
            if self.count:
                num_long = self.count - self.num_bad
                kinds = [counted(self.num_bad, "bad row")] if self.num_bad else []
                kinds += [f"{counted(num_long, 'row')} too long for training"] if num_long else []
                advice = []
                if num_long:
                    advice.append(
                        "Raise hyperparams.max_length, or set data.truncation=drop to leave out "
                        "what is longer."
                    )
                if self.num_bad:
                    advice.append(
                        "Fix bad rows, or set data.on_bad_row=skip to leave them out and count "
                        "them."
                    )
                raise DataError(f"{' and '.join(kinds)}:{self._shown()}\n{' '.join(advice)}")
        elif self.max_bad_rows is not None and self.num_bad > self.max_bad_rows:
            raise DataError(
                f"{counted(self.num_bad, 'bad row')}, data.max_bad_rows={self.max_bad_rows}:"
                f"{self._shown()}\nFix them, or raise data.max_bad_rows."
            )

    def _shown(self) -> str:
        """Rows of one reason together, each reason with its share of the lines."""
        shown = ""
        most = max(MAX_ERRORS_SHOWN // max(len(self.by_reason), 1), 1)
        for reason, found in self.by_reason.items():
            is_group = found.count > 1
            shown += f"\n  {counted(found.count, 'row')}: {reason}" if is_group else ""
            indent = "    " if is_group else "  "
            shown += "".join(f"\n{indent}{error}" for error in found.first[:most])
            more = found.count - min(most, len(found.first))
            shown += f"\n{indent}... and {more} more" if more > 0 else ""
        return shown


@dataclass
class Dropped:
    """Rows that data.truncation=drop left out."""

    num_rows: int = 0
    num_tokens: int = 0


class BadRowError(ValueError):
    """One row is wrong; `reason` is the short name under which it is counted."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


# ---- what becomes of a row that is longer than hyperparams.max_length (data.truncation)


IGNORE_INDEX = -100


class RowTooLongError(BadRowError):
    """A row is left out because data.truncation=drop says so; counted, never an error."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{counted(num_tokens, 'token')}, dropped", "longer than max_length")
        self.num_tokens = num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_tokens,)


def cut(
    ids: list[int], labels: list[int], max_length: int, how: str
) -> tuple[list[int], list[int]]:
    """Shorten one row to `max_length` tokens.

    Args:
        how: `keep_start`, `keep_end`, `drop` or `error`; `split` is an error too, as it is
            of plain text alone, which is cut elsewhere.
    Returns:
        ids and labels, both at most `max_length` long, with at least one trained token.
    Raises:
        RowTooLongError: the row is too long and is to be dropped.
        BadRowError: it is too long and that is an error, or nothing to train is left.
    """
    if len(ids) > max_length:
        if how == "drop":
            raise RowTooLongError(len(ids))
        if how == "split":
            raise BadRowError(
                f"the conversation has {counted(len(ids), 'token')} and hyperparams.max_length is "
                f"{max_length}; data.truncation=split cuts plain text only, as the part of a "
                "conversation is none: raise max_length, or let data.truncation be drop, "
                "keep_start or keep_end",
                "longer than max_length",
            )
        if how == "error":
            raise BadRowError(
                f"the row has {counted(len(ids), 'token')} and hyperparams.max_length is "
                f"{max_length}; raise "
                "it, or let data.truncation drop or cut such rows",
                "longer than max_length",
            )
    begin = max(len(ids) - max_length, 0) if how == "keep_end" else 0
    kept = labels[begin : begin + max_length]
    # NOTE: no token stands before the first one, so it cannot be predicted.
    kept[0] = IGNORE_INDEX
    if kept.count(IGNORE_INDEX) == len(kept):
        first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        raise BadRowError(
            f"nothing to train is left: the row has {counted(len(ids), 'token')}, its answer "
            f"begins at token {first + 1}, and hyperparams.max_length is {max_length}",
            "no trained token within max_length",
        )
    return ids[begin : begin + max_length], kept


def kept_weights(weights: list[float] | None, labels: list[int]) -> list[float] | None:
    """The loss weights of kept labels: 0 where nothing is trained; None where all are 1.

    Args:
        weights: of the tokens from the first kept one on; None where all are 1.
        labels: what `cut` kept.
    """
    if weights is None:
        return None
    pairs = zip(labels, weights[: len(labels)], strict=True)
    kept = [0.0 if label == IGNORE_INDEX else weight for label, weight in pairs]
    is_plain = all(
        weight == (label != IGNORE_INDEX) for label, weight in zip(labels, kept, strict=True)
    )
    return None if is_plain else kept


# ---- one encoded row, whatever it was made from


@dataclass(frozen=True)
class Example:
    """One encoded row."""

    input_ids: MutableSequence[int]
    labels: MutableSequence[int]
    """As long as input_ids; IGNORE_INDEX where nothing is trained."""
    prompt: str
    """The turn that the first assistant turn (with keep_end: the first one kept) answers."""
    say: Callable[[list[int]], str] = field(repr=False, compare=False)
    """The text of the ids of an answer, without the stop token."""
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
    conversation: tuple[Message, ...] = ()
    """The turns before that assistant turn, as they are rendered; empty for plain text."""
    weights: list[float] | None = None
    """How much each token of `labels` counts in the loss, as long as input_ids; None: each trained
    token counts 1. A token with label IGNORE_INDEX has weight 0, every other one more than 0."""

    rest: tuple[Example, ...] = ()
    """The further windows of a plain text that data.truncation=split cuts."""

    is_by_shape: bool = True
    """Its turns were located by what rows of its shape have in common, not by marks of its own."""

    @property
    def golden_answer(self) -> str:
        """The text of `golden_ids` less the stop token, as a preview that says the same has it."""
        return self.say(self.golden_ids)

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is taken over."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the first answer: what a preview continues."""
        return list(self.input_ids[: self.prompt_length])

    @property
    def golden_ids(self) -> list[int]:
        """The trained ids of the first answer, its stop token included."""
        return golden_ids(self.labels, self.prompt_length)


def golden_ids(labels: Sequence[int], prompt_length: int) -> list[int]:
    """The trained ids of the answer behind a prompt."""
    behind = list(labels[prompt_length:])
    return behind[: behind.index(IGNORE_INDEX)] if IGNORE_INDEX in behind else behind


def golden_text(tokenizer: Any, ids: list[int], stop_ids: Collection[int]) -> str:
    """What an answer of these ids reads like, without the stop token at its end.

    Previews decode what is generated by the same two rules: no stop token, and every other token is
    shown, as the markers of calls and thoughts are special tokens in many families.
    """
    shown = ids[:-1] if ids and ids[-1] in stop_ids else ids
    return decoded(tokenizer, shown)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids, special tokens too."""
    if is_usual(tokenizer, "decode", "_decode"):  # less a look at the type of every id
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    else:
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def is_usual(tokenizer: Any, *methods: str) -> bool:
    """Whether a tokenizer's class leaves methods as transformers' own has them."""
    kind: Any = type(tokenizer)
    return _is_usual(kind, methods)


@cache
def _is_usual(kind: Hashable, methods: tuple[str, ...]) -> bool:
    from transformers import PreTrainedTokenizerFast

    return all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in methods)


# ---- a prompt to be answered again and again, made of a row or of the user's words


class PreviewRequest(BaseModel):
    """One prompt to be answered: text and, where known, the exact token ids of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    """The user's turn as text, for people."""
    prompt_token_ids: tuple[int, ...] | None = None
    """Ids to continue, system prompt and template included: of a row, the prefix of its own ids up
    to its first trained token. None: the backend renders `prompt`."""
    golden_answer: str | None = None
    """What the data says the answer is; None for prompts without one."""
    golden_token_ids: tuple[int, ...] | None = None
    """The answer's ids as trained on, behind `prompt_token_ids`; needed for its
    log-probabilities."""
    messages: tuple[dict[str, Any], ...] = ()
    """The whole conversation that is answered, with the tools on one of its turns, for backends
    that cannot take ids; empty: `prompt` is all there is."""
    prompt_id: str = ""
    """Names the prompt over all steps of a run, such as `validation-3` or `user-0`."""
    held_out: bool = True
    """False when the prompt is also trained on, with this answer or another one."""
    sample: int = 0
    """Which of several answers to this prompt is wanted: each has noise of its own."""
    row: dict[str, Any] = {}
    """The columns of its row by the file's own names, as JSON values; where scores want them."""
