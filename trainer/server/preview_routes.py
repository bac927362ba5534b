"""Routes for weights and for previews under exactly these weights."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Path, Query, Request
from pydantic import BaseModel

from trainer.publish.wire import (
    Digest,
    ModelState,
    PreviewsRequest,
    PreviewsResult,
    Run,
    SetActive,
    WeightsOffer,
    WeightsState,
)
from trainer.server.problems import WeightsRefusedError, documented
from trainer.server.service import IdempotencyKey, Service, client_of
from trainer.server.upload import Upload
from trainer.server.weight_store import WeightStore

UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]

UPLOAD_LINKS = {
    name: {"operationId": name, "parameters": {"upload_id": "$response.body#/upload_id"}}
    for name in ("weights_part", "weights_commit", "weights_state", "weights_drop")
}
"""What can be done with an offer that was taken, for clients that read the description."""

KEPT_BATCHES = 200

KEPT_BYTES = 32 << 20


class PreviewBatches(BaseModel):
    """`GET /previews`: what was answered to a run since."""

    previews: list[PreviewsResult]


def add_weight_routes(app: FastAPI, service: Service) -> None:
    """Offer a weight set, ask for its state, drop it."""
    queue, store = service.queue, service.store

    @app.post(
        "/weights", responses={**documented(409, 422, 429, 503), 200: {"links": UPLOAD_LINKS}}
    )
    async def offer(body: WeightsOffer) -> WeightsState:
        weights_id = store.check(body)
        is_active = weights_id == queue.active["weights_id"]
        if not (is_active and store.is_same_day(body, weights_id)):
            return _state(store, store.offer(body, weights_id))
        # Equal weights: nothing is sent, only the step moves.
        queue.active = store.name(body.run, body.step, weights_id)
        upload_id = secrets.token_hex(16)
        store.finish(upload_id, weights_id)
        return _finished(upload_id, weights_id)

    @app.get("/weights/{upload_id}", responses=documented(404, 422), operation_id="weights_state")
    @app.head("/weights/{upload_id}", include_in_schema=False)
    async def upload_state(upload_id: UploadId) -> WeightsState:
        known = store.finished.get(upload_id)
        return (
            _state(store, store.find(upload_id)) if known is None else _finished(upload_id, known)
        )

    @app.delete(
        "/weights/{upload_id}",
        status_code=204,
        responses=documented(404, 409, 422),
        operation_id="weights_drop",
    )
    async def drop(upload_id: UploadId) -> None:
        upload = store.find(upload_id)
        if upload.is_sealed:
            raise WeightsRefusedError(409, "committing", "this upload is being committed")
        store.drop(upload)


def add_upload_routes(app: FastAPI, service: Service) -> None:
    """Send the parts of an offer, and commit it."""
    store = service.store

    @app.put(
        "/weights/{upload_id}/parts/{number}",
        responses=documented(404, 409, 413, 422, 507),
        operation_id="weights_part",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"format": "binary"}}},
            }
        },
    )
    async def part(
        upload_id: UploadId,
        number: Annotated[int, Path(ge=0, lt=2**20)],
        request: Request,
        x_part_sha256: Annotated[Digest, Header()],
    ) -> WeightsState:
        upload = store.find(upload_id)
        await upload.put(number, x_part_sha256, request.stream())
        return _state(store, upload)

    @app.post(
        "/weights/{upload_id}/commit",
        responses=documented(404, 409, 422, 429, 503, 507),
        operation_id="weights_commit",
    )
    async def commit(upload_id: UploadId) -> WeightsState:
        known = store.finished.get(upload_id)
        if known is None or known not in store.loads:  # else the first answer was lost
            known = await _commit(service, store.find(upload_id))
        return _finished(upload_id, known)


async def _commit(service: Service, upload: Upload) -> str:
    """Verify an upload and load it into the engine; gives its weights_id."""
    store = service.store
    upload.seal()
    try:
        path = await asyncio.to_thread(store.verify, upload)
        body = store.load_body(upload, path)
        await service.load(body, upload.tag)
    except (WeightsRefusedError, HTTPException) as error:
        status = error.status if isinstance(error, WeightsRefusedError) else error.status_code
        if status == 422:
            store.failed(upload)
        raise
    finally:
        upload.is_sealed = False  # to be sent or committed again
        upload.touch()
    store.committed(upload, body)
    return upload.weights_id


def _state(store: WeightStore, upload: Upload) -> WeightsState:
    held = store.holds(upload.weights_id)
    return WeightsState(
        upload_id=upload.id,
        weights_id=upload.weights_id,
        have=[entry.name for entry in upload.offer.manifest.tensors] if held else [],
        parts=sorted(upload.parts),
    )


def _finished(upload_id: str, weights_id: str) -> WeightsState:
    return WeightsState(upload_id=upload_id, weights_id=weights_id, committed=True)


def add_active_route(app: FastAPI, service: Service) -> None:
    """Go back to one of the last committed weight sets."""

    @app.post("/models/set_active", responses=documented(404, 409, 422, 429, 503))
    async def set_active(body: SetActive) -> ModelState:
        known = service.store.loads.get(body.weights_id)
        if known is None:
            raise HTTPException(
                404, "this server no longer keeps these weights; publish them again"
            )
        await service.load(known, service.store.tags[body.weights_id])
        return service.state()


class _Batches:
    """The last batches that were answered, bounded in number and in bytes."""

    def __init__(self) -> None:
        self.found: deque[tuple[dict[str, Any], int]] = deque()
        self.num_bytes = self.seq = 0

    def add(self, found: dict[str, Any], num_bytes: int) -> None:
        """Number a batch and list it, once."""
        if found["seq"]:
            return  # a retried request is answered, not listed twice
        self.seq += 1
        found["seq"] = self.seq
        self.found.append((found, num_bytes))
        self.num_bytes += num_bytes
        while len(self.found) > KEPT_BATCHES or (
            self.num_bytes > KEPT_BYTES and len(self.found) > 1
        ):
            self.num_bytes -= self.found.popleft()[1]

    def since(self, run: str, after: int) -> list[dict[str, Any]]:
        """Batches of a run behind a number."""
        return [one for one, _ in self.found if one["run"] == run and one["seq"] > after]


def add_preview_routes(app: FastAPI, service: Service) -> None:
    """A batch under pinned weights, and what was answered since."""
    batches = _Batches()

    @app.post("/previews", responses=documented(409, 422, 429, 500, 503, 504))
    async def previews(
        body: PreviewsRequest, request: Request, idempotency_key: IdempotencyKey = None
    ) -> PreviewsResult:
        service.check_ready()
        tag = service.store.tag(body.weights_id, body.run, body.step)
        if tag is None:
            raise WeightsRefusedError(
                409, "not_active", "this server does not hold these weights; publish them first"
            )
        # Run and step are those under which the weights were published, whatever a client says.
        # Weights that nobody published have none: the answer is the client's alone, not listed.
        is_published = tag["run"] is not None
        if is_published:
            body = body.model_copy(update={"run": tag["run"], "step": tag["step"]})
        sent = body.model_dump_json().encode()
        job = service.submit(
            "previews", sent, idempotency_key, needs=tag, client=f"{client_of(request)} {body.run}"
        )
        found = await service.answer(request, job)
        if is_published:
            batches.add(found, job.result_bytes)
        return PreviewsResult.model_validate(found)

    @app.get("/previews", responses=documented(422))
    async def since(run: Run, after: Annotated[int, Query(ge=0)] = 0) -> PreviewBatches:
        return PreviewBatches.model_validate({"previews": batches.since(run, after)})
