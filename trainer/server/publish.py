"""Routes for weights and for previews under exactly these weights."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Path, Query, Request
from fastapi.responses import JSONResponse

from trainer.preview.wire import Digest, PreviewsRequest, Run, SetActive, WeightsOffer, WeightsState
from trainer.server.service import RETRY_AFTER, IdempotencyKey, Service
from trainer.server.weights import Upload, WeightsRefusedError, WeightStore

UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
KEPT_BATCHES = 200


def add_weight_routes(app: FastAPI, service: Service, store: WeightStore) -> None:
    """Offer, parts, state, commit."""
    queue = service.queue

    @app.exception_handler(WeightsRefusedError)
    async def _refused(_: Request, error: WeightsRefusedError) -> JSONResponse:
        body: dict[str, Any] = {"detail": str(error), "code": error.code}
        if error.bad:
            body["bad"] = error.bad
        headers = RETRY_AFTER if error.status == 429 else None
        return JSONResponse(body, error.status, headers=headers)

    def state(upload: Upload, *, committed: bool = False) -> WeightsState:
        held = upload.weights_id in store.sets
        return WeightsState(
            upload_id=upload.id,
            weights_id=upload.weights_id,
            have=[entry.name for entry in upload.offer.manifest.tensors] if held else [],
            committed=committed,
            parts=sorted(upload.parts),
        )

    @app.post("/weights")
    async def offer(body: WeightsOffer) -> WeightsState:
        upload = store.offer(body)
        if upload.weights_id != queue.active["weights_id"]:
            return state(upload)
        # Equal weights: nothing is sent, only the step moves.
        store.drop(upload)
        queue.active |= {"run": body.run, "step": body.step}
        return state(upload, committed=True)

    @app.get("/weights/{upload_id}")
    @app.head("/weights/{upload_id}", include_in_schema=False)
    async def upload_state(upload_id: UploadId) -> WeightsState:
        return state(store.find(upload_id))

    @app.put("/weights/{upload_id}/parts/{number}")
    async def part(
        upload_id: UploadId,
        number: Annotated[int, Path(ge=0, lt=2**20)],
        request: Request,
        x_part_sha256: Annotated[Digest, Header()],
    ) -> WeightsState:
        upload = store.find(upload_id)
        await store.put_part(upload, number, x_part_sha256, request.stream())
        return state(upload)

    @app.post("/weights/{upload_id}/commit")
    async def commit(upload_id: UploadId) -> WeightsState:
        upload = store.find(upload_id)
        path = await asyncio.to_thread(store.verify, upload)
        body = store.load_body(upload, path)
        await service.load(body)
        store.committed(upload, body)
        return state(upload, committed=True)


def add_active_route(app: FastAPI, service: Service, store: WeightStore) -> None:
    """Go back to one of the last committed weight sets."""

    @app.post("/models/set_active")
    async def set_active(body: SetActive) -> dict[str, Any]:
        known = store.tags.get(body.weights_id)
        if known is None:
            raise HTTPException(404, "these weights are not kept; publish them again")
        await service.load(known)
        return {"model_id": service.model_id, **service.queue.active}


def add_preview_routes(app: FastAPI, service: Service, store: WeightStore) -> None:
    """A batch under pinned weights, and what was answered since."""
    batches: list[dict[str, Any]] = []

    @app.post("/previews")
    async def previews(
        body: PreviewsRequest, request: Request, idempotency_key: IdempotencyKey = None
    ) -> dict[str, Any]:
        if body.weights_id != service.queue.active["weights_id"]:
            kept = store.tags.get(body.weights_id)
            if kept is None:
                raise WeightsRefusedError(
                    409, "not_active", "these weights are not the active ones; publish them first"
                )
            # Another trainer's weights are active: this one's are put back, in the same breath.
            service.submit("load_weights", {**kept, "run": body.run, "step": body.step})
        job = service.submit("previews", body.model_dump(mode="json"), idempotency_key)
        found = await service.answer(request, job)
        if not found["seq"]:  # a retried request is answered, not listed twice
            found["seq"] = batches[-1]["seq"] + 1 if batches else 1
            batches.append(found)
            del batches[:-KEPT_BATCHES]
        return found

    @app.get("/previews")
    async def since(run: Run, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        found = [batch for batch in batches if batch["run"] == run and batch["seq"] > after]
        return {"previews": found}
