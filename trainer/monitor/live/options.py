"""What the command line decided for the live page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageOptions:
    """Permissions of the page."""

    is_control_allowed: bool = False
    """Whether pages may write control.json."""
    worker_hosts: frozenset[str] = frozenset()
    """Hosts besides this machine whose workers may be asked."""
