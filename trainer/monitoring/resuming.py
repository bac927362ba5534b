"""The command that goes on with a run, as every message and view shows it."""

from __future__ import annotations

import shlex
from typing import Any

from trainer.scores.spec import is_function

ALLOW_CODE = "--allow-code"


def named_code(config: Any) -> dict[str, str]:
    """Code that the config of a run names, which is run only where somebody says so.

    Args:
        config: of a run, also as read from its record, which somebody else may have written.
    Returns:
        Dotted key -> what stands there, in words.
    """
    found: dict[str, str] = {}
    name = _value(config, "profile", "name")
    if isinstance(name, str) and ":" in name:  # others are built in or installed
        found["profile.name"] = name
    if _value(config, "model", "trust_remote_code") is True:
        found["model.trust_remote_code"] = "the files of the model"
    scores = _value(config, "monitoring", "scores")
    entries = scores if isinstance(scores, (list, tuple)) else ()
    functions = [one for one in entries if isinstance(one, str) and is_function(one)]
    if functions:
        found["monitoring.scores"] = ", ".join(functions)
    return found


def _value(config: Any, section: str, name: str) -> Any:
    values = config.get(section) if isinstance(config, dict) else None
    return values.get(name) if isinstance(values, dict) else None


def resume_flags(config: Any) -> str:
    """`--resume`, with `--allow-code` where the run's own config would else be refused.

    Args:
        config: of the run, as of `named_code`; None: not known.
    """
    return f"--resume {ALLOW_CODE}" if named_code(config) else "--resume"


def resume_command(folder: str, config: Any) -> str:
    """A command to copy.

    Args:
        config: as of `resume_flags`.
    """
    return f"trainer train {resume_flags(config)} --output {shlex.quote(folder)}"


def chat_command(folder: str, config: Any) -> str:
    """A command to copy, for a run that has a model.

    Args:
        config: as of `resume_flags`.
    """
    asked = named_code(config).keys() - {"monitoring.scores"}  # they are no part of answering
    return f"trainer chat {shlex.quote(folder)}{f' {ALLOW_CODE}' if asked else ''}"
