"""Addresses that hold a password or a key: what of them may be written down or shown."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

CUT = "***"
"""Stands where a secret was."""
_SECRET_NAME = re.compile(r"key|token|secret|sig|pass|pwd|auth|cred|code", re.IGNORECASE)


def without_secrets(address: str) -> str:
    """The address with user name and password, and values of keys in its query, replaced by CUT."""
    try:
        parts = urlsplit(address)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return re.sub(r"//[^/@]*@", f"//{CUT}@", address).partition("?")[0]
    _, at, host = parts.netloc.rpartition("@")
    if any(_SECRET_NAME.search(name) for name, _ in query):
        shown = [
            f"{quote(name)}={CUT if _SECRET_NAME.search(name) else quote(value)}"
            for name, value in query
        ]
        parts = parts._replace(query="&".join(shown))
    return urlunsplit(parts._replace(netloc=f"{CUT}@{host}" if at else host))


def is_cut(address: str) -> bool:
    """Whether a secret was taken out of this address, so that it leads nowhere any more."""
    return f"//{CUT}@" in address or f"={CUT}" in address
