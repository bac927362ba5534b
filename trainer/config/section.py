"""What the sections of the config share: their base class, their common types, one error.

No torch, no file access.
"""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]

Interval = Annotated[int, Field(ge=0)]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]

Precision = Literal["bf16", "fp16", "fp32"]

TrainingMode = Literal["full", "lora", "qlora"]

Masters = Literal["fp32", "bf16_stochastic"]

MIN_PROMPTS = 12
"""With fewer prompts a score has no interval: it would be too wide to say anything, or wrong."""

VAL_LOSS = "val_loss"

WRITTEN = object()
"""The context in which the config that a run wrote is read: it has no secrets, and needs none."""


def _check_metric(value: str) -> str:
    if value != VAL_LOSS and not re.fullmatch(r"score\.\w+", value):
        raise PydanticCustomError(
            "metric", "should be val_loss, or score. and the name of a score, such as score.exact"
        )
    return value


Metric = Annotated[str, AfterValidator(_check_metric)]
"""What tells a better step: `val_loss`, or `score.` and the name of a score."""


class CombinationError(ValueError):
    """Values that are right alone and wrong together; a message can then say where each was set."""

    def __init__(self, rule: str, *keys: str) -> None:
        """Keep the rule that is broken, and the dotted names of the options that take part."""
        super().__init__(rule)
        self.keys = keys


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values cannot be changed in place."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, which nobody means."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise PydanticCustomError("number_type", "a number is needed, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types of an annotation: `Annotated[int, ...] | None` is {int, NoneType}."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation} if isinstance(annotation, type) else set()
