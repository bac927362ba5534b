"""The file operations of a save, each through one door, so that tests can stop at every one.

`before_operation` is None in normal use. A test sets it to a function of (operation, path) and
kills the process in it: every state that a crash can leave behind is reached in this way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

before_operation: Callable[[str, Path], None] | None = None

HASH_CHUNK = 1 << 20


def _announce(operation: str, path: Path) -> None:
    if before_operation is not None:
        before_operation(operation, path)


def make_dir(path: Path) -> None:
    """Create a folder and its parents."""
    _announce("mkdir", path)
    path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in two halves, so that a crash between them is a state of its own."""
    half = len(text) // 2
    _announce("create", path)
    with path.open("w", encoding="utf-8") as file:
        file.write(text[:half])
        file.flush()
        _announce("write", path)
        file.write(text[half:])
        file.flush()


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Within the block, a file that safetensors or torch cannot write is an OSError like any."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"safetensors: {error}") from error
    except RuntimeError as error:
        # torch's writer of zip files; it has no error class of its own.
        if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter")):
            raise
        raise OSError(f"torch could not write all of a file: {error}") from error


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    _announce("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Wait until a folder's names are on the disk; not every file system can."""
    _announce("fsync_dir", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network and Windows-backed file systems refuse fsync on folders; the rename is
        # atomic there as well, only its durability after a power cut is theirs to give.
        return
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename; on one file system this happens whole or not at all."""
    _announce("replace", target)
    os.replace(source, target)


def remove_tree(path: Path) -> None:
    """Remove a folder, file by file, its manifest first: half a folder must not look whole."""
    names = sorted(path.rglob("*"), key=lambda p: (p.name != "manifest.json", -len(p.parts)))
    for name in names:
        _announce("remove", name)
        name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink()
    _announce("rmdir", path)
    shutil.rmtree(path, ignore_errors=False)


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    _announce("hash", path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
