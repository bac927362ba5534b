"""What all routes share: submit a job, wait for it, end it when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Header, HTTPException, Request

from trainer.errors import ModelError
from trainer.models import TINY, resolve_alias
from trainer.publish.wire import ModelState, WeightsManifest
from trainer.server.inference_process import EngineProcess
from trainer.server.job_book import Job, KeyReusedError
from trainer.server.job_queue import REQUEST_TIMEOUT_S, JobQueue, QueueFullError
from trainer.server.problems import WeightsRefusedError
from trainer.server.weight_store import WeightStore

logger = logging.getLogger(__name__)

IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200)]

DISCONNECT_POLL_S = 0.2

RETRY_AFTER = {"Retry-After": "2"}

SWEEP_S = 30.0


@dataclass(frozen=True)
class Origin:
    """Of which run and step the weights are that a server begins with; None: not known."""

    run: str | None = None
    step: int | None = None


class Service:
    """What the routes share: the queue, the weight store, and the model's name."""

    def __init__(
        self,
        engine: EngineProcess,
        store: WeightStore,
        *,
        origin: Origin | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Take the parts; the queue runs with the app's lifespan.

        Args:
            engine: started, or without a model: then it waits to be told which.
            origin: of the weights that the engine loads by itself.
            request_timeout_s: longest time that the engine spends on one request.
        """
        self.engine, self.store, self.origin = engine, store, origin or Origin()
        self.queue = JobQueue(engine, store.loads.get, request_timeout_s=request_timeout_s)
        self.model_id: str | None = None
        self.is_loading = False
        self._noted_runs = {self.origin.run}
        if engine.hello:
            self._take_model()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve the queue, watch the engine and expire uploads, for the length of the block."""
        tasks = [
            asyncio.create_task(work)
            for work in (self.queue.run(), self.queue.watch(), self._sweep())
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.store.expire()

    # ---- the model

    def _take_model(self) -> None:
        assert self.engine.model_path is not None, "a started engine has a model"
        hello = self.engine.hello
        manifest = WeightsManifest.model_validate(hello["manifest"])
        self.store.expect(manifest, hello["weights_id"], is_bf16_only=self.engine.dtype == "bf16")
        self.model_id = public_name(self.engine.model_path)
        self.queue.engine_started()

    async def register(self, name: str, quantize: str | None) -> None:
        """Load a model into a server that has none; the same one again changes nothing.

        Args:
            quantize: `nf4`: quantize it, unless the server was told so at its start.
        Raises:
            HTTPException: 409 another one is there, 422 a path or a model that does not load.
        """
        if self.model_id == name:
            return
        if self.model_id is not None or self.is_loading:
            held = self.model_id or "another one, which is being loaded"
            raise HTTPException(409, f"this server already has a model: {held}")
        path = resolve_alias(name)
        if path != TINY and ("/" not in path or _is_path(path)):
            raise HTTPException(
                422, "give an alias (see `trainer models`) or a hub id owner/name; never a path"
            )
        own = self.engine.quantize
        self.engine.model_path, self.is_loading = name, True
        self.engine.quantize = own or quantize
        try:
            # Shielded: a model that is half loaded helps nobody, whoever is still there.
            await asyncio.shield(asyncio.to_thread(self.engine.start))
            self._take_model()
        except ModelError as error:
            logger.error("%s was registered and cannot be loaded: %s", name, error)
            self.engine.model_path, self.engine.quantize = None, own
            self.engine.stop()
            raise HTTPException(
                422,
                f"{name} cannot be loaded; see the server's log. Is the hub reachable?",
            ) from error
        finally:
            self.is_loading = False

    def state(self) -> ModelState:
        """The model and its active weights."""
        return ModelState(model_id=self.model_id, **self.active())

    def active(self) -> dict[str, Any]:
        """Active weights, and of which run and step they are: as published, else as served."""
        found = dict(self.queue.active)
        own = self.engine.hello.get("weights_id")
        if found["run"] is None and own is not None and found["weights_id"] == own:
            found |= {"run": self.origin.run, "step": self.origin.step}
        return found

    def find_weights(self, name: str | None) -> dict[str, Any] | None:
        """The weights that a model name asks for; None: the active ones.

        Raises:
            HTTPException: 404, nothing of that name is here.
        """
        if name in (None, self.model_id):
            return None
        assert name is not None, "checked above"
        found = self.store.names.get(name)
        if found is None:
            held = self.model_id or "no model yet"
            raise HTTPException(404, f"no model {name!r}; this server has {held}, see /v1/models")
        return found

    # ---- jobs

    def check_ready(self) -> None:
        """Answer 503 where no job can be taken."""
        if self.model_id is None:
            state = "loading the model" if self.is_loading else "waiting for a model"
            raise HTTPException(503, state, RETRY_AFTER)
        if not self.queue.is_ready:
            raise HTTPException(503, "the engine is being restarted", RETRY_AFTER)

    def submit(self, operation: str, body: bytes, key: str | None = None, **more: Any) -> Job:
        """Put a job into the queue, or answer 422 (key reused), 429 or 503."""
        self.check_ready()
        try:
            return self.queue.submit(operation, body, key, **more)
        except KeyReusedError:
            raise HTTPException(422, "this Idempotency-Key was used for another request") from None
        except QueueFullError:
            raise HTTPException(429, "the queue is full", RETRY_AFTER) from None

    async def answer(self, request: Request, job: Job) -> dict[str, Any]:
        """Wait for a job; the last of its clients that goes away cancels it."""
        job.waiters += 1
        try:
            while not job.done.is_set():
                await self.queue.wait(job, DISCONNECT_POLL_S)
                if not job.done.is_set() and await request.is_disconnected():
                    raise HTTPException(499, "the client went away")
        finally:
            self.queue.leave(job)
        return result_of(job)

    async def texts(self, request: Request, job: Job) -> AsyncIterator[tuple[int, str]]:
        """Pieces of a streamed answer while it is made; a client that goes away cancels it."""
        assert job.texts is not None, "submitted with is_streamed"
        waiting = asyncio.ensure_future(job.texts.get())
        try:
            while not await request.is_disconnected():
                done, _ = await asyncio.wait([waiting], timeout=DISCONNECT_POLL_S)
                if done:
                    found = waiting.result()
                    if found is None:
                        return
                    yield found
                    waiting = asyncio.ensure_future(job.texts.get())
        finally:
            waiting.cancel()
            self.queue.cancel(job)  # does nothing where the job has ended

    async def load(self, body: dict[str, Any], tag: dict[str, Any]) -> None:
        """Swap weights, to the end: a swap that has begun does not care who is still there.

        Args:
            tag: weights_id, run and step that are the active ones afterwards.
        """
        sent = json.dumps(body).encode()
        job = self.submit("load_weights", sent, needs=tag, client=str(tag["run"]))
        await job.done.wait()
        result_of(job)
        self._note_run(str(tag["run"]))

    def _note_run(self, run: str) -> None:
        """Say once of each run that its weights took the place of those of the run served here."""
        if self.origin.run is None or run in self._noted_runs:
            return
        self._noted_runs.add(run)
        logger.warning(
            "%s is answered with the weights of the run %s now, which publishes here; it was "
            "started with those of %s, step %s (POST /models/set_active with %s brings them back)",
            self.model_id,
            run,
            self.origin.run,
            self.origin.step,
            self.engine.hello.get("weights_id"),
        )


def client_of(request: Request) -> str:
    """Who shares the engine with others: the address that asks."""
    return request.client.host if request.client is not None else ""


def result_of(job: Job) -> dict[str, Any]:
    """The result of a job that has ended, or its error as an answer."""
    if job.status != "done":
        if job.code == 409:
            raise WeightsRefusedError(409, "not_active", job.error or job.status)
        headers = RETRY_AFTER if job.code in (429, 503) else None
        raise HTTPException(job.code, job.error or job.status, headers)
    assert job.result is not None, "a job that is done has a result"
    return job.result


def public_name(model: str) -> str:
    """The name that clients know a model by: of a folder its last part, never where it lies."""
    if resolve_alias(model) != TINY and _is_path(model):
        model = Path(model).resolve().name
    return re.sub(r"[^A-Za-z0-9._@:/-]", "-", model).lstrip("._@:/-")[:200] or "model"


def _is_path(name: str) -> bool:
    is_written_so = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return is_written_so or name.lower().endswith(".gguf") or Path(name).exists()
