"""The fields of TrainerConfig by dotted name, and the nearest name to a mistaken one."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic.fields import FieldInfo

from trainer.config.schema import TrainerConfig


@dataclass(frozen=True)
class ConfigField:
    """One option."""

    section: str
    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        """Dotted name, `section.field`."""
        return f"{self.section}.{self.name}"

    @property
    def default(self) -> Any:
        """Value when nobody sets it."""
        return self.info.get_default(call_default_factory=True)

    @property
    def kind(self) -> Literal["bool", "list", "dict", "scalar"]:
        """How it is written on a command line."""
        found = _kinds(self.info.annotation)
        if found & {tuple, list}:
            return "list"
        if dict in found:
            return "dict"
        return "bool" if bool in found else "scalar"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for other types."""
        return tuple(str(value) for value in _literals(self.info.annotation))

    @property
    def type_text(self) -> str:
        """The type for people, such as `float` or `cpu | cuda`."""
        return _type_text(self.info.annotation)

    @property
    def description(self) -> str:
        """The text under the field in the schema, on one line."""
        return " ".join((self.info.description or "").split())


@cache
def config_fields() -> dict[str, ConfigField]:
    """All fields by dotted name, in the order of the schema."""
    return {
        f"{section}.{name}": ConfigField(section, name, info)
        for section, part in TrainerConfig.model_fields.items()
        for name, info in part.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def section_names() -> tuple[str, ...]:
    """The sections in the order of the schema."""
    return tuple(TrainerConfig.model_fields)


def nearest_key(wrong: str) -> str | None:
    """The field that `wrong` was probably meant to be.

    A field's own name in another section wins over a similar spelling.
    """
    fields = config_fields()
    plain = wrong.replace("-", "_").lower()
    leaf = plain.rsplit(".", 1)[-1]
    for key, field in fields.items():
        if field.name == leaf:
            return key
    by_spelling = {key: key for key in fields} | {
        field.name.replace("_", ""): key for key, field in fields.items()
    }
    for attempt in (plain, leaf.replace("_", "")):
        near = difflib.get_close_matches(attempt, by_spelling, n=1, cutoff=0.7)
        if near:
            return by_spelling[near[0]]
    return None


def unknown_key_text(wrong: str) -> str:
    """`unknown key 'x'; did you mean 'a.b'?`"""
    sections = [] if "." in wrong else difflib.get_close_matches(wrong, section_names(), n=1)
    near = sections[0] if sections else nearest_key(wrong)
    hint = f"; did you mean {near!r}?" if near else "; `trainer config schema` lists all keys"
    return f"unknown key {wrong!r}{hint}"


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(part for arg in typing.get_args(annotation) for part in _parts(arg))
    return (annotation,)


def _kinds(annotation: Any) -> set[Any]:
    return {typing.get_origin(part) or part for part in _parts(annotation)}


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for part in _parts(annotation)
        if typing.get_origin(part) is Literal
        for value in typing.get_args(part)
    ]


def _type_text(annotation: Any) -> str:
    names = []
    for part in _parts(annotation):
        origin = typing.get_origin(part)
        if part is type(None):
            names.append("empty")
        elif origin is Literal:
            names.extend(str(value) for value in typing.get_args(part))
        elif origin is tuple:
            names.append(f"list of {_type_text(typing.get_args(part)[0])}")
        elif origin is dict:
            names.append("mapping")
        else:
            names.append(
                {
                    "str": "text",
                    "int": "whole number",
                    "float": "number",
                    "bool": "true or false",
                }.get(part.__name__, part.__name__)
            )
    return " or ".join(names)
