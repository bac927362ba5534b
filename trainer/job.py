"""run_job: a whole run from a script, which shows, writes and says what `trainer train` does."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trainer.child import quiet_libraries
from trainer.config.schema import TrainerConfig
from trainer.errors import EXIT_USER_INPUT
from trainer.monitoring.events import Observer
from trainer.monitoring.resuming import chat_command
from trainer.views.report import RunRecords
from trainer.views.terminal import DisplayKind, create_display
from trainer.views.words import preview_failure_words

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from trainer.core.run import TrainingResult

Display = DisplayKind | Literal["off"]
"""`off` prints nothing at all."""

PROGRAMS = ("json", "quiet", "off")
"""Displays without the closing lines for people."""


def run_job(
    config: TrainerConfig,
    *,
    display: Display | Observer | None = None,
    observers: Sequence[Observer] = (),
    callbacks: Sequence[TrainerCallback] = (),
    origins: Mapping[str, str] | None = None,
) -> TrainingResult:
    """Train as `config` says, show it, and write the report at the end. Never raises.

    Under torchrun every process calls it: the main one shows and writes.

    Args:
        display: how it is shown; None: as monitoring.display says (`auto`). A view of one's own is
            an observer, and alone: beside it only an error is printed, on standard error.
        observers: told of every event, in the main process; one method, `on_event(event)`. An
            exception in one is logged and does not stop the run.
        callbacks: of transformers, called before ours at each point. An exception ends the run.
        origins: where each value of the config came from, for the report.
    Returns:
        How the run ended; what went wrong is in it, and was printed unless display is `off`.
    """
    put_back = quiet_libraries()
    # A record that no handler takes is printed by Python itself; the caller's own still get it.
    logger, handler = logging.getLogger("trainer"), logging.NullHandler()
    if display == "off":
        logger.addHandler(handler)
    try:
        return _run_job(config, display, observers, callbacks, origins or {})
    finally:
        logger.removeHandler(handler)
        put_back()


def _run_job(
    config: TrainerConfig,
    display: Display | Observer | None,
    observers: Sequence[Observer],
    callbacks: Sequence[TrainerCallback],
    origins: Mapping[str, str],
) -> TrainingResult:
    # They need torch, which takes seconds to load.
    from trainer.core.engine import TrainerEngine
    from trainer.core.run import TrainingResult, is_main_process

    shown = config.monitoring.display if display is None else display
    if isinstance(shown, str) and shown not in (known := kinds()):
        message = f"run_job: display={shown!r} is not one of {', '.join(known)}, nor an observer."
        print(f"error: {message}", file=sys.stderr)
        return TrainingResult(
            success=False,
            state="failed",
            output_dir=Path(config.output.output_dir),
            error_message=message,
            exit_code=EXIT_USER_INPUT,
            summary={"ended_by": "error", "error_type": "ConfigError"},
        )
    if not is_main_process():
        return TrainerEngine(callbacks=callbacks).run_job(config)
    is_for_people = isinstance(shown, str) and shown not in PROGRAMS  # a view of one's own is alone
    if is_for_people:
        folder = shlex.quote(os.path.expanduser(config.output.output_dir))
        print(f"live page: trainer monitor {folder}", flush=True)
    records = RunRecords(origins, is_report=config.output.report)
    views = [] if shown == "off" else [create_display(shown) if isinstance(shown, str) else shown]
    engine = TrainerEngine(observers=[*views, *observers, records], callbacks=callbacks)
    result = engine.run_job(config)
    report = records.finish(result.output_dir)
    if shown != "off":
        _say_how_it_ended(result, report, config.model_dump(), is_for_people=is_for_people)
    return result


def kinds() -> tuple[str, ...]:
    """Names of displays."""
    return (*get_args(DisplayKind), "off")


def _say_how_it_ended(
    result: TrainingResult, report: Path | None, config: dict[str, Any], *, is_for_people: bool
) -> None:
    if result.error_message:
        word = "stopped" if result.state == "stopped" else "error"
        print(f"{word}: {result.error_message}", file=sys.stderr)
    if not (result.success and is_for_people):
        return
    print(f"model: {result.model_path}")
    if report is not None:
        print(f"report: {report}")
    print(f"talk to it: {chat_command(str(result.output_dir), config)}")
    failure = preview_failure_words(result.summary)
    if failure is not None:
        print(f"warning: {failure}")
