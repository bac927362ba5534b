"""Encoded rows on disk, found again by everything that decides them; never by time or name.

A file is the sha256 of the rest, and the rest flat arrays behind an index of them as JSON. They are
read from the file when they are used; there is no pickle in it.
What cannot be described exactly (a profile without source code) is not cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import secrets
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import BaseModel

from trainer import __version__
from trainer.config.schema import DataSection
from trainer.data.file_arrays import FileArray, OpenFile
from trainer.files import default_cache_dir, replace_file
from trainer.models.chat_template import printed_dates
from trainer.profiles import DataProfile

logger = logging.getLogger(__name__)

NO_EFFECT = {
    *("cache", "cache_dir", "encode_processes", "shuffle", "group_by_length", "enable_packing"),
}
"""Options of section `data` that do not change the encoded rows."""

SUFFIX = ".cache"

TEMPORARY = ".tmp"

DIGEST_BYTES, LENGTH_BYTES = 32, 8

ALIGNED = 64
"""Every array begins at a multiple of so many bytes."""

KEY_CHARS = 40

KEPT_ENTRIES = 8
"""Entries of data files with one name; the one that was longest unused goes first."""

LIBRARIES = ("transformers", "tokenizers", "jinja2")

OWN_PACKAGES = ("data", "profiles")

Arrays = dict[str, np.ndarray[Any, Any]]

FileArrays = dict[str, FileArray]


class NotCacheableError(Exception):
    """Something that decides the rows has no exact description."""


class DamagedEntryError(Exception):
    """A cache file whose content is not what was written."""


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, or the default where it is empty."""
    return Path(configured).expanduser() if configured else default_cache_dir()


@dataclass(frozen=True)
class CacheEntry:
    """The file of one key, there or not."""

    path: Path

    def read(self) -> tuple[FileArrays | None, str]:
        """Its arrays or None, and what the data card says of them; damage is a warning."""
        try:
            arrays = self.load()
        except DamagedEntryError as error:
            logger.warning("%s: %s; the rows are encoded again", self.path, error)
            return None, f"damaged entry replaced ({error}): "
        return arrays, f"read from {self.path}" if arrays is not None else ""

    def write(self, arrays: Arrays, note: str) -> tuple[bool, str]:
        """Store the arrays: whether that went well, and what the data card says of it.

        A full disk is a warning.

        Args:
            note: of `read`.
        """
        try:
            removed = self.store(arrays)
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s); the next start encodes again", self.path, error
            )
            return False, f"not written: {error.strerror}"
        more = f"; {removed} older entries of this file name removed" if removed else ""
        return True, f"{note}written to {self.path}{more}"

    def load(self) -> FileArrays | None:
        """Its arrays, in the file; None where there is none.

        Raises:
            DamagedEntryError: it cannot be read, or its content is not what was written.
        """
        try:
            with self.path.open("rb") as file:
                digest = file.read(DIGEST_BYTES)
                if hashlib.file_digest(file, "sha256").digest() != digest:
                    raise DamagedEntryError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedEntryError(str(error.strerror)) from error
        with contextlib.suppress(OSError):  # a folder that is only read serves as well
            os.utime(self.path)
        return self.arrays()

    def arrays(self) -> FileArrays:
        """The arrays of a file that is whole; they are read when they are used.

        Raises:
            OSError: it is not there.
        """
        file = OpenFile(self.path)
        begin = DIGEST_BYTES + LENGTH_BYTES
        size = int.from_bytes(file.read(DIGEST_BYTES, LENGTH_BYTES), "little")
        index = json.loads(file.read(begin, size))
        return {
            name: FileArray(file, kind, begin + size + offset, count)
            for name, (kind, offset, count) in index.items()
        }

    def store(self, arrays: Arrays) -> int:
        """Write the file in one step: it is whole, or not there.

        Returns:
            How many older entries of data files with this name were removed: the file that is
            edited again and again must not fill the disk.
        Raises:
            OSError: the folder cannot be written.
        """
        index: dict[str, tuple[str, int, int]] = {}
        body: list[bytes | memoryview] = []
        offset = 0
        for name, array in arrays.items():
            index[name] = (array.dtype.str, offset, array.size)
            padding = -array.nbytes % ALIGNED
            body += [np.ascontiguousarray(array).view(np.uint8).data, bytes(padding)]
            offset += array.nbytes + padding
        head = json.dumps(index).encode()
        head += b" " * (-(DIGEST_BYTES + LENGTH_BYTES + len(head)) % ALIGNED)
        pieces = [len(head).to_bytes(LENGTH_BYTES, "little"), head, *body]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Machines that share the folder have processes with the same number.
        tag = secrets.token_hex(4)
        replace_file(self.path, [digest.digest(), *pieces], tag=tag, is_synced=True)
        return self._forget_oldest()

    def _forget_oldest(self) -> int:
        """Remove entries of this data file's name beyond the KEPT_ENTRIES used last."""
        label = self.path.name[: -KEY_CHARS - len(SUFFIX)]
        found = [
            path
            for path in entries(self.path.parent)
            if path.suffix == SUFFIX
            and path.name.startswith(label)
            and len(path.name) == len(self.path.name)
            and path != self.path
        ]
        removed = 0
        for path in sorted(found, key=_last_use, reverse=True)[KEPT_ENTRIES - 1 :]:
            with contextlib.suppress(OSError):  # another run removed it first, or may remove it
                path.unlink()
                removed += 1
        return removed


def entry_of(
    section: DataSection, hashes: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[CacheEntry | None, str]:
    """The cache entry of a run's rows, or None and the reason for the data card.

    Args:
        section: says whether and where rows are cached, and what decides them.
        hashes: name of each data file -> hash of its content.
        options: all else that decides the rows, as `find_entry` takes it.
    """
    if not section.cache:
        return None, "off (data.cache=false)"
    parts = {
        **options,
        "section": section.model_dump(mode="json", exclude=NO_EFFECT),
        "files": list(hashes.items()),
    }
    try:
        return find_entry(cache_folder(section.cache_dir), Path(next(iter(hashes))).name, parts), ""
    except NotCacheableError as error:
        return None, f"not used: {error}"


def find_entry(folder: Path, label: str, parts: dict[str, Any]) -> CacheEntry:
    """The entry of everything that decides the rows.

    Args:
        folder: of the cache.
        label: for people, such as the data file's name.
        parts: plain values, and objects that `describe` knows.
    Raises:
        NotCacheableError: one of them has no exact description.
    """
    described = describe({**parts, "code": own_code_hash(), "versions": library_versions()})
    key = hashlib.sha256(canonical(described).encode()).hexdigest()
    safe = re.sub(r"[^\w.-]", "_", label)[:40]
    return CacheEntry(folder / f"{safe}-{key[:KEY_CHARS]}{SUFFIX}")


def entries(folder: Path) -> list[Path]:
    """All cache files, and what killed processes left, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (SUFFIX, TEMPORARY))


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another run removed it just now
        return 0.0


# ---- what decides the rows, as plain values


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
    if path.stat().st_mtime > psutil.Process().create_time():
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
