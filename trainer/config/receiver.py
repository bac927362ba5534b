"""What `monitoring.notify` may hold: a webhook or a command, and how much of it may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from trainer.net import CUT

NOTIFY_SILENCE_S = 600.0


def is_webhook(notify: Sequence[str]) -> bool:
    """Whether these words (one at least) are an address, and no command."""
    return notify[0].lower().startswith(("http://", "https://"))


def notify_problem(notify: Sequence[str]) -> str | None:
    """What is wrong with the words, without repeating any of them; None: nothing."""
    if any(CUT in word for word in notify):
        return (
            "was written down without its secrets, which stand nowhere; give it again by "
            "--monitoring.notify or by TRAINER_MONITORING__NOTIFY, or leave it empty"
        )
    if notify and (not notify[0].strip() or any("\0" in word for word in notify)):
        return "names no program; give the address of a webhook, or a command as a list of words"
    if not notify or not (is_webhook(notify) or "://" in notify[0]):
        return None
    if not is_webhook(notify):
        return "is an address that begins with neither http:// nor https://; give one that does"
    if len(notify) > 1:
        return "is one address, or the words of one command; give one address alone"
    return None if _host(notify[0]) else "is an address without a host; give https://HOST/PATH"


def shown_notify(notify: Sequence[str]) -> list[str]:
    """What may be written down: the host of a webhook, the program of a command.

    Whoever knows the path of a webhook may write to it, and any word of a command can be a secret.
    """
    if not notify or not is_webhook(notify):
        return [*notify[:1], *[CUT] * len(notify[1:])]
    parts = urlsplit(notify[0])
    host = parts.netloc.rpartition("@")[2]
    is_whole = parts.path in ("", "/") and not parts.query and host == parts.netloc
    return [notify[0] if is_whole else f"{parts.scheme}://{host}/{CUT}"]


def _host(address: str) -> str:
    try:
        parts = urlsplit(address)
        return (parts.hostname or "") if parts.port != 0 else ""
    except ValueError:  # a port that is no number, a bracket that is not closed
        return ""
