"""Profile `plain`: rows as they are, no system prompt of its own, exact comparison."""

from __future__ import annotations

from trainer.profiles.base import DataProfile


class PlainProfile(DataProfile):
    """The default: what is in the file is what is trained."""

    name = "plain"
