"""`monitoring.scores`: what each entry names, and under which name its column goes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.errors import ConfigError
from trainer.scores.standard import PLAIN, WITH_ARGUMENT

FUNCTION = "function"

_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.+)", re.DOTALL)

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class ScoreSpec:
    """One score."""

    name: str
    """Of its column."""
    kind: str
    """A standard score, or `function`."""
    argument: str = ""
    """Pattern, file, or `package.module:function`."""

    @property
    def is_alone(self) -> bool:
        """Whether it may hang or end its process, and so has one of its own."""
        return self.kind == FUNCTION or self.kind in WITH_ARGUMENT

    def values(self) -> dict[str, Any]:
        """It as JSON values."""
        return asdict(self)


def is_function(entry: str) -> bool:
    """Whether an entry of `monitoring.scores` names code."""
    try:
        return _spec_of(entry).kind == FUNCTION
    except ConfigError:
        return False


def parse_scores(entries: Sequence[str]) -> tuple[ScoreSpec, ...]:
    """The scores of `monitoring.scores`.

    Raises:
        ConfigError: an entry names none, or two have the same name.
    """
    found: dict[str, ScoreSpec] = {}
    for entry in entries:
        spec = _spec_of(entry)
        if spec.name in found:
            raise ConfigError(
                f"monitoring.scores: two scores are called {spec.name!r}; write one of them as "
                f"NAME=SCORE, such as {spec.name}_2={entry}."
            )
        found[spec.name] = spec
    return tuple(found.values())


def _spec_of(entry: str) -> ScoreSpec:
    named = _NAMED.fullmatch(entry)
    if named is not None and (inner := _read(named[2])) is not None:
        return ScoreSpec(named[1], inner.kind, inner.argument)
    spec = _read(entry)
    if spec is not None:
        return spec
    near = difflib.get_close_matches(entry.partition(":")[0], [*PLAIN, *WITH_ARGUMENT], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"monitoring.scores names {entry!r}, which is no score.{hint} Known: {', '.join(PLAIN)}, "
        "json_schema:FILE, regex:PATTERN; your own: package.module:function. Each one has its own "
        "flag: --monitoring.scores exact --monitoring.scores number."
    )


def _read(text: str) -> ScoreSpec | None:
    kind, colon, argument = text.partition(":")
    if kind in PLAIN and not colon:
        return ScoreSpec(kind, kind)
    if kind in WITH_ARGUMENT:
        return ScoreSpec(kind, kind, argument) if argument else None
    if _PATH.fullmatch(text):
        return ScoreSpec(argument.rpartition(".")[2], FUNCTION, text)
    return None
