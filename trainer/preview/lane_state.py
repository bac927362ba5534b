"""What a lane of published previews knows at one moment; its threads share it under one lock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Staged:
    """A snapshot of one step and where it lies."""

    step: int
    slot: int
    is_kept: bool
    copied: Callable[[], None]
    canary: torch.Tensor | None
    asked_at: float
    canary_value: float | None = None


@dataclass
class LaneState:
    """Where the snapshots are, and how the publisher and the server do."""

    free: list[int]
    staged: Staged | None = None
    feeding: Staged | None = None
    given: list[Staged] = field(default_factory=list)
    delivering: list[int] = field(default_factory=list)
    """Steps whose answers are there and are being told."""
    committed: int | None = None
    """Slot that a server reads from until newer weights are there (transport `dir`)."""
    last_wanted: int | None = None
    """The last step found no free slot; its weights stay, so it is copied while draining."""
    is_away: bool = False
    is_open: bool = False
    away_error: str = ""
    respawns: int = 0
    dead: str = ""
    is_closing: bool = False
