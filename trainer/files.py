"""Files that are whole or not there: written so that nobody sees half of one, read with a limit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from trainer.errors import OutputError

# ---- writing and reading the small files of a run so that nobody ever sees half of one
#
# Safe against readers at any instant and against the process being killed. Not against a power cut:
# nothing here waits for the disk, because these files are written between two training steps.


CHECKPOINTS_NAME = "checkpoints"

STATUS_NAME = "status.json"

LOCK = ".lock"
"""File that the process which runs in a folder holds a lock on."""

SAVED_BASE = "base_model"
"""Folder in a run's folder, for the base of an adapter that is on no disk and no hub."""

STEP_NAME = re.compile(r"^step-(\d{8})$")

BLOCK = 64 * 1024
"""Bytes read at a time when the end of a cut line is looked for."""


def replace_file(
    path: Path,
    content: str | Iterable[bytes | memoryview],
    *,
    mode: int = 0o666,
    tag: str | None = None,
    is_synced: bool = False,
) -> None:
    """Put `content`, a text or pieces of bytes, in the place of a file at one instant.

    Args:
        tag: part of the temporary name that no other writer of this file has; None: the process's
            number, which is enough where one machine and one thread write it.
        is_synced: wait until the content is on the disk, before the name is.
        mode: who may read it, less what the process's umask takes away; 0o600 for secrets.
    Raises:
        OSError: it could not be written; the old file is whole and no temporary one is left.
    """
    pieces: Iterable[bytes | memoryview]
    pieces = [content.encode("utf-8")] if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{tag or os.getpid()}.tmp")
    try:
        # "x" would trip over what a killed process with our number left behind.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.writelines(pieces)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a signal's KeyboardInterrupt too
        remove_quietly(temporary)
        raise


def remove_quietly(path: Path) -> None:
    """Remove a file that may be gone already or out of reach."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the caller is about to report the failure that led here


def remove_stale(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left behind."""
    prefix, suffix = f".{path.name}.", ".tmp"
    for found in path.parent.glob(".*" + suffix):
        owner = found.name.removeprefix(prefix).removesuffix(suffix)
        if found.name.startswith(prefix) and owner.isdecimal() and not is_alive(int(owner)):
            remove_quietly(found)


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    return bool(psutil.pid_exists(pid))


def append_lines(path: Path, text: str) -> None:
    """Add whole lines with one write; a cut last line (a kill, a full disk) is removed first.

    Raises:
        OSError: not all lines were added; the last one may be cut.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        _drop_cut_line(descriptor)
        data = text.encode("utf-8")
        if os.write(descriptor, data) < len(data):  # a full disk takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _drop_cut_line(descriptor: int) -> None:
    """Shorten a file to its whole lines."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - BLOCK)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            end = start + position + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def read_whole_lines(path: Path) -> list[bytes]:
    """The lines of a file at one instant, without line feeds; a cut last line is left out.

    Raises:
        FileNotFoundError: there is no file.
    """
    return path.read_bytes().split(b"\n")[:-1]


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


STAGING_NAME = re.compile(r"^\.tmp-step-\d{8}-(\d+)$")
"""Of a checkpoint that is being written, by the process of this number."""


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of which a run's `checkpoints/` has one, in order; whether it is whole is not seen."""
    if not root.is_dir():
        return []
    names = (STEP_NAME.match(path.name) for path in root.iterdir())
    return sorted(int(found[1]) for found in names if found)


# ---- reading small JSON files that somebody else may have written: capped, no links or pipes


MAX_BYTES = 16 << 20


def read_regular_file(path: Path, most: int = MAX_BYTES) -> bytes | None:
    """The bytes of a regular file; None when there is none, it is a link, or it is too large."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            return None
        return os.read(descriptor, most)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None when there is none or it is something else."""
    data = read_regular_file(path)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def require_folder(path: Path, advice: str) -> Path:
    """A folder that somebody named, as it is.

    Raises:
        OutputError: there is none, or it is something else; the message ends with `advice`.
    """
    if not path.is_dir():
        found = "not a folder" if path.exists() else "no such folder"
        raise OutputError(f"{path}: {found}; {advice}")
    return path


def canonical_hash(value: Any) -> str:
    """sha256 of JSON values with sorted keys, no spaces and ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_dir() -> Path:
    """$ULTIMATE_TRAINER_CACHE, else `ultimate-trainer` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("ULTIMATE_TRAINER_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ultimate-trainer"


# ---- the operations of a save, each through one door, so that tests can stop at every one
#
# `before_operation` is None in normal use. A test sets it to a function of (operation, path) and
# kills the process in it: every state that a crash can leave behind is reached in this way.


before_operation: Callable[[str, Path], None] | None = None

HASH_CHUNK = 1 << 20


def announce(operation: str, path: Path) -> None:
    """Say that an operation is about to be done."""
    if before_operation is not None:
        before_operation(operation, path)


def make_dir(path: Path) -> None:
    """Create a folder and its parents."""
    announce("mkdir", path)
    path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in two halves, so that a crash between them is a state of its own."""
    half = len(text) // 2
    announce("create", path)
    with path.open("w", encoding="utf-8") as file:
        file.write(text[:half])
        file.flush()
        announce("write", path)
        file.write(text[half:])
        file.flush()


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Within the block, a file that safetensors or torch cannot write is an OSError like any."""
    from safetensors import SafetensorError

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
    announce("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Wait until a folder's names are on the disk; not every file system can."""
    announce("fsync_dir", path)
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
    announce("replace", target)
    os.replace(source, target)


def remove_tree(path: Path) -> None:
    """Remove a folder, file by file, its manifest first: half a folder must not look whole."""
    names = sorted(path.rglob("*"), key=lambda p: (p.name != "manifest.json", -len(p.parts)))
    for name in names:
        announce("remove", name)
        name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink()
    announce("rmdir", path)
    shutil.rmtree(path, ignore_errors=False)


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    announce("hash", path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- a stream whose troubles never reach training


logger = logging.getLogger(__name__)


class SafeStream(io.TextIOBase):
    """A text stream that never fails: odd characters become `?`, a closed reader means silence."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream, which stays open."""
        self.stream = stream
        self._is_broken = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of what is wrapped."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what the encoding can hold of a text."""
        if not self._is_broken:
            safe = text.encode(self.encoding, "replace").decode(self.encoding)
            self._attempt(lambda: self.stream.write(safe))
        return len(text)

    def flush(self) -> None:
        """Flush what is wrapped."""
        if not self._is_broken:
            self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        """Whether a terminal is wrapped."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The number of the file that is wrapped."""
        return self.stream.fileno()

    def line(self, text: str) -> None:
        """Write one line and flush it."""
        self.write(text + "\n")
        self.flush()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: closed by its owner
            self._is_broken = True
            logger.warning(
                "the terminal output broke off (%s); nothing more is written to it", error
            )


# ---- whole folders


FAILED = "free some space or choose another folder."


@contextlib.contextmanager
def staged(folder: Path, *, advice: str = FAILED) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end of the block, or leaves no trace.

    Raises:
        OutputError: it cannot be written; the message ends with `advice`.
    """
    staging = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        if folder.exists():  # of the interrupted run that this one resumed
            shutil.rmtree(folder)
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(f"{folder}: cannot save the model ({error}); {advice}") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
