"""The process that computes scores: nothing that a score does reaches the training process.

    python -m trainer.scores.worker      started by `trainer.scores.scorer`

Lines of JSON: the scores come first, then batches of answers; each line gets one in return. What
scores print goes to the log of the process, as far as there is room. It ends when stdin closes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from trainer.child import own_lines
from trainer.errors import ConfigError
from trainer.scores.functions import Answers, ScoreFunction
from trainer.scores.spec import FUNCTION, ScoreSpec
from trainer.scores.standard import PLAIN, WITH_ARGUMENT

NICENESS = 10

MAX_LOG_BYTES = 2**20
"""Printed by one process; what is more is thrown away."""

ERROR_CHARS = 600

BatchScore = Callable[[Answers, int], list[float | None]]


def load(spec: ScoreSpec, columns: Mapping[str, str]) -> BatchScore:
    """A score as a function of a batch of answers and its step.

    Raises:
        ConfigError: it cannot be had.
    """
    if spec.kind == FUNCTION:
        return ScoreFunction(spec.argument, columns).score
    make = WITH_ARGUMENT.get(spec.kind)
    one = PLAIN[spec.kind] if make is None else make(spec.argument)
    return lambda answers, step: [
        one(answer["completion"], answer["golden_answer"]) for answer in answers
    ]


def bounded_log() -> None:
    """Have everything that is printed go to stderr as far as there is room."""
    log = os.dup(2)
    out, into = os.pipe()
    os.dup2(into, 1)
    os.dup2(into, 2)
    os.close(into)

    def copy() -> None:
        room = MAX_LOG_BYTES
        while piece := os.read(out, 2**16):
            if room > 0:
                os.write(log, piece[:room])
            room -= len(piece)

    threading.Thread(target=copy, daemon=True).start()


def words_of(error: BaseException) -> str:
    """An error with the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    try:
        words = " ".join(str(error).split())
    except Exception:
        words = "its message cannot be had"
    return f"{type(error).__name__}: {words[:ERROR_CHARS]}{where}"


def main() -> None:
    """Answer until stdin closes."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    lines, out = own_lines()
    bounded_log()
    own = os.getpid()

    def answer(values: dict[str, Any]) -> None:
        if os.getpid() != own:  # a score has forked, and this is the other one
            os._exit(0)
        out.write(json.dumps(values).encode() + b"\n")
        out.flush()

    setup = json.loads(lines.readline())
    scores: dict[str, BatchScore] = {}
    errors: dict[str, str] = {}
    for values in setup["scores"]:
        spec = ScoreSpec(**values)
        try:
            scores[spec.name] = load(spec, setup["columns"])
        except ConfigError as error:
            errors[spec.name] = str(error)
    answer({"errors": errors})
    for line in lines:
        batch = json.loads(line)
        found: dict[str, Any] = {}
        for name, score in scores.items():
            try:
                found[name] = score(batch["answers"], batch["step"])
            except BaseException as error:
                found[name] = words_of(error)
        answer({"scores": found})
    os._exit(0)  # threads that a score has left behind must not keep it


if __name__ == "__main__":
    sys.path[:] = [place or os.getcwd() for place in sys.path]
    main()
