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
from trainer.monitoring.events import printable
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
    run: str | None = None
    """What the run is called on the server, which several runs may share."""
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
    return f"{ended}; {_left_words(reader)}"


def _left_words(reader: RunReader) -> str:
    """How the weights of a run that ended can be asked."""
    is_final = (reader.folder / FINAL_MODEL).is_dir()
    if not (is_final or reader.last_checkpoint_step()):
        return "it left no weights"
    folder = shlex.quote(str(reader.folder))
    asked = f"ask its weights with: trainer chat {folder}"
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


def check_own(worker: WorkerAddress, reply: ServerAnswer, reader: RunReader) -> None:
    """Refuse an answer by weights of another run that shares the server.

    Raises:
        PreviewError: the weights are known to be of a run, and not known to be of this one.
    """
    if reply.run is None or reply.run == worker.run:
        return
    with reader.lock:  # weights that an earlier start of this run published under another name
        lines = reader.previews.timelines.values()
        own = {one.weights_id for line in lines for one in line.results()}
    if reply.weights_id is None or reply.weights_id not in own:
        instead = "ask again when this run has sent its own at its next preview step"
        if reader.is_over or reader.is_lost():
            instead = f"this run has ended; {_left_words(reader)}"
        step = f", step {reply.step}" if reply.step is not None else ""
        raise PreviewError(
            f"the server at {worker.url} holds the weights of another run now "
            f"({printable(reply.run, 100)}{step}), so its answer is not shown; {instead}"
        )


def whose_words(reply: ServerAnswer, reader: RunReader, *, is_final: bool = False) -> str:
    """Which weights of the run answered.

    Args:
        is_final: those without a step are its final model.
    """
    weights = f"weights {reply.weights_id[:12]}" if reply.weights_id else "unnamed weights"
    if reply.step is None and is_final:
        return f"Answered by {FINAL_MODEL} ({weights})."
    if reply.step is None:
        return f"Answered by {weights}; the worker does not report their step."
    now = reader.step
    words = f"Answered by the weights of step {reply.step} ({weights})"
    if now == reply.step:
        return f"{words}."
    is_over = reader.is_over or reader.is_lost()
    return f"{words}; {'the run ended' if is_over else 'training is'} at step {now}."


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
