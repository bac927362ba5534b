"""The routes. State comes in through `create_app`; every wait here is asynchronous."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel

from trainer import __version__
from trainer.guard import Guard
from trainer.profiles import known_profiles
from trainer.publish.wire import GenerateRequest, GenerateResult, ModelState, RegisterModel
from trainer.server.auth import KEY_SCOPE, KeyDoor, guarded
from trainer.server.completions import add_openai_routes
from trainer.server.inference_process import EngineProcess
from trainer.server.job_book import Job
from trainer.server.job_queue import REQUEST_TIMEOUT_S, JobQueue
from trainer.server.preview_routes import (
    add_active_route,
    add_preview_routes,
    add_upload_routes,
    add_weight_routes,
)
from trainer.server.problems import add_problem_handlers, documented
from trainer.server.service import RETRY_AFTER, IdempotencyKey, Origin, Service, client_of
from trainer.server.weight_store import KEPT_SETS, WeightStore


def add_metrics_route(app: FastAPI, queue: JobQueue) -> None:
    """Gauges that are read from the queue when they are asked for."""
    registry = CollectorRegistry()
    for name, text, read in (
        ("queued_jobs", "Jobs that wait for the engine.", lambda: queue.waiting),
        ("ready", "1 when the engine takes jobs.", lambda: int(queue.is_ready)),
        ("engine_restarts", "Engine processes that died.", lambda: queue.restarts),
        ("jobs_done", "Jobs that were answered.", lambda: queue.ended["done"]),
        ("jobs_failed", "Jobs that failed.", lambda: queue.ended["failed"]),
        ("jobs_cancelled", "Jobs nobody waited for.", lambda: queue.ended["cancelled"]),
        ("weights_step", "Step of the active weights, -1 for none.", lambda: _step(queue)),
    ):
        Gauge(f"trainer_serve_{name}", text, registry=registry).set_function(read)

    @app.get("/metrics", response_class=PlainTextResponse, responses=documented())
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _step(queue: JobQueue) -> int:
    step = queue.active["step"]
    return -1 if step is None else int(step)


# ---- the routes. State comes in through `create_app`; every wait here is asynchronous


JobId = Annotated[str, PathParameter(pattern=r"^job-[0-9a-f]{24}$")]


class Health(BaseModel):
    """`GET /health`."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """`GET /ready`."""

    ready: Literal[True] = True


class Version(BaseModel):
    """`GET /version`."""

    version: str = __version__


class Active(BaseModel):
    """Whose weights answer now."""

    weights_id: str | None
    run: str | None
    step: int | None


class Info(BaseModel):
    """`GET /info`; the hashes and the device are None while there is no model."""

    version: str = __version__
    model_id: str | None
    device: str | None
    dtype: Literal["bf16", "fp32", "fp16"] | None
    """In which the active weights are held and computed with."""
    dtype_option: str
    """`--dtype`: with `bf16`, weights of another dtype are refused."""
    active: Active
    queued: int
    scope: Literal["generate", "publish"]
    """What the key of this request may do."""
    profiles: list[str]
    engine_restarts: int
    config_hash: str | None
    tokenizer_hash: str | None
    chat_template_hash: str | None


class Models(BaseModel):
    """`GET /models`: the one model, or none."""

    models: list[ModelState]


class JobState(BaseModel):
    """A job and what became of it."""

    job_id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    result: GenerateResult | None = None
    error: str | None = None


def create_app(
    engine: EngineProcess,
    *,
    keys: dict[str, str],
    store_dir: Path,
    host: str = "127.0.0.1",
    weights_dir: Path | None = None,
    num_kept: int = KEPT_SETS,
    origin: Origin | None = None,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
) -> Guard:
    """Build the ASGI app round an engine that is started, or has no model yet.

    Args:
        keys: keys with their scope; empty: no key is asked for.
        store_dir: private folder for uploads.
        weights_dir: folder of transport `dir`; None: refused.
        num_kept: weight sets that can be made active again.
        origin: of the weights that the server begins with.
        request_timeout_s: longest time that the engine spends on one request.
    """
    store = WeightStore(store_dir, weights_dir, num_kept=num_kept)
    service = Service(engine, store, origin=origin, request_timeout_s=request_timeout_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield
        engine.stop()

    app = FastAPI(
        title="ultimate-trainer",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    add_problem_handlers(app)
    _add_status_routes(app, service)
    _add_generate_routes(app, service)
    add_weight_routes(app, service)
    add_upload_routes(app, service)
    add_active_route(app, service)
    add_preview_routes(app, service)
    add_openai_routes(app, service)
    add_metrics_route(app, service.queue)
    names = frozenset({host.lower(), socket.gethostname().lower(), "localhost"})
    return guarded(KeyDoor(app, keys), names)


def _add_status_routes(app: FastAPI, service: Service) -> None:
    queue = service.queue

    @app.get("/health", responses=documented())
    async def health() -> Health:
        return Health()

    @app.get("/ready", responses=documented(503))
    async def ready() -> Ready:
        service.check_ready()
        if queue.active["weights_id"] is None:
            raise HTTPException(503, "waiting for the first weights of a trainer", RETRY_AFTER)
        return Ready()

    @app.get("/version", responses=documented())
    async def version() -> Version:
        return Version()

    @app.get("/info", responses=documented())
    async def info(request: Request) -> Info:
        hello = queue.engine.hello if service.model_id is not None else {}
        manifest = hello.get("manifest", {})
        return Info(
            model_id=service.model_id,
            device=hello.get("device"),
            dtype=hello.get("dtype"),
            dtype_option=queue.engine.dtype,
            active=Active(**service.active()),
            queued=queue.waiting,
            scope=request.scope[KEY_SCOPE],
            profiles=known_profiles(),
            engine_restarts=queue.restarts,
            config_hash=manifest.get("config_hash"),
            tokenizer_hash=manifest.get("tokenizer_hash"),
            chat_template_hash=manifest.get("chat_template_hash"),
        )

    @app.get("/models", responses=documented())
    async def models() -> Models:
        return Models(models=[service.state()] if service.model_id is not None else [])

    @app.get("/models/active", responses=documented())
    async def active() -> ModelState:
        return service.state()

    @app.post("/models/register", responses=documented(409, 422))
    async def register(body: RegisterModel) -> ModelState:
        await service.register(body.model, body.quantize)
        return service.state()


def _add_generate_routes(app: FastAPI, service: Service) -> None:
    queue = service.queue

    @app.post(
        "/generate",
        response_model=GenerateResult,
        responses={**documented(404, 409, 422, 429, 500, 503, 504), 202: {"model": JobState}},
    )
    async def generate(
        body: GenerateRequest,
        request: Request,
        wait: Annotated[int, Query(ge=0, le=1)] = 1,
        idempotency_key: IdempotencyKey = None,
    ) -> Any:
        service.check_ready()
        needs = service.find_weights(body.model_id)
        sent = b'{"request":%s,"samples":1}' % body.model_dump_json().encode()
        job = service.submit(
            "generate", sent, idempotency_key, needs=needs, client=client_of(request)
        )
        if not wait:
            job.is_polled = True
            return JSONResponse(state(job).model_dump(exclude_unset=True), 202)
        return plain(await service.answer(request, job))

    def plain(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name != "samples"}

    def state(job: Job) -> JobState:
        found = job.public()
        if "result" in found:
            found["result"] = plain(found["result"])
        return JobState.model_validate(found)

    def find(job_id: str) -> Job:
        job = queue.book.jobs.get(job_id)
        if job is None or job.operation != "generate":
            raise HTTPException(404, "no such job; the last 512 are kept")
        return job

    @app.get("/jobs/{job_id}", responses=documented(404, 422), response_model_exclude_unset=True)
    async def job_state(job_id: str, wait: Annotated[float, Query(ge=0, le=60)] = 0) -> JobState:
        job = find(job_id)
        await queue.wait(job, wait)
        return state(job)

    @app.delete("/jobs/{job_id}", responses=documented(404, 422), response_model_exclude_unset=True)
    async def cancel(job_id: JobId) -> JobState:
        job = find(job_id)
        queue.cancel(job)
        return state(job)
