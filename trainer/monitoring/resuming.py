"""The command that goes on with a run, as every message and view shows it."""

from __future__ import annotations

import shlex
from typing import Any

from trainer.scores.spec import is_function


def resume_flags(scores: Any) -> str:
    """`--resume`, with `--allow-code` where the run's own config would else be refused.

    Args:
        scores: `monitoring.scores` of the run, also as read from its record; None: not known.
    """
    entries = scores if isinstance(scores, (list, tuple)) else ()
    names_code = any(isinstance(entry, str) and is_function(entry) for entry in entries)
    return "--resume --allow-code" if names_code else "--resume"


def resume_command(folder: str, scores: Any) -> str:
    """A command to copy.

    Args:
        scores: as of `resume_flags`.
    """
    return f"trainer train {resume_flags(scores)} --output {shlex.quote(folder)}"
