"""`/metrics` in the Prometheus text format; a registry of its own for every app."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from trainer.server.jobs import JobQueue
from trainer.server.problems import documented


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
