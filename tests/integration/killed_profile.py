"""A profile by which a test ends its process at a chosen moment, which the environment names."""

from __future__ import annotations

import os
import signal
from typing import Any

from trainer.core import checkpoint, preparation
from trainer.profiles.profile import PlainProfile

MOMENTS = {
    "rows": (preparation, "prepare_data"),
    "weights": (preparation, "load_base"),
    "checkpoint": (checkpoint, "_write_manifest"),  # the first one is half written
}


class KilledProfile(PlainProfile):
    """`plain`; KILL_AT is a moment, KILL_BY the number of a signal."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        if "KILL_AT" in os.environ:
            module, name = MOMENTS[os.environ["KILL_AT"]]
            setattr(module, name, _end)


def _end(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), int(os.environ.get("KILL_BY", signal.SIGKILL)))
