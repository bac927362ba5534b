"""WorkerClient: what a trainer asks of a preview server: who are you, take these weights, answer.

Runs in the publisher process, and once at start in the trainer, to tell a misconfigured server
(which stops the run) from one that is merely away (which does not). No torch here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.counts import counted
from trainer.errors import ConfigError, PreviewError
from trainer.exchange import AwayError, BoundedClient, KeyRefusedError, RefusedError
from trainer.net import KEY_VARIABLE
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import (
    PART_BYTES,
    PreviewsRequest,
    PreviewsResult,
    ServerHashes,
    WeightsManifest,
    WeightsState,
)

MAX_ANSWER = 64 << 20

PIECE_BYTES = 1 << 20
"""httpx sends an iterator of such pieces several times faster than one large bytes object."""

COMMIT_TIMEOUT_S = 600.0
"""A server may have to verify and load many GB."""

Transport = Literal["dir", "http"]


class ServerInfo(BaseModel):
    """The part of `GET /info` that a trainer reads."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_id: str | None = None
    """None: the server was started without a model and waits to be told which."""
    config_hash: str | None = None
    tokenizer_hash: str | None = None
    chat_template_hash: str | None = None
    dtype_option: str = "auto"
    scope: str = "publish"
    """What the key may do; an older server does not say."""
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pushed:
    """What a publication did."""

    weights_id: str
    bytes_sent: int
    """0 when the server had these weights."""


