"""The losses of sources under the names that files and trackers have them by: `loss/NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELD = "source_losses"
"""Of StepDone and EvaluationDone: name of the source -> its loss."""

PREFIXES = {"StepDone": "loss/", "EvaluationDone": "val_loss/"}
"""Type of event -> what stands before the name of a source."""


def flat_losses(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an event with its losses of sources under keys of their own.

    Args:
        kind: type of the event.
        values: of the event, plain.
    """
    rest = {name: value for name, value in values.items() if name != FIELD}
    return {**rest, **named_losses(kind, values.get(FIELD) or {})}


def named_losses(kind: str, losses: Mapping[str, Any]) -> dict[str, Any]:
    """Losses by source, such as {"loss/gsm8k": 1.2}."""
    return {f"{PREFIXES[kind]}{name}": loss for name, loss in losses.items()}


def losses_of_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Name of the source -> loss, of a line of metrics.jsonl; {} where it has none."""
    prefix = PREFIXES.get(str(row.get("type")))
    if prefix is None:
        return {}
    return {key.removeprefix(prefix): one for key, one in row.items() if key.startswith(prefix)}


def loss_keys(kind: str, keys: set[str]) -> list[str]:
    """Those of the keys that are losses of sources."""
    return sorted(key for key in keys if key.startswith(PREFIXES[kind]))
