"""What decides encoded rows, described exactly as plain values: the key of the cache."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
import time
import types
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from trainer import __version__
from trainer.models.chat_template import printed_dates
from trainer.profiles import DataProfile

LIBRARIES = ("transformers", "tokenizers", "jinja2")

OWN_PACKAGES = ("data", "profiles")


class NotCacheableError(Exception):
    """Something that decides the rows has no exact description."""


def describe(value: Any) -> Any:
    """Everything about a value that can change the rows, as plain JSON values.

    Raises:
        NotCacheableError: a value of a kind that is not known here.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [describe(part) for part in value]
    if isinstance(value, set | frozenset):
        # Whole, so that no two parts are equal to the sort: a set's own order changes by process.
        return sorted((describe(part) for part in value), key=canonical)
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if hasattr(value, "backend_tokenizer"):
        return tokenizer_key(value)
    if isinstance(value, DataProfile):
        return describe_profile(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return _describe_own(value)


def _describe_own(value: Any) -> Any:
    """Objects and functions of this package: its code is in the key, their values follow."""
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        if value.__module__.startswith("trainer."):
            return f"{value.__module__}.{value.__qualname__}"
    elif type(value).__module__.startswith("trainer."):
        if is_dataclass(value):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
        else:
            parts = dict(vars(value))
        return [type(value).__qualname__, describe(parts)]
    raise NotCacheableError(f"a {type(value).__module__}.{type(value).__qualname__}")


def tokenizer_key(tokenizer: Any) -> str:
    """sha256 of the tokenizer's rules, its template and its special tokens.

    Raises:
        NotCacheableError: it runs Python code from the model's folder.
    """
    if type(tokenizer).__module__.startswith("transformers_modules"):
        raise NotCacheableError("a tokenizer with code of its own")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left there by earlier calls; what a row's tokens are cut to is in the encoder.
    rules.pop("padding", None)
    rules.pop("truncation", None)
    parts = {
        "class": type(tokenizer).__qualname__,
        "rules": rules,
        "template": tokenizer.chat_template,
        "date": printed_dates(tokenizer),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "added": {
            index: [token.content, token.special]
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON values as a text that is the same for equal ones."""
    return json.dumps(value, sort_keys=True)


def describe_profile(profile: DataProfile) -> Any:
    """Name, options and code of a profile.

    The code is every source file that can be reached from the module of the class through what
    its modules import, as far as it is neither installed nor the standard library's; the class's
    own file always counts.

    Raises:
        NotCacheableError: the class has no source file.
    """
    cls = type(profile)
    hashes: dict[str, str] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("trainer.") and base is not object:
            _add_sources(sys.modules.get(base.__module__), hashes, is_wanted=True)
    return [cls.__module__, cls.__qualname__, describe(profile.options), hashes]


def _began_at() -> float:
    """When this process began, on the clock that files are stamped by.

    psutil adds the time since the boot to the boot's own, which is known to a second, and is wrong
    by hours where a virtual machine slept: files written just before would seem to be newer.
    """
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):  # no Linux
        return psutil.Process().create_time()
    return time.time() - age


def _add_sources(
    module: types.ModuleType | None, hashes: dict[str, str], *, is_wanted: bool
) -> None:
    """Hash a module's file and follow its names to the modules that they come from."""
    name = getattr(module, "__name__", "?")
    path = _source_file(module)
    if path is None:
        if is_wanted:
            raise NotCacheableError(f"profile code without a source file (module {name})")
        return
    if name in hashes or not (is_wanted or _is_users(name, path)):
        return
    if path.stat().st_mtime > _began_at():
        # What runs may be the code from before the edit, so its text says nothing.
        raise NotCacheableError(f"code edited since this process began ({path})")
    hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for value in list(vars(module).values()):
        if isinstance(value, types.ModuleType):
            _add_sources(value, hashes, is_wanted=False)
        else:
            home = getattr(value, "__module__", None)
            _add_sources(
                sys.modules.get(home) if isinstance(home, str) else None, hashes, is_wanted=False
            )


def _source_file(module: types.ModuleType | None) -> Path | None:
    try:
        path = Path(inspect.getsourcefile(module) or "")  # type: ignore[arg-type]
    except TypeError:  # built in, or no module at all
        return None
    return path if path.is_file() else None


def _is_users(name: str, path: Path) -> bool:
    """Whether a module is neither ours, nor installed, nor the standard library's."""
    top = name.partition(".")[0]
    return (
        top not in sys.stdlib_module_names
        and top != "trainer"
        and "site-packages" not in path.parts
    )


@cache
def own_code_hash() -> str:
    """sha256 of the source files of this package that make rows, and its version."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256(__version__.encode())
    for package in OWN_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"\n{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Versions of what else makes tokens."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, **{name: version(name) for name in LIBRARIES}}
