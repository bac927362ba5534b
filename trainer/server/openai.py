"""The OpenAI surface: chat, completions, models. The answer is made whole, then streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import Field, StringConstraints

from trainer.preview.wire import MAX_NEW_TOKENS, MAX_PROMPT_CHARS, Body, Name, Stop
from trainer.server.service import Service

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
Limit = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class OpenAIRequest(Body):
    """What both kinds of completion take; anything else is refused, not ignored."""

    model: Name
    max_tokens: Limit | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 42
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    n: Literal[1] = 1

    def settings(self) -> dict[str, Any]:
        """The fields of a GenerateRequest, without the prompt."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_new_tokens": self.max_tokens or 256,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop": stop,
        }


class ChatRequest(OpenAIRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=500)]


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)]


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Chat, completions, models."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": service.model_id, "object": "model", "created": 0, "owned_by": "trainer"}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Any:
        service.check_model(body.model)
        messages = [message.model_dump() for message in body.messages]
        job = service.submit("chat", {"messages": messages, "request": body.settings()})
        found = await service.answer(request, job)
        return _reply(body, found, f"chatcmpl-{job.id}", is_chat=True)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        service.check_model(body.model)
        job = service.submit("complete", {"text": body.prompt, "request": body.settings()})
        found = await service.answer(request, job)
        return _reply(body, found, f"cmpl-{job.id}", is_chat=False)


def _reply(body: OpenAIRequest, found: dict[str, Any], name: str, *, is_chat: bool) -> Any:
    base = {
        "id": name,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": found["weights_id"],
    }
    if body.stream:
        events = _events(base, found, is_chat=is_chat)
        return StreamingResponse(events, media_type="text/event-stream")
    text = found["text"]
    said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    used, made = found["prompt_tokens"], found["tokens_generated"]
    return {
        **base,
        "object": "chat.completion" if is_chat else "text_completion",
        "choices": [
            {"index": 0, **said, "logprobs": None, "finish_reason": found["finish_reason"]}
        ],
        "usage": {
            "prompt_tokens": used,
            "completion_tokens": made,
            "total_tokens": used + made,
        },
    }


def _events(base: dict[str, Any], found: dict[str, Any], *, is_chat: bool) -> Iterator[str]:
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    text, reason = found["text"], found["finish_reason"]
    said: dict[str, Any] = {"delta": {"role": "assistant", "content": text}}
    end: dict[str, Any] = {"delta": {}}
    if not is_chat:
        said, end = {"text": text}, {"text": ""}
    for piece, finish in ((said, None), (end, reason)):
        choice = {"index": 0, **piece, "logprobs": None, "finish_reason": finish}
        yield f"data: {json.dumps({**base, 'object': kind, 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"
