"""What all routes share: submit a job, wait for it, end it when its client goes away."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, HTTPException, Request

from trainer.server.jobs import Job, JobQueue, KeyReusedError, QueueFullError
from trainer.server.weights import WeightsRefusedError

IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200)]
DISCONNECT_POLL_S = 0.2
RETRY_AFTER = {"Retry-After": "2"}


class Service:
    """What the routes share: the queue and the model's name."""

    def __init__(self, queue: JobQueue, model_id: str) -> None:
        """Take the parts; the queue runs with the app's lifespan."""
        self.queue, self.model_id = queue, model_id

    def submit(self, operation: str, body: Any, key: str | None = None) -> Job:
        """Put a job into the queue, or answer 422 (key reused), 429 or 503."""
        if not self.queue.is_ready:
            raise HTTPException(503, "the engine is being restarted", RETRY_AFTER)
        try:
            return self.queue.submit(operation, body, key)
        except KeyReusedError:
            raise HTTPException(422, "this Idempotency-Key named another request") from None
        except QueueFullError:
            raise HTTPException(429, "the queue is full", RETRY_AFTER) from None

    async def answer(self, request: Request, job: Job) -> dict[str, Any]:
        """Wait for a job; a client that goes away cancels it."""
        while not job.done.is_set():
            await self.queue.wait(job, DISCONNECT_POLL_S)
            if not job.done.is_set() and await request.is_disconnected():
                self.queue.cancel(job)
                raise HTTPException(499, "the client went away")
        if job.status != "done":
            if job.code == 409:
                raise WeightsRefusedError(409, "not_active", job.error or job.status)
            headers = RETRY_AFTER if job.code in (429, 503) else None
            raise HTTPException(job.code, job.error or job.status, headers)
        assert job.result is not None, "a job that is done has a result"
        return job.result

    async def load(self, body: dict[str, Any]) -> None:
        """Swap weights, to the end: a swap that has begun does not care who is still there."""
        job = self.submit("load_weights", body)
        await job.done.wait()
        if job.status != "done":
            raise HTTPException(job.code, job.error, RETRY_AFTER if job.code == 503 else None)

    def check_model(self, name: str | None) -> None:
        """Answer 404 for a model that is not the loaded one."""
        if name not in (None, self.model_id):
            raise HTTPException(404, f"no model {name!r}; this server has {self.model_id!r}")
