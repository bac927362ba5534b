"""Files of rows behind an address: `https://`, `s3://`, `gs://`, `hf://` and what fsspec knows."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from trainer.data.data_files import DataFile, Position
from trainer.errors import ConfigError, DataError
from trainer.net import CUT, hub_answers, hub_is_offline, is_cut, name_without_secrets

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

PACKAGES = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
}
"""Scheme -> the package that reads it, and the extra of this program that brings it."""

LOCAL = ("file", "local", "memory")
"""Schemes that ask no other machine."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 20.0, 60.0
"""Of a web server: to answer, and between two pieces of an answer."""

BLOCK_BYTES = 4 * 2**20
"""Asked for at once from a store."""

VERSIONS = (
    "ETag",
    "etag",
    "VersionId",
    "generation",
    "md5Hash",
    "Content-MD5",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
"""What stores say of a file that is another one when its bytes are."""


def scheme_of(name: str) -> str:
    """`s3` of `s3://bucket/rows.jsonl`; nothing of a path."""
    found = SCHEME.match(name)
    return found[1].lower() if found else ""


class RemoteReadError(OSError):
    """An address cannot be read; says why, without a secret."""


@dataclass(frozen=True)
class Place:
    """Where an address leads: a file, a folder or a pattern of a store."""

    address: str
    """With its secrets."""

    @property
    def scheme(self) -> str:
        """Lower case."""
        return scheme_of(self.address)

    @property
    def name(self) -> str:
        """The address as it may be shown."""
        return name_without_secrets(self.address)

    def store(self) -> Any:
        """fsspec's file system of this address.

        Raises:
            DataError: there is none, or its package is not installed.
        """
        # Takes a quarter of a second to load, and most data lies in files.
        import fsspec  # type: ignore[import-untyped]

        scheme, options = self.scheme, {}
        if scheme in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
                )
            }
        try:
            return fsspec.filesystem(scheme, **options)
        except ImportError as error:
            package, extra = PACKAGES.get(scheme, ("", ""))
            how = f"pip install 'ultimate-trainer[{extra}]'" if package else str(error)
            raise DataError(
                f"{self.name}: {scheme}:// needs {f'the package {package}' if package else 'more'}"
                f" ({how})."
            ) from None
        except ValueError:
            raise DataError(
                f"{self.name}: {scheme}:// is not known; known are a path, https://, s3://, gs://, "
                "hf:// and what fsspec and its packages read."
            ) from None
        except Exception as error:  # a store that is not set up: no key, no project
            raise DataError(f"{self.name}: {_why(self.address, error)}.") from None

    def path(self, store: Any) -> str:
        """The address as the store wants it."""
        path: str = store._strip_protocol(self.address)
        return path

    def refuse_offline(self, *, offline: bool) -> None:
        """Ask nobody where that is forbidden or hopeless.

        Raises:
            DataError: it is.
        """
        is_hub = self.scheme == "hf"
        if self.scheme in LOCAL:
            return
        if offline or (is_hub and hub_is_offline()):
            why = "environment.offline=true" if offline else "HF_HUB_OFFLINE"
            raise DataError(
                f"{self.name}: is on another machine, and {why} forbids asking it. Fetch the file "
                "first and give its path."
            )
        if is_hub and not hub_answers():
            raise DataError(
                f"{self.name}: the hub does not answer. Fetch the file first and give its path."
            )


@contextmanager
def _told(address: str) -> Iterator[None]:
    """What a store raises, as one kind of error whose words hold no secret."""
    try:
        yield
    except (RemoteReadError, DataError):
        raise
    except Exception as error:  # what clients of stores raise has no common class
        raise RemoteReadError(_why(address, error)) from None