class WorkerClient:
    """One preview server."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        run: str,
        transport: Transport,
        timeout_s: float,
        weights_dir: Path | None = None,
        template_date: str | None = None,
    ) -> None:
        """Take where the server is; nothing is sent yet.

        Args:
            run: name of this run on the server.
            timeout_s: for each exchange but uploads and commits.
            weights_dir: with transport `dir`: the folder that the server reads from.
            template_date: ISO date that the run's chat template prints; None: it prints none.
        """
        self.template_date = template_date
        self.run, self.transport, self.weights_dir = run, transport, weights_dir
        self.timeout_s = timeout_s
        self.http = BoundedClient(
            url,
            key,
            timeout_s=timeout_s,
            timeout_name="monitoring.remote_3090_timeout",
            max_answer=MAX_ANSWER,
            key_variable=f"monitoring.remote_3090_key_file or {KEY_VARIABLE}",
        )

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def _ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = 0.0) -> Any:
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        return self.http.call(method, path, deadline, body)[1]

    # ---- at start

    def check(
        self, hashes: ServerHashes, profile: str, model: str = "", quantize: str | None = None
    ) -> ServerInfo:
        """Ask the server who it is, and compare.

        Args:
            model: alias or hub id that a server without a model is told to load.
            quantize: `nf4`: the run's base is quantized, and so must the server's be.
        Raises:
            ConfigError: it wants another key, holds another model or tokenizer, does not know the
                profile, or is no preview server.
            AwayError: nobody is there.
        """
        try:
            info = ServerInfo.model_validate(self._ask("GET", "/info"))
            if info.scope != "publish":
                raise ConfigError(
                    f"{self.http.url}: the key of this run has the scope {info.scope}, and a run "
                    "publishes its weights; give the key that stands behind `publish:` in the "
                    "server's key file, by monitoring.remote_3090_key_file or "
                    f"{self.http.key_variable}."
                )
            if info.model_id is None and info.config_hash is None:
                info = self._register(model, quantize)
        except (AwayError, ConfigError):
            raise
        except KeyRefusedError as error:
            raise ConfigError(str(error)) from error
        except (PreviewError, ValidationError) as error:
            raise ConfigError(
                f"{self.http.url} does not answer as a preview server of this program does "
                f"({' '.join(str(error).split())[:200]}); start one there with `trainer serve`, or "
                "correct monitoring.remote_3090_host and remote_3090_port."
            ) from error
        self._compare(info, hashes, profile, quantize)
        return info

    def _register(self, model: str, quantize: str | None) -> ServerInfo:
        """Tell a server that waits for a model which one it is.

        Raises:
            ConfigError: it cannot or may not load that model.
        """
        body = {"model": model} if quantize is None else {"model": model, "quantize": quantize}
        try:
            self._ask("POST", "/models/register", body, timeout_s=COMMIT_TIMEOUT_S)
        except RefusedError as error:
            raise ConfigError(
                f"the preview server at {self.http.url} was started without a model and cannot "
                f"load {model!r} ({' '.join(str(error).split())[:300]}); start it there with "
                f"`trainer serve --model ...{f' --quantize {quantize}' if quantize else ''}`."
            ) from error
        return ServerInfo.model_validate(self._ask("GET", "/info"))

    def _compare(
        self, info: ServerInfo, hashes: ServerHashes, profile: str, quantize: str | None
    ) -> None:
        others = [
            words
            for name, words in (
                ("config_hash", "another architecture"),
                ("tokenizer_hash", "another tokenizer"),
                ("chat_template_hash", "another chat template"),
            )
            if getattr(info, name) != getattr(hashes, name)
        ]
        if others:
            raise ConfigError(
                f"the preview server at {self.http.url} holds {info.model_id!r}, which has "
                f"{' and '.join(others)}; start it with the model that is trained "
                f"(trainer serve --model ...{f' --quantize {quantize}' if quantize else ''})."
            )
        if profile not in info.profiles:
            raise ConfigError(
                f"profile.name={profile}: the preview server at {self.http.url} knows only "
                f"{', '.join(info.profiles)}; install the package that brings the profile there."
            )

    # ---- weights

    def publish(self, file: WeightFile, step: int, manifest: WeightsManifest) -> Pushed:
        """Make these weights the server's active ones; equal weights send nothing.

        Raises:
            AwayError: the server is away or went away; what has arrived there stays for a retry.
            RefusedError: it does not take them.
        """
        body = {
            "manifest": manifest.model_dump(mode="json"),
            "run": self.run,
            "step": step,
            "transport": self.transport,
        }
        if self.template_date is not None:
            body["template_date"] = self.template_date
        state = self._state(self._ask("POST", "/weights", body), manifest)
        if state.committed:
            return Pushed(manifest.weights_id, 0)
        sent = 0
        if not state.have:
            sent = self._send(file, state, manifest.weights_id)
        path = f"/weights/{state.upload_id}/commit"
        done = self._state(self._ask("POST", path, timeout_s=COMMIT_TIMEOUT_S), manifest)
        if not done.committed:
            raise PreviewError(f"{self.http.url} answered a commit without committing.")
        return Pushed(manifest.weights_id, sent)

    def _state(self, found: Any, manifest: WeightsManifest) -> WeightsState:
        try:
            state = WeightsState.model_validate(found)
        except ValidationError as error:
            raise PreviewError(
                f"{self.http.url} answered an offer of weights with something else."
            ) from error
        if state.weights_id != manifest.weights_id:
            raise PreviewError(f"{self.http.url} answered an offer with another weights_id.")
        if not state.upload_id.isalnum():
            raise PreviewError(f"{self.http.url} gave an upload id that is none.")
        return state

    def _send(self, file: WeightFile, state: WeightsState, weights_id: str) -> int:
        """The file's bytes, by the transport; returns how many went over it."""
        size = file.path.stat().st_size
        if self.transport == "dir":
            assert self.weights_dir is not None, "transport dir has a folder"
            target = self.weights_dir / f"{weights_id}.safetensors"
            # A second name for the same file: the trainer's map of it stays valid.
            target.unlink(missing_ok=True)
            os.link(file.path, target)
            return size
        sent = 0
        for number in range(-(-size // PART_BYTES)):
            if number in state.parts:
                continue
            start = number * PART_BYTES
            length = min(PART_BYTES, size - start)
            headers = {"content-length": str(length), "X-Part-SHA256": _digest(file, start, length)}
            deadline = time.monotonic() + COMMIT_TIMEOUT_S
            self.http.call(
                "PUT",
                f"/weights/{state.upload_id}/parts/{number}",
                deadline,
                pieces=_pieces(file.path, start, length),
                headers=headers,
            )
            sent += length
        return sent

    # ---- previews

    def previews(
        self, request: PreviewsRequest, *, timeout_s: float, part: int = 0
    ) -> PreviewsResult:
        """Answers of exactly these weights to exactly these prompts.

        Args:
            part: which batch of prompts of this step it is.

        Raises:
            AwayError: the server is away, restarting or too slow.
            RefusedError: it cannot answer; status 409 when the weights are no longer there.
            PreviewError: the answer is not one to this request: nothing of it may be shown.
        """
        deadline = time.monotonic() + timeout_s
        # A retry after a broken connection is answered from what was made before.
        key = f"{request.run}-{request.step}-{request.weights_id[:32]}"
        key += f"-{part}" if part else ""
        headers = {"Idempotency-Key": key}
        body = request.model_dump(mode="json")
        _, found = self.http.call("POST", "/previews", deadline, body, headers=headers)
        try:
            result = PreviewsResult.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise PreviewError(
                f"{self.http.url} sent previews of another shape ({where}: {first['msg']})."
            ) from error
        check_identity(request, result)
        return result


def check_identity(request: PreviewsRequest, result: PreviewsResult) -> None:
    """Refuse answers that are not those of the weights, step and prompts that were asked for.

    Raises:
        PreviewError: naming what differs.
    """
    wrong = [
        f"{name} {getattr(result, name)!r} instead of {getattr(request, name)!r}"
        for name in ("weights_id", "run", "step")
        if getattr(result, name) != getattr(request, name)
    ]
    if len(result.results) != len(request.prompts):
        wrong.append(
            f"{counted(len(result.results), 'answer')} to {counted(len(request.prompts), 'prompt')}"
        )
    for asked, answer in zip(request.prompts, result.results, strict=False):
        if answer.prompt_id != asked.prompt_id:
            wrong.append(f"prompt {answer.prompt_id!r} instead of {asked.prompt_id!r}")
        if answer.step != request.step or answer.weights_id not in (None, request.weights_id):
            wrong.append(f"an answer of step {answer.step}, weights {answer.weights_id}")
    if wrong:
        raise PreviewError(
            f"mismatch, not shown: the preview server answered with {'; '.join(wrong[:3])}"
        )


def _digest(file: WeightFile, start: int, length: int) -> str:
    found = hashlib.sha256()
    for piece in _pieces(file.path, start, length):
        found.update(piece)
    return found.hexdigest()


def _pieces(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0:
            piece = file.read(min(PIECE_BYTES, length))
            yield piece
            length -= len(piece)
