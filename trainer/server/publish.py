"""Routes for weights and for previews under exactly these weights."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Path, Query, Request
from pydantic import BaseModel

from trainer.preview.wire import (
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
from trainer.server.service import IdempotencyKey, Service
from trainer.server.upload import Upload

UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
KEPT_BATCHES = 200


class PreviewBatches(BaseModel):
    """`GET /previews`: what was answered to a run since."""

    previews: list[PreviewsResult]


def add_weight_routes(app: FastAPI, service: Service) -> None:
    """Offer, parts, state, commit."""
    queue, store = service.queue, service.store

    def state(upload: Upload, *, committed: bool = False) -> WeightsState:
        held = store.holds(upload.weights_id)
        return WeightsState(
            upload_id=upload.id,
            weights_id=upload.weights_id,
            have=[entry.name for entry in upload.offer.manifest.tensors] if held else [],
            committed=committed,
            parts=sorted(upload.parts),
        )

    @app.post("/weights", responses=documented(409, 422, 429, 503))
    async def offer(body: WeightsOffer) -> WeightsState:
        upload = store.offer(body)
        if upload.weights_id != queue.active["weights_id"]:
            return state(upload)
        # Equal weights: nothing is sent, only the step moves.
        store.drop(upload)
        store.name(body.run, body.step, upload.weights_id)
        queue.active |= {"run": body.run, "step": body.step}
        return state(upload, committed=True)

    @app.get("/weights/{upload_id}", responses=documented(404, 422))
    @app.head("/weights/{upload_id}", include_in_schema=False)
    async def upload_state(upload_id: UploadId) -> WeightsState:
        return state(store.find(upload_id))

    @app.put(
        "/weights/{upload_id}/parts/{number}",
        responses=documented(404, 409, 422, 507),
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
        return state(upload)

    @app.post("/weights/{upload_id}/commit", responses=documented(404, 409, 422, 429, 503, 507))
    async def commit(upload_id: UploadId) -> WeightsState:
        upload = store.find(upload_id)
        upload.seal()
        try:
            path = await asyncio.to_thread(store.verify, upload)
            body = store.load_body(upload, path)
            await service.load(body)
        except BaseException:
            upload.is_sealed = False  # to be sent or committed again
            raise
        store.committed(upload, body)
        return state(upload, committed=True)


def add_active_route(app: FastAPI, service: Service) -> None:
    """Go back to one of the last committed weight sets."""

    @app.post("/models/set_active", responses=documented(404, 409, 422, 429, 503))
    async def set_active(body: SetActive) -> ModelState:
        known = service.store.tags.get(body.weights_id)
        if known is None:
            raise HTTPException(404, "these weights are not kept; publish them again")
        await service.load(known)
        return service.state()


def add_preview_routes(app: FastAPI, service: Service) -> None:
    """A batch under pinned weights, and what was answered since."""
    batches: list[dict[str, Any]] = []

    @app.post("/previews", responses=documented(409, 422, 429, 500, 503))
    async def previews(
        body: PreviewsRequest, request: Request, idempotency_key: IdempotencyKey = None
    ) -> PreviewsResult:
        service.check_ready()
        is_active = body.weights_id == service.queue.active["weights_id"]
        if not is_active and body.weights_id not in service.store.tags:
            raise WeightsRefusedError(
                409, "not_active", "these weights are not the active ones; publish them first"
            )
        # Where another trainer's weights are active, this one's are put back in the same breath.
        needs = {"weights_id": body.weights_id, "run": body.run, "step": body.step}
        sent = body.model_dump(mode="json")
        job = service.submit("previews", sent, idempotency_key, needs=needs)
        found = await service.answer(request, job)
        if not found["seq"]:  # a retried request is answered, not listed twice
            found["seq"] = batches[-1]["seq"] + 1 if batches else 1
            batches.append(found)
            del batches[:-KEPT_BATCHES]
        return PreviewsResult.model_validate(found)

    @app.get("/previews", responses=documented(422))
    async def since(run: Run, after: Annotated[int, Query(ge=0)] = 0) -> PreviewBatches:
        found = [batch for batch in batches if batch["run"] == run and batch["seq"] > after]
        return PreviewBatches.model_validate({"previews": found})