def _why(address: str, error: BaseException) -> str:
    """In a few words; a client's own error is what it was raised from."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    first = cause or error
    status = getattr(first, "status", None)
    if status:
        return f"the server answered {status} {getattr(first, 'message', '')}".strip()
    if "Timeout" in type(first).__name__ or isinstance(first, TimeoutError):
        return "no answer in time"
    if isinstance(first, FileNotFoundError):
        return "there is no such file"
    words = " ".join(str(first).split()) or type(first).__name__
    for secret in _secrets(address):
        words = words.replace(secret, CUT)
    words = re.sub(r"\w+://[^\s'\",)>]+", lambda found: name_without_secrets(found[0]), words)
    return words[:300]


def _secrets(address: str) -> list[str]:
    """Texts of an address that nobody may see, the longest first."""
    if not is_cut(name_without_secrets(address)):
        return []
    parts = urlsplit(address)
    user, _, _ = parts.netloc.rpartition("@")
    found = {address, parts.query, user, *user.split(":")}
    found |= {value for pair in parts.query.split("&") for value in [pair.partition("=")[2]]}
    found |= {unquote(text) for text in found}
    return sorted((text for text in found if len(text) > 2), key=len, reverse=True)


@dataclass
class RemoteFile(DataFile):
    """A file behind an address."""

    place: Place
    position: Position = field(default_factory=Position, repr=False, compare=False)
    _info: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its address as it may be shown."""
        return self.place.name

    def open(self) -> IO[bytes]:
        """Its bytes as they are stored."""
        with _told(self.place.address):
            store = self.place.store()
            path, size = self.place.path(store), self.size()
            if self.place.scheme in ("http", "https"):
                # In one piece: servers that cannot do ranges say so late or not at all.
                file = store.open(path, "rb", block_size=0, size=size)
            else:
                file = store.open(path, "rb", block_size=BLOCK_BYTES)
        raw = _Checked(file, self.place, size)
        self.position.handle = raw
        return io.BufferedReader(raw, BLOCK_BYTES)

    def size(self) -> int | None:
        """In bytes; None where the store does not say."""
        size = self.info().get("size")
        return None if size is None else int(size)

    def info(self, *, is_new: bool = False) -> Mapping[str, Any]:
        """What the store says of it.

        Args:
            is_new: ask again.
        Raises:
            RemoteReadError: it is not there, or the store does not answer.
        """
        if self._info is None or is_new:
            with _told(self.place.address):
                store = self.place.store()
                store.invalidate_cache()
                self._info = store.info(self.place.path(store))
            if self._info.get("type") == "directory":
                raise RemoteReadError("it is a folder, not a file")
        return self._info

    def content_hash(self) -> str:
        """sha256 of what its store says of its version, else of its bytes."""
        info = self.info(is_new=True)
        version = {key: str(info[key]) for key in VERSIONS if info.get(key)}
        if not version:
            return super().content_hash()
        parts = json.dumps([info.get("size"), version], sort_keys=True)
        return f"version:{hashlib.sha256(parts.encode()).hexdigest()}"

    def check(self) -> None:
        """See that it is there."""
        try:
            self.info()
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error}).") from None


class _Checked(io.RawIOBase):
    """The bytes of a remote file, with errors in words, and an end that is the file's own."""

    def __init__(self, file: Any, place: Place, size: int | None) -> None:
        self._file, self._place, self._size = file, place, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._place.scheme not in ("http", "https")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("this server's files are read from start to end")
        with _told(self._place.address):
            self._at = self._file.seek(offset, whence)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        with _told(self._place.address):
            found = self._file.read(len(buffer))
        if not found and self._size is not None and self._at < self._size:
            raise RemoteReadError(f"it ended after {self._at:,} of {self._size:,} bytes")
        self._at += len(found)
        if self._size is not None and self._at > self._size:
            raise RemoteReadError(f"it has more than its {self._size:,} bytes: it was changed")
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


# ---- folders and patterns of a store


def remote_files(address: str, *, offline: bool) -> tuple[str, dict[str, RemoteFile]]:
    """What an address names.

    Returns:
        What it is (`file`, `folder` or `pattern`), and its files by the names that they have in it;
        one that is a file has its own name.
    Raises:
        ConfigError: it was written down without its secret.
        DataError: offline, no such place, or the store does not answer.
    """
    place = Place(address)
    if is_cut(address):
        raise ConfigError(
            f"data: {place.name} was written down without its password or key, which stands "
            "nowhere; give the address again by --dataset or by TRAINER_DATA__DATASET_PATH."
        )
    place.refuse_offline(offline=offline)
    if place.scheme in ("http", "https"):
        if "*" in urlsplit(address).path:
            raise DataError(
                f"{place.name}: a web server has no list of files; name each, with commas between."
            )
        return "file", {posixpath.basename(urlsplit(address).path): RemoteFile(place)}
    try:
        with _told(address):
            return _listed(place)
    except OSError as error:
        raise DataError(f"{place.name}: cannot be read ({error}).") from None


def _listed(place: Place) -> tuple[str, dict[str, RemoteFile]]:
    store = place.store()
    store.invalidate_cache()
    path = place.path(store)
    if re.search(r"[*?\[]", path) and not store.exists(path):
        root, what = re.split(r"[*?\[]", path)[0].rpartition("/")[0], "pattern"
        found = store.glob(path, detail=True)
    elif store.isdir(path):
        root, what, found = path, "folder", store.find(path, detail=True)
    else:
        return "file", {posixpath.basename(path): RemoteFile(place, _info=store.info(path))}
    return what, {
        name.removeprefix(root).lstrip("/"): RemoteFile(
            Place(store.unstrip_protocol(name)), _info=info
        )
        for name, info in sorted(found.items())
        if info.get("type") != "directory"
    }
