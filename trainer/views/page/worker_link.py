"""Asking the worker of a run: what `worker.json` says, and one prompt over HTTP.

A run folder may come from somebody else, so its worker.json is trusted with nothing but this
machine: other hosts are asked only when whoever started the monitor named them, and no key is read
but from files that runs of this user were started with.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import ConfigError, PreviewError
from trainer.exchange import BoundedClient
from trainer.files import is_alive, read_json_object
from trainer.net import (
    KEY_VARIABLE,
    is_loopback,
    is_own_key_file,
    key_with_scope,
    read_key_file,
)
from trainer.preview.base import ServerAnswer
from trainer.views.run_reader import RunReader

WORKER_NAME = "worker.json"

FINAL_MODEL = "final_model"

TIMEOUT_S = 120.0


class WorkerAddress(BaseModel):
    """What a run says of its worker."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    key_file: str | None = None
    backend: str = "sidecar"
    model_id: str | None = None
    system_prompt: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class WorkerState:
    """The worker, or why there is none to ask."""

    worker: WorkerAddress | None
    reason: str = ""


def find_worker(folder: Path, allowed_hosts: Collection[str] = ()) -> WorkerState:
    """Read RUN/worker.json.

    Args:
        allowed_hosts: hosts besides this machine that may be asked.
    """
    path = folder / WORKER_NAME
    if not path.is_file():
        return WorkerState(None, "the run names no preview server")
    try:
        worker = WorkerAddress.model_validate(read_json_object(path))
        parts = urlsplit(worker.url)
        host, port = parts.hostname or "", parts.port
    except (ValidationError, ValueError):
        return WorkerState(None, f"{WORKER_NAME} is not a valid worker file")
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.username:
        return WorkerState(None, f"{WORKER_NAME} names no usable address")
    if not is_loopback(host) and host not in allowed_hosts:
        return WorkerState(
            None,
            f"the worker is on {host}; start the monitor with --allow-worker {host} to ask it",
        )
    if worker.key_file is not None and not is_own_key_file(worker.key_file):
        # Its content would be sent to whatever listens at the address beside it.
        if KEY_VARIABLE not in os.environ:
            return WorkerState(
                None,
                f"{WORKER_NAME} names a key file that no run or server of yours was started with "
                f"({worker.key_file}); give the server's key in {KEY_VARIABLE} to ask it",
            )
        worker = worker.model_copy(update={"key_file": None})
    if is_loopback(host) and worker.pid is not None and not is_alive(worker.pid):
        return WorkerState(None, "the run's worker has ended")
    return WorkerState(worker)


def absence_words(reader: RunReader) -> str:
    """Why a run without worker.json can answer nobody, and who can, with the command to copy."""
    backend = reader.config_value("monitoring", "preview_backend")
    if reader.state() not in ("completed", "stopped", "failed", "lost"):
        if backend in ("sidecar", "remote_3090"):
            return f"the run's preview server ({backend}) is not ready yet"
        if backend == "openai":
            return "the server that makes this run's previews does not have this run's weights"
        return (
            "previews of this run are made in the training process, which takes no other prompts; "
            "a run with --preview-backend sidecar can be asked while it trains"
        )
    ended = "the run has ended"
    if backend == "sidecar":
        ended += ", and its sidecar with it"
    has_weights = (reader.folder / FINAL_MODEL).is_dir() or reader.last_checkpoint_step()
    if not has_weights:
        return f"{ended}; it left no weights"
    folder = shlex.quote(str(reader.folder))
    asked = f"{ended}; ask its weights with: trainer chat {folder}"
    is_final = (reader.folder / FINAL_MODEL).is_dir()
    return f"{asked}, or here after: trainer monitor {folder} --ask" if is_final else asked


def ask_worker(
    worker: WorkerAddress, prompt: str, *, max_new_tokens: int = 256, temperature: float = 0.0
) -> ServerAnswer:
    """Ask one prompt; blocks until it is answered.

    Raises:
        PreviewError: no answer, in words for people.
    """
    body = {
        "prompt": prompt,
        "system_prompt": worker.system_prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
    if worker.model_id is not None:
        body["model_id"] = worker.model_id
    client = BoundedClient(
        worker.url,
        _key_of(worker),
        timeout_s=TIMEOUT_S,
        timeout_name="the page's own limit",
        is_patient=False,
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        status, found = client.call("POST", "/generate", deadline, body)
        return ServerAnswer.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PreviewError(
            f"{worker.url}: HTTP {status}, but no answer to a prompt ({first['msg']})"
        ) from error
    finally:
        client.close()


def _key_of(worker: WorkerAddress) -> str | None:
    """The key that may generate: of the run's file, else of the environment.

    Raises:
        PreviewError: the file holds no key.
    """
    if worker.key_file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return key_with_scope(read_key_file(worker.key_file, "the worker's key file "), "generate")
    except ConfigError as error:
        raise PreviewError(str(error)) from error
