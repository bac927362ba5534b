"""A name of `data.dataset_path` -> its files: one, those of a folder, or those of a pattern."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trainer.data.data_files import KINDS, PACKINGS, DataFile, LocalFile, kind_of
from trainer.data.remote_files import remote_files, scheme_of
from trainer.errors import DataError

TRAIN_WORDS = frozenset({"train", "training"})

OTHER_WORDS = frozenset({"test", "testing", "val", "valid", "validation", "dev", "eval"})
"""Words in the names of files that are not trained on where others say `train`."""

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
"""What `save_to_disk` of the `datasets` library writes beside its Arrow files."""

MAX_NAMED = 5


@dataclass(frozen=True)
class Found:
    """The files of one name, in the order in which they are read."""

    files: tuple[DataFile, ...]
    left_out: tuple[str, ...] = ()
    """Files of a folder that are of no known kind, and folders that a pattern names."""


def find_files(name: str, *, offline: bool = False) -> Found:
    """The files that a path, an address, a folder or a pattern names.

    Args:
        name: as it stands in `data.dataset_path`, secrets included.
        offline: ask no other machine.
    Raises:
        ConfigError: an address was written down without its secret.
        DataError: there are none, or it cannot be told which are meant.
    """
    scheme = scheme_of(name)
    if scheme in ("file", "local"):
        name = re.sub(r"^\w+://", "", name)
    elif scheme:
        what, remote = remote_files(name, offline=offline)
        if what == "file":
            return Found(tuple(remote.values()))
        shown = name.partition("://")[0] + "://..." if "@" in name else name
        return _of_many(shown, what, remote, [])
    path = Path(name)
    if path.is_dir():
        return _of_many(name, "folder", *_listed(path))
    if path.exists() or not glob.has_magic(name):
        return Found((LocalFile(path),))
    found = sorted(glob.glob(name, recursive=True))
    root = os.path.commonpath(found) if len(found) > 1 else os.path.dirname(name)
    files = {os.path.relpath(one, root or "."): LocalFile(Path(one)) for one in found}
    folders = [f"{one} (a folder)" for one in found if os.path.isdir(one)]
    return _of_many(
        name,
        "pattern",
        {key: file for key, file in files.items() if not file.path.is_dir()},
        folders,
    )


def _listed(folder: Path) -> tuple[dict[str, LocalFile], list[str]]:
    """All files below a folder by their names in it; nothing whose name begins with a dot.

    Raises:
        DataError: a folder in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error

    files: dict[str, LocalFile] = {}
    folders: list[str] = []
    for place, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = sorted(one for one in inner if not one.startswith("."))
        # Where a link leads can be above it, without an end.
        folders += [
            f"{Path(place, one)} (a link to a folder)"
            for one in inner
            if Path(place, one).is_symlink()
        ]
        for one in names:
            path = Path(place, one)
            if not one.startswith("."):
                files[path.relative_to(folder).as_posix()] = LocalFile(path)
    return dict(sorted(files.items())), folders


def _of_many(name: str, what: str, files: Mapping[str, DataFile], folders: Sequence[str]) -> Found:
    """Those of the files that are of rows.

    Args:
        name: of the folder or pattern.
        what: `folder` or `pattern`.
        files: by their names in it, sorted.
        folders: what else is there.
    """
    left_out = list(folders)
    if what == "folder":
        files = _without_saved(name, files)
        known = {key: file for key, file in files.items() if is_of_rows(key)}
        left_out += [str(file) for key, file in files.items() if key not in known]
        files = known
    if not files:
        others = f" (there are {_few(left_out)})" if left_out else ""
        why = "matches no file" if what == "pattern" else "holds no file of rows"
        raise DataError(
            f"{name}: {why}{others}. Files of rows end in {', '.join(KINDS)}; text kinds also with "
            f"{', '.join(PACKINGS)} behind."
        )
    _refuse_splits(name, files)
    return Found(tuple(files.values()), tuple(left_out))


def is_of_rows(name: str) -> bool:
    """Whether a file in a folder is one of rows, by its ending."""
    return kind_of(name) in KINDS


def _few(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


# ---- what must not be read as rows of one data set


def _refuse_splits(name: str, files: Mapping[str, DataFile]) -> None:
    """Names that say `train` beside names that say `test`: not one set of rows.

    Raises:
        DataError: there are both.
    """
    trained = [key for key in files if _words(key) & TRAIN_WORDS]
    others = [key for key in files if _words(key) & OTHER_WORDS and key not in trained]
    if trained and others:
        raise DataError(
            f"{name}: holds files to train on ({_few(trained)}) and others that seem to be held "
            f"out ({_few(others)}). Name those that are to be trained on, with commas between or "
            "by a pattern, and the others in data.validation_path."
        )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _without_saved(name: str, files: Mapping[str, DataFile]) -> dict[str, DataFile]:
    """The files, where folders of `save_to_disk` have no other than those of their rows.

    Raises:
        DataError: such a folder holds several splits, or lacks a file.
    """
    kept = dict(files)
    for key in [key for key in files if PurePosixPath(key).name == SPLITS]:
        splits = _json(files[key], "splits")
        if len(splits) > 1:
            named = ", ".join(f"{name.rstrip('/')}/{_beside(key, str(one))}" for one in splits)
            raise DataError(f"{name}: holds several splits; name one of them: {named}.")
        del kept[key]
    for key in [key for key in files if PurePosixPath(key).name == STATE]:
        folder = _beside(key, "")
        if f"{folder}{INFO}" not in files:
            continue
        names = [f"{folder}{one['filename']}" for one in _json(files[key], "_data_files") if one]
        lost = [one for one in names if one not in files]
        if lost:
            raise DataError(
                f"{name}: {files[key]} names {_few(lost)}, which is not there; copy the folder "
                "again, whole."
            )
        # Arrow files that it does not name are left from earlier `map` calls.
        own = {f"{folder}{STATE}", f"{folder}{INFO}"} | {
            one for one in kept if _beside(one, "") == folder and kind_of(one) == ".arrow"
        }
        kept = {one: file for one, file in kept.items() if one not in own or one in names}
    return kept


def _beside(key: str, name: str) -> str:
    folder = key.rpartition("/")[0]
    return f"{folder}/{name}" if folder else name


def _json(file: DataFile, key: str) -> list[dict[str, str]]:
    try:
        with file.open() as stored:
            found: list[dict[str, str]] = list(json.load(stored)[key])
            return found
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: is not what `save_to_disk` writes ({error!r}); save the data set again."
        ) from error
