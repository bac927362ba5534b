"""Which turns are trained, and how much: the flags of rows and turns.

A turn that says nothing is trained with weight 1. Flags are true or false, or a number from 0 to 1
(weights also above); texts of these count too (a CSV has nothing else), null and empty values say
nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from trainer.counts import counted
from trainer.data.rows import BadRowError
from trainer.profiles import Message

AMOUNT_KEYS = frozenset({"weight", "weights", "loss_weights"})
"""Flags whose 1 is an amount; in the other ones 1 means "trained"."""

TURN_FLAGS = frozenset({"train", "trainable", "training", "loss", "loss_mask", "weight"})

ROW_FLAGS = TURN_FLAGS | {"weights", "loss_weights", "train_mask"}
"""A list speaks of the turns one by one, a single value of all of them."""

FLAG_BEGINNINGS = ("train", "loss", "mask")
"""Keys that begin so and are no flags we know say something about training that we would miss."""


def is_given(value: Any) -> bool:
    """Whether a key says anything; tables write null and empty values for "not there"."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def speaks_of_training(key: str) -> bool:
    """Whether an unknown key says what is trained."""
    return key.lower().startswith(FLAG_BEGINNINGS)


def turn_weight(turn: Mapping[str, Any], role: str, where: str) -> float | None:
    """The weight that a turn's own flags give it; None where they say nothing.

    Raises:
        BadRowError: a flag is none, two of them disagree, or they ask to train a turn that is not
            the assistant's.
    """
    weight = _agreed({key: turn[key] for key in TURN_FLAGS if is_given(turn.get(key))}, where)
    if role == "assistant":
        return weight
    if weight:
        raise _not_ours(f"{where} ({role})")
    return None


def apply_row_flags(row: Mapping[str, Any], messages: list[Message]) -> None:
    """Set the weights that the row's own flags give its turns.

    Args:
        row: under a format's own keys.
        messages: the turns that the row lists, in its order; changed in place.
    Raises:
        BadRowError: a flag is none, disagrees with another, has the wrong length, or asks to
            train a turn that is not the assistant's.
    """
    if ROW_FLAGS.isdisjoint(row):
        return
    given = {key: _unwrapped(row[key]) for key in sorted(ROW_FLAGS) if is_given(row.get(key))}
    for key, value in given.items():
        if isinstance(value, list):
            _apply_list(key, value, messages)
    factor = _agreed({k: v for k, v in given.items() if not isinstance(v, list)}, "row")
    if factor is None:
        return
    for turn in messages:
        if is_trainable(turn):
            turn["weight"] = turn.get("weight", 1.0) * factor


def is_trainable(turn: Message) -> bool:
    """Whether a turn is of a kind that is trained: an answer, or plain text."""
    return turn["role"] not in ("system", "user", "tool")


def settle(messages: list[Message]) -> list[Message]:
    """Leave weights only where they say something: on answers, and other than 1."""
    for turn in messages:
        if turn.get("weight", 0.0) == 1 or not is_trainable(turn):
            turn.pop("weight", None)
    return messages


def _apply_list(key: str, values: list[Any], messages: list[Message]) -> None:
    answers = [turn for turn in messages if is_trainable(turn)]
    if len(values) not in (len(messages), len(answers)):
        raise BadRowError(
            f"{key!r} has {counted(len(values), 'value')}; it must have one for each of the "
            f"{len(messages)} "
            f"turns, or one for each of the {len(answers)} assistant turns",
            f"{key} of wrong length",
        )
    turns = messages if len(values) == len(messages) else answers
    for position, (turn, value) in enumerate(zip(turns, values, strict=True)):
        where = f"{key}[{position}]"
        weight = _agreed({key: value}, where) if is_given(value) else None
        if weight is None:
            continue
        if not is_trainable(turn):
            if weight:
                raise _not_ours(f"{where} ({turn['role']})")
            continue
        if turn.get("weight", weight) != weight:
            raise BadRowError(
                f"{where} is {weight:g}, but that turn says {turn['weight']:g}; let them agree",
                "flags disagree",
            )
        turn["weight"] = weight


def _unwrapped(value: Any) -> Any:
    """A list that a table holds as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _agreed(flags: Mapping[str, Any], where: str) -> float | None:
    """What several flags of one turn say together: amounts are equal, the rest is on or off."""
    values = {key: _number(value, key, where) for key, value in sorted(flags.items())}
    if not values:
        return None
    amounts = {value for key, value in values.items() if key in AMOUNT_KEYS or value not in (0, 1)}
    if len({value > 0 for value in values.values()}) > 1 or len(amounts) > 1:
        said = ", ".join(f"{key}={flags[key]!r}" for key in values)
        raise BadRowError(f"{where} has flags that disagree: {said}", "flags disagree")
    return amounts.pop() if amounts else next(iter(values.values()))


def _number(value: Any, key: str, where: str) -> float:
    words = value.strip().lower() if isinstance(value, str) else value
    number = math.nan
    if isinstance(words, str):
        with contextlib.suppress(ValueError):
            number = float({"true": "1", "false": "0"}.get(words, words))
    elif isinstance(words, int | float):  # bool is an int
        number = float(words) if abs(words) < 1e300 else math.nan
    # A `loss` of 2.31 is a measurement, no flag.
    most = math.inf if key in AMOUNT_KEYS else 1.0
    if math.isfinite(number) and 0 <= number <= most:
        return number
    rule = "from 0 up" if key in AMOUNT_KEYS else "from 0 to 1"
    raise BadRowError(
        f"{where}: {key!r} says what is trained and is {_short(value)}; it must be true, false or "
        f"a number {rule} (rename the key if it means something else)",
        f"broken {key}",
    )


def _not_ours(where: str) -> BadRowError:
    return BadRowError(
        f"{where} asks to be trained, and only the assistant's turns are; set that flag to false "
        "or remove it",
        "flag on a turn that is not trained",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
