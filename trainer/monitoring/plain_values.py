"""Events as plain JSON values: strict JSON and valid Unicode, whatever a run produces."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel


def plain_values(value: Any, odd: dict[str, str] | None = None, where: str = "") -> Any:
    """Make a value of dicts, lists, strings, finite numbers, booleans and None.

    Args:
        value: an event, a pydantic object, or what they hold; unknown objects become their str().
        odd: takes the place and text of each number that JSON cannot hold; it becomes None.
        where: place of `value`, such as `summary.train_loss`.
    """
    odd = {} if odd is None else odd
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        odd[where] = str(float(value))
        return None
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    elif is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {
            encodable(str(key)): plain_values(item, odd, f"{where}.{key}" if where else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(item, odd, f"{where}[{i}]") for i, item in enumerate(value)]
    return encodable(str(value))


def encodable(text: str) -> str:
    """The text with lone surrogates (odd file names, broken input) as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON in ASCII, with its line feed."""
    return json.dumps(values, allow_nan=False) + "\n"
