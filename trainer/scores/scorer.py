"""Scorer: the processes that compute scores, asked from a thread that training does not wait for.

The standard scores share one process; a function of the user, a pattern and a schema have one each.
A process that is silent for too long, ends, or answers nonsense costs its own scores of that step:
it is killed with all that it started, and started again for the next step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.child import KILL_TIMEOUT_S, Child
from trainer.config.monitoring_section import MonitoringConfig
from trainer.counts import counted
from trainer.errors import ConfigError
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.scores.spec import ScoreSpec, parse_scores
from trainer.scores.standard import GRADED

START_TIMEOUT_S = 120.0
"""Longest wait for the import of a score; some of them import torch."""

MAX_FAILURES = 3
"""Steps in a row without an answer after which a process is not started again."""

MAX_LINE_BYTES = 2**24

POLL_S = 0.05

OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables by which a library would take a score for one process of the training."""

Answers = list[dict[str, Any]]


class ScoreError(Exception):
    """Why a process gave no scores, in words."""


class ScoreProcess:
    """One process and the scores that it computes."""

    def __init__(
        self, specs: Sequence[ScoreSpec], columns: Mapping[str, str], log: Path | None
    ) -> None:
        """Start nothing yet.

        Args:
            columns: monitoring.score_columns.
            log: where what scores print goes; None: nowhere.
        """
        self.specs, self.columns, self.log = list(specs), dict(columns), log
        self.failures = 0
        self._child: Child | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def check(self) -> None:
        """Start it, and see that each score can be had.

        Raises:
            ConfigError: one cannot, or importing it ends the process or takes too long.
        """
        try:
            self._within(START_TIMEOUT_S, self._start)
        except ScoreError as error:
            names = ", ".join(spec.argument or spec.name for spec in self.specs)
            raise ConfigError(
                f"monitoring.scores: {names} cannot be imported: {error}; see that `python -c "
                "'import ...'` of its module ends by itself."
            ) from error

    def score(self, answers: Answers, step: int, timeout_s: float) -> dict[str, Any]:
        """By score: a list of values, or why there are none in words.

        Args:
            timeout_s: how long it may take, its start apart.
        """
        if self.failures >= MAX_FAILURES:
            return self._nothing(f"given up after {MAX_FAILURES} steps without an answer")
        try:
            if self._child is None:
                self._within(START_TIMEOUT_S, self._start)
            line = json.dumps({"step": step, "answers": answers}).encode()
            found = self._within(timeout_s, lambda child: _exchange(child, line))["scores"]
            scores = {spec.name: _checked(found[spec.name], len(answers)) for spec in self.specs}
        except (ScoreError, ConfigError) as error:
            self.kill()
            self.failures += 1
            return self._nothing(str(error))
        except (KeyError, TypeError, ValueError) as error:
            self.kill()
            self.failures += 1
            return self._nothing(f"its process answered nonsense ({type(error).__name__})")
        self.failures = 0
        return scores

    def _nothing(self, why: str) -> dict[str, Any]:
        return {spec.name: why for spec in self.specs}

    def _start(self, child: Child) -> None:
        setup = {"scores": [spec.values() for spec in self.specs], "columns": self.columns}
        errors = _exchange(child, json.dumps(setup).encode())["errors"]
        if errors:
            raise ConfigError("\n".join(map(str, errors.values())))

    def _within(self, timeout_s: float, action: Callable[[Child], Any]) -> Any:
        """Do something with the process, in a thread; kill the process at the end of time.

        Raises:
            ScoreError: it took too long, or the process ended.
        """
        self._refuse_closed()
        child = self._child = self._child or self._new_child()
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(action(child))
            except BaseException as error:
                outcome.append(error)

        thread = self._thread = threading.Thread(target=run, name="score", daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout_s
        # A process that ended may have left others that hold its pipe open: nothing more comes.
        while thread.is_alive() and time.monotonic() < deadline and child.returncode is None:
            thread.join(POLL_S)
        thread.join(POLL_S)
        if thread.is_alive():
            code = child.returncode
            self.kill()
            why = f"no answer within {timeout_s:g} s" if code is None else _ended(code)
            self._refuse_closed()
            raise ScoreError(why)
        self._refuse_closed()
        found = outcome[0]
        if isinstance(found, ConfigError | ValueError):
            raise found
        if isinstance(found, BaseException):
            raise ScoreError(_ended(child.wait(1.0)))
        return found

    def _refuse_closed(self) -> None:
        """Start nothing, and leave nothing that was started meanwhile, once it is closed."""
        if self._is_closed:
            self.kill()
            raise ScoreError("the run ended before it was computed")

    def _new_child(self) -> Child:
        environment = {key: text for key, text in os.environ.items() if key not in OF_LAUNCHERS}
        return Child(["trainer.scores.worker"], log=self.log or os.devnull, environment=environment)

    def kill(self) -> None:
        """End the process and all that it started."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.end(0.0, is_asked=False)
            if self._thread is not None:
                # What has left the session may hold the pipe open: its reader is left alone then.
                self._thread.join(KILL_TIMEOUT_S)
            if self._thread is None or not self._thread.is_alive():
                child.lines.close()

    def close(self) -> None:
        """End it for good; what is being computed is given up."""
        self._is_closed = True
        self.kill()


def _ended(code: int | None) -> str:
    how = "" if code is None else f" with exit code {code}" if code >= 0 else f" by signal {-code}"
    return f"its process ended{how}"


def _exchange(child: Child, line: bytes) -> Any:
    child.send(line)
    found = child.lines.readline(MAX_LINE_BYTES)
    if not found.endswith(b"\n"):
        raise EOFError("no whole line")
    return json.loads(found)


def _checked(found: Any, count: int) -> list[float | None] | str:
    if isinstance(found, str):
        return found
    values = [None if value is None else float(value) for value in found]
    if len(values) != count:
        raise ValueError(counted(len(values), "value"))
    return values


# ---- all scores of a run


def check_scores(monitoring: MonitoringConfig) -> None:
    """Refuse scores that cannot be had; functions are imported, in processes of their own.

    Raises:
        ConfigError: an entry of monitoring.scores names no score, or one that does not load.
    """
    specs = parse_scores(monitoring.scores)
    if not specs or os.environ.get("RANK", "0") != "0":  # the main process asks for all
        return
    scorer = Scorer(specs, columns=monitoring.score_columns, timeout_s=monitoring.score_timeout)
    try:
        scorer.check()
    finally:
        scorer.close()


class Scorer:
    """Scores answers; errors are columns without values, told in words."""

    def __init__(
        self,
        specs: Sequence[ScoreSpec],
        *,
        columns: Mapping[str, str],
        timeout_s: float,
        log: Path | None = None,
    ) -> None:
        """Start nothing yet; the rest as in `ScoreProcess`."""
        together = [spec for spec in specs if not spec.is_alone]
        groups = [[spec] for spec in specs if spec.is_alone]
        self.names = [spec.name for spec in specs]
        self.graded = frozenset(spec.name for spec in specs if spec.kind in GRADED)
        """Those that are no verdict of right or wrong."""
        self.timeout_s = timeout_s
        self.processes = [
            ScoreProcess(group, columns, log) for group in ([together] if together else []) + groups
        ]

    def check(self) -> None:
        """See that each score can be had.

        Raises:
            ConfigError: one cannot.
        """
        for process in self.processes:
            process.check()

    def score(
        self, results: Sequence[PreviewResult], requests: Mapping[str, PreviewRequest]
    ) -> tuple[list[PreviewResult], dict[str, str]]:
        """The results with their scores, and by score why it has none.

        Args:
            results: of one step, their further samples in them; those without an answer get no
                scores.
            requests: by prompt_id.
        """
        answered = [one for one in results if one.ok]
        if not answered:
            return list(results), {}
        answers = [
            _answer(one, text, requests.get(one.prompt_id))
            for one in answered
            for text in [one.text, *(sample.text for sample in one.samples if sample.ok)]
        ]
        found: dict[str, Any] = {}
        threads = [
            threading.Thread(
                target=lambda process: found.update(
                    process.score(answers, answered[0].step, self.timeout_s)
                ),
                args=(process,),
                daemon=True,
            )
            for process in self.processes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = {name: words for name, words in found.items() if isinstance(words, str)}
        columns = {name: found[name] for name in self.names if name not in errors}
        rows = iter(
            {"scores": {name: column[i] for name, column in columns.items()}}
            for i in range(len(answers))
        )
        return [_scored(one, rows) if one.ok else one for one in results], errors

    def close(self) -> None:
        """End the processes; what is being computed is given up."""
        for process in self.processes:
            process.close()


def _scored(result: PreviewResult, rows: Iterator[dict[str, Any]]) -> PreviewResult:
    """A result and its samples with the next rows of scores, in the order they were asked in."""
    own = next(rows)
    samples = tuple(one.model_copy(update=next(rows)) if one.ok else one for one in result.samples)
    return result.model_copy(update={**own, "samples": samples})


def _answer(result: PreviewResult, text: str, request: PreviewRequest | None) -> dict[str, Any]:
    """What scores are told of an answer, which is one of the result's samples."""
    turn = {"role": "user", "content": result.prompt}
    messages = [dict(one) for one in request.messages] if request is not None else []
    return {
        "completion": text,
        "golden_answer": result.golden_answer,
        "prompt": result.prompt,
        "messages": messages or [turn],
        "row": request.row if request is not None else {},
    }
