"""Functions of the user as scores: what they ask for, and how they are called.

Three shapes, told apart by the names of their parameters; nothing needs to be inherited:

- one answer at a time: some of completion, golden_answer, prompt (texts), messages (a list), row
  (its columns by name) and step;
- rewards of TRL: `completions`, a list of conversations of one message, and the row's columns as
  lists, each by its name; called once a batch;
- rewards of verifiers: `completion` and `prompt` as messages, `answer`, `info`, `state`, `task`.

Each may be async, and returns a number, a bool or None (TRL's: a list of these).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.counts import counted
from trainer.errors import ConfigError

OWN = ("completion", "golden_answer", "prompt", "messages", "row", "step")

OF_VERIFIERS = ("completion", "prompt", "answer", "info", "state", "task")

GOLDEN_ANSWER = "golden_answer"

Answers = Sequence[Mapping[str, Any]]
"""What was answered, each with the values of OWN but `step`."""


class ScoreFunction:
    """A function of the user, called for a batch of answers."""

    def __init__(self, path: str, columns: Mapping[str, str]) -> None:
        """Import it and look at its parameters.

        Args:
            path: `package.module:function`.
            columns: name of a parameter -> the row's column, or `golden_answer`, that it gets.
        Raises:
            ConfigError: it cannot be imported, or asks for something that no answer has.
        """
        self.path, self.columns = path, dict(columns)
        self.function = _load(path)
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"monitoring.scores: {path}: its parameters are unknown ({error}); write a "
                "function in Python that calls it."
            ) from error
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.names = {name: one for name, one in parameters.items() if one.kind in by_name}
        self.takes_more = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self.is_batched = "completions" in self.names
        self.call: Callable[[Answers, int], Any] = self._choose()

    def _choose(self) -> Callable[[Answers, int], Any]:
        if self.is_batched:
            return self._call_batch
        asked = [name for name, one in self.names.items() if one.default is one.empty]
        wanted = [name for name in asked if name not in self.columns]
        is_verifiers = any(name in self.names for name in ("answer", "info", "state", "task"))
        if is_verifiers or _takes_messages(self.names.get("completion")):
            known = OF_VERIFIERS
            call: Callable[[Answers, int], Any] = self._call_with_messages
        else:
            known, call = OWN, self._call_each
        unknown = [name for name in wanted if name not in (*known, *OWN)]
        if unknown:
            raise ConfigError(
                f"monitoring.scores: {self.path} asks for {', '.join(unknown)}; a score may ask "
                f"for {', '.join(OWN)}, a reward of TRL for completions and the columns of a row. "
                "Name a column by monitoring.score_columns."
            )
        return call

    def score(self, answers: Answers, step: int) -> list[float | None]:
        """The scores of a batch.

        Raises:
            Exception: whatever the function raises; ValueError: it returned something else.
        """
        found = self.call(answers, step)
        if not isinstance(found, list | tuple) or len(found) != len(answers):
            what = (
                f"{counted(len(found), 'value')}"
                if isinstance(found, list | tuple)
                else repr(found)[:80]
            )
            raise ValueError(f"it returned {what} for {counted(len(answers), 'answer')}")
        return [_number(value) for value in found]

    # ---- one answer at a time

    def _call_each(self, answers: Answers, step: int) -> list[Any]:
        return self._gather([{**one, "step": step} for one in answers])

    def _call_with_messages(self, answers: Answers, step: int) -> list[Any]:
        given = []
        for one in answers:
            row = one["row"]
            values = {
                **one,
                "step": step,
                "prompt": one["messages"],
                "completion": [_said(one)],
                "answer": row.get("answer", one["golden_answer"]),
                "info": row.get("info", {}),
                "task": row.get("task", "default"),
            }
            given.append({**values, "state": {**values, "row": row}})
        return self._gather(given)

    def _gather(self, given: Sequence[Mapping[str, Any]]) -> list[Any]:
        calls = [self._arguments(values) for values in given]
        if not _is_async(self.function):
            return [self.function(**call) for call in calls]

        async def all_of_them() -> list[Any]:
            return list(await asyncio.gather(*(self.function(**call) for call in calls)))

        return asyncio.run(all_of_them())

    def _arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if name in self.names}
        for name, column in self.columns.items():
            if name in self.names:
                found[name] = _column(column, values)
        return found

    # ---- once a batch

    def _call_batch(self, answers: Answers, step: int) -> Any:
        given: dict[str, Any] = {
            "completions": [[_said(one)] for one in answers],
            "prompts": [one["messages"] for one in answers],
        }
        columns = dict.fromkeys(name for one in answers for name in one["row"])
        for name in columns:
            if name not in ("prompt", "completion", "completions", "prompts"):
                given[name] = [one["row"].get(name) for one in answers]
        for name, column in self.columns.items():
            given[name] = [_column(column, one) for one in answers]
        if not self.takes_more:
            given = {name: value for name, value in given.items() if name in self.names}
        missing = [
            name
            for name, one in self.names.items()
            if name not in given and one.default is one.empty
        ]
        if missing:
            raise ValueError(
                f"it asks for {', '.join(missing)}, and the columns of the rows are "
                f"{', '.join(columns) or 'none'}; name a column by monitoring.score_columns"
            )
        found = self.function(**given)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


def _said(answer: Mapping[str, Any]) -> dict[str, str]:
    """An answer as the turn of a conversation."""
    return {"role": "assistant", "content": answer["completion"]}


async def _awaited(found: Any) -> Any:
    return await found


def _column(column: str, values: Mapping[str, Any]) -> Any:
    """A column of the row, or what else an answer has under that name."""
    row = values["row"]
    if column in row:
        return row[column]
    if column in ("golden_answer", "prompt"):
        return values[column]
    raise ValueError(
        f"monitoring.score_columns names the column {column}, and the row has "
        f"{', '.join(row) or 'none'}"
    )


def _is_async(function: Any) -> bool:
    """Whether calls are to be awaited: of a function, or of an object with such a `__call__`."""
    method = getattr(type(function), "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)


def _takes_messages(parameter: inspect.Parameter | None) -> bool:
    """Whether `completion` is annotated as a list of messages."""
    if parameter is None or parameter.annotation is parameter.empty:
        return False
    words = str(parameter.annotation)
    return "list" in words.lower() or "Messages" in words


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    where = f"monitoring.scores: {path}"
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except BaseException as error:  # whatever the module does when it is imported
        words = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{where}: cannot be imported ({type(error).__name__}: {words}); install the package "
            "that holds it, or put its folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"{where} is {type(found).__name__}; it must be a function.")
    return found


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, int | float):  # bool is an int
        raise ValueError(f"it returned {repr(value)[:80]}, which is no number")
    if not math.isfinite(value):
        raise ValueError(f"it returned {value}")
    return float(value)
