"""The routes. State comes in through `create_app`; every wait here is asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from trainer import __version__
from trainer.preview.wire import GenerateRequest, WeightsManifest
from trainer.profiles import known_profiles
from trainer.server.auth import Guard
from trainer.server.jobs import Job, JobQueue
from trainer.server.metrics import add_metrics_route
from trainer.server.openai import add_openai_routes
from trainer.server.publish import add_active_route, add_preview_routes, add_weight_routes
from trainer.server.service import RETRY_AFTER, IdempotencyKey, Service
from trainer.server.weights import KEPT_SETS, WeightStore
from trainer.server.worker import EngineProcess


def create_app(
    engine: EngineProcess,
    model_id: str,
    *,
    keys: dict[str, str],
    store_dir: Path,
    host: str = "127.0.0.1",
    weights_dir: Path | None = None,
    num_kept: int = KEPT_SETS,
) -> Any:
    """Build the ASGI app round a started engine.

    Args:
        keys: keys with their scope; empty: no key is asked for.
        store_dir: private folder for uploads.
        weights_dir: folder of transport `dir`; None: refused.
        num_kept: weight sets that can be made active again.
    """
    service = Service(JobQueue(engine), model_id)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner = asyncio.create_task(service.queue.run())
        yield
        runner.cancel()
        engine.stop()

    app = FastAPI(title="ultimate-trainer", version=__version__, docs_url=None, redoc_url=None)
    app.router.lifespan_context = lifespan
    app.state.service = service

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # The input is left out: it may be large, and it is the client's own anyway.
        problems = [
            f"{'.'.join(map(str, item['loc'][1:])) or 'body'}: {item['msg']}"
            for item in error.errors()[:20]
        ]
        return JSONResponse({"detail": "; ".join(problems), "code": "invalid"}, 422)

    _add_status_routes(app, service)
    _add_generate_routes(app, service)
    expected = WeightsManifest.model_validate(engine.hello["manifest"])
    store = WeightStore(
        store_dir,
        weights_dir,
        expected,
        original_id=engine.hello["weights_id"],
        num_kept=num_kept,
    )
    add_weight_routes(app, service, store)
    add_active_route(app, service, store)
    add_preview_routes(app, service, store)
    add_openai_routes(app, service)
    add_metrics_route(app, service.queue)
    names = frozenset({host.lower(), socket.gethostname().lower(), "localhost"})
    return Guard(app, keys=keys, hosts=names)


def _add_status_routes(app: FastAPI, service: Service) -> None:
    queue = service.queue

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        if not queue.is_ready:
            raise HTTPException(503, "the engine is being restarted", RETRY_AFTER)
        if queue.active["weights_id"] is None:
            raise HTTPException(503, "waiting for the first weights of a trainer", RETRY_AFTER)
        return {"ready": True}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        manifest = queue.engine.hello["manifest"]
        return {
            "version": __version__,
            "model_id": service.model_id,
            "device": queue.engine.hello["device"],
            "active": queue.active,
            "queued": queue.waiting,
            "profiles": known_profiles(),
            "engine_restarts": queue.restarts,
            **{
                name: manifest[name]
                for name in ("config_hash", "tokenizer_hash", "chat_template_hash")
            },
        }

    @app.get("/models")
    async def models() -> dict[str, Any]:
        return {"models": [{"model_id": service.model_id, **queue.active}]}

    @app.get("/models/active")
    async def active() -> dict[str, Any]:
        return {"model_id": service.model_id, **queue.active}


def _add_generate_routes(app: FastAPI, service: Service) -> None:
    queue = service.queue

    @app.post("/generate", response_model=None)
    async def generate(
        body: GenerateRequest,
        request: Request,
        wait: Annotated[int, Query(ge=0, le=1)] = 1,
        idempotency_key: IdempotencyKey = None,
    ) -> Any:
        service.check_model(body.model_id)
        job = service.submit("generate", body.model_dump(mode="json"), idempotency_key)
        if not wait:
            return JSONResponse(job.public(), 202)
        return await service.answer(request, job)

    def find(job_id: str) -> Job:
        job = queue.jobs.get(job_id)
        if job is None:
            raise HTTPException(404, "no such job; the last 512 are kept")
        return job

    @app.get("/jobs/{job_id}")
    async def job_state(
        job_id: str, wait: Annotated[float, Query(ge=0, le=60)] = 0
    ) -> dict[str, Any]:
        job = find(job_id)
        await queue.wait(job, wait)
        return job.public()

    @app.delete("/jobs/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        job = find(job_id)
        queue.cancel(job)
        return job.public()
