"""Profiles by name: built in, by installed entry point, or by dotted path."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from trainer.errors import ProfileError
from trainer.profiles.emoji_think import EmojiThinkProfile
from trainer.profiles.profile import DataProfile, Message, PlainProfile, Regime3Profile

ENTRY_POINT_GROUP = "trainer.profiles"

BUILT_IN: dict[str, type[DataProfile]] = {
    cls.name: cls for cls in (PlainProfile, Regime3Profile, EmojiThinkProfile)
}

__all__ = ["DataProfile", "Message", "get_profile", "known_profiles"]


def get_profile(name: str, options: dict[str, Any] | None = None) -> DataProfile:
    """Make the profile called `name`.

    Args:
        name: `plain`, `regime3`, `emoji_think`, the name of an entry point in
            group `trainer.profiles`, or `package.module:Class`.
        options: `profile.options` of the config.
    Raises:
        ProfileError: no such profile, it cannot be imported, or an option is unknown.
    """
    cls = BUILT_IN.get(name)
    if cls is None:
        cls = _load_path(name) if ":" in name else _load_entry_point(name)
    return cls(options)


def known_profiles() -> list[str]:
    """Names that `get_profile` takes: built in ones first, then installed entry points."""
    installed = sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})
    return [*BUILT_IN, *(name for name in installed if name not in BUILT_IN)]


def _load_entry_point(name: str) -> type[DataProfile]:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return _import(point.module, point.attr, where=f"entry point {name!r}")
    known = known_profiles()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ProfileError(
        f"profile.name={name!r} is not a known profile.{hint} Known: {', '.join(known)}; "
        "your own: package.module:Class."
    )


def _load_path(path: str) -> type[DataProfile]:
    module, _, attribute = path.partition(":")
    return _import(module, attribute, where=f"profile.name={path!r}")


def _import(module: str, attribute: str, *, where: str) -> type[DataProfile]:
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ProfileError(
            f"{where}: cannot import {module}:{attribute} ({error}); "
            "install the package that holds it, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, DataProfile)):
        raise ProfileError(
            f"{where}: {module}:{attribute} is {type(found).__name__}; it must be a class "
            "derived from trainer.profiles.DataProfile."
        )
    return found
