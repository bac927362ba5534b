"""The OpenAI surface: chat, completions, models; whole or as a stream while the text is made."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from trainer.server.completion_schema import (
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Said,
    TextChoice,
    TextCompletion,
    Usage,
)
from trainer.server.job_book import Job
from trainer.server.problems import documented, problem_body
from trainer.server.service import Service, client_of, result_of

logger = logging.getLogger(__name__)

Completion = ChatRequest | CompletionRequest

EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A chunk as JSON, or [DONE]."},
        "event": {"const": "message"},
    },
    "required": ["data"],
}

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}}
}


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Chat, completions, models."""
    errors = documented(404, 409, 422, 429, 500, 503, 504, openai=True)

    @app.get("/v1/models", responses=documented(openai=True))
    async def models() -> ModelList:
        own = [service.model_id] if service.model_id is not None else []
        kept = [name for name in service.store.names if name not in own]
        return ModelList(data=[ModelCard(id=name) for name in [*own, *kept]])

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**errors, **EVENTS})
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await _complete(service, body, request, "chatcmpl")

    @app.post("/v1/completions", response_model=TextCompletion, responses={**errors, **EVENTS})
    async def complete(body: CompletionRequest, request: Request) -> Any:
        return await _complete(service, body, request, "cmpl")


async def _complete(service: Service, body: Completion, request: Request, prefix: str) -> Any:
    service.check_ready()
    needs = service.find_weights(body.model)
    operation, sent = body.job()
    job = service.submit(
        operation,
        sent,
        needs=needs,
        client=client_of(request),
        is_streamed=bool(body.stream),
    )
    base = {"id": f"{prefix}-{job.id}", "created": int(time.time()), "model": body.model}
    if not body.stream:
        return _whole(body, base, await service.answer(request, job))
    events = _Stream(service, body, request, job, base).events()
    # Whatever can be refused is refused before the first byte, with a status of its own.
    first = await anext(events, None)
    if first is None:
        raise HTTPException(499, "the client went away")
    return _EventResponse(first, events, lambda: service.queue.cancel(job))


class _EventResponse(StreamingResponse):
    """Sends events; however that ends, the job ends with it."""

    def __init__(self, first: str, events: AsyncIterator[str], cancel: Callable[[], None]) -> None:
        async def all_of_them() -> AsyncIterator[str]:
            yield first
            async for event in events:
                yield event

        super().__init__(all_of_them(), media_type="text/event-stream")
        self._cancel = cancel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()  # does nothing where the job has ended


def _whole(body: Completion, base: dict[str, Any], found: dict[str, Any]) -> Any:
    base = {**base, "system_fingerprint": found["weights_id"], "usage": _usage(found)}
    said = [
        (index, _cut(one["text"], body.stops), one["finish_reason"])
        for index, one in enumerate(found["samples"])
    ]
    if isinstance(body, ChatRequest):
        turns = [
            ChatChoice(index=index, message=Said(content=text), finish_reason=reason)
            for index, text, reason in said
        ]
        return ChatCompletion(**base, choices=turns)
    texts = [TextChoice(index=index, text=text, finish_reason=end) for index, text, end in said]
    return TextCompletion(**base, choices=texts)


def _usage(found: dict[str, Any]) -> Usage:
    used = found["prompt_tokens"]
    made = sum(one["tokens_generated"] for one in found["samples"])
    return Usage(prompt_tokens=used, completion_tokens=made, total_tokens=used + made)


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: stop_position(text, stops)]


def stop_position(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins: OpenAI's answers end before it."""
    found = [text.find(stop) for stop in stops]
    return min([place for place in found if place >= 0], default=len(text))


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of a text can be sent: not what may be the beginning of a stop string."""
    end = stop_position(text, stops)
    if end < len(text):
        return end
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)


@dataclass
class _Sent:
    """What is known of a sample, and how much of it was sent."""

    text: str = ""
    length: int = 0
    has_begun: bool = False


class _Stream:
    """The events of one streamed completion."""

    def __init__(
        self, service: Service, body: Completion, request: Request, job: Job, base: dict[str, Any]
    ) -> None:
        self.service, self.body, self.request, self.job = service, body, request, job
        self.is_chat = isinstance(body, ChatRequest)
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        self.base = {**base, "object": kind}
        self.has_usage = body.stream_options is not None and body.stream_options.include_usage

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; their texts add up to the texts of the whole answer.

        Samples come one behind the other, told apart by their `index`.
        """
        samples = [_Sent() for _ in range(self.body.n or 1)]
        async for number, piece in self.service.texts(self.request, self.job):
            assert self.job.tag is not None, "a job that writes knows whose weights answer"
            self.base["system_fingerprint"] = self.job.tag["weights_id"]
            for event in self._more(number, samples[number], piece):
                yield event
        if not self.job.done.is_set():
            return  # nobody is there any more
        try:
            found = result_of(self.job)
        except HTTPException as error:
            if not any(one.has_begun for one in samples):
                raise
            yield self._error(error.status_code, str(error.detail))
            return
        self.base["system_fingerprint"] = found["weights_id"]
        for number, (sent, one) in enumerate(zip(samples, found["samples"], strict=True)):
            whole = _cut(one["text"], self.body.stops)
            if not whole.startswith(sent.text[: sent.length]):
                logger.error("a streamed text is not the beginning of the whole one; not completed")
                yield self._error(500, "the end of the text cannot be streamed; ask without stream")
                return
            for event in self._begin(number, sent):
                yield event
            if len(whole) > sent.length:
                yield self._event(number, self._said(whole[sent.length :]))
            yield self._event(number, {} if self.is_chat else "", one["finish_reason"])
        if self.has_usage:
            yield _line({**self.base, "choices": [], "usage": _usage(found).model_dump()})
        yield "data: [DONE]\n\n"

    def _begin(self, number: int, sent: _Sent) -> Iterator[str]:
        if self.is_chat and not sent.has_begun:
            yield self._event(number, {"role": "assistant", "content": ""})
        sent.has_begun = True

    def _more(self, number: int, sent: _Sent, piece: str) -> Iterator[str]:
        """What can be sent once a piece has come."""
        yield from self._begin(number, sent)
        sent.text += piece
        end = safe_length(sent.text, self.body.stops)
        if end > sent.length:
            yield self._event(number, self._said(sent.text[sent.length : end]))
            sent.length = end

    def _said(self, text: str) -> Any:
        return {"content": text} if self.is_chat else text

    def _event(self, number: int, said: Any, finish_reason: str | None = None) -> str:
        choice = {
            "index": number,
            ("delta" if self.is_chat else "text"): said,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.has_usage else {}
        return _line({**self.base, "choices": [choice], **usage})

    def _error(self, status: int, detail: str) -> str:
        return _line(problem_body("/v1/", status, detail))


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
