"""What every error looks like: one JSON shape, and OpenAI's on `/v1`. No paths, no stack traces."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

logger = logging.getLogger(__name__)

OPENAI_PREFIX = "/v1/"

CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    422: "invalid",
    429: "queue_full",
    499: "client_gone",
    431: "head_too_large",
    503: "not_ready",
    504: "too_slow",
}

SAMPLING = {
    *("top_p", "top_k", "min_p", "typical_p", "top_a", "tfs", "mirostat", "dry_multiplier"),
    *("repetition_penalty", "repeat_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "no_repeat_ngram_size", "num_beams", "length_penalty", "do_sample"),
}
"""Names of sampling fields that other servers take."""

ONLY_SAMPLING = "this server samples by temperature and seed from the whole distribution"


NO_TOOLS = "no tool is called, answers are text"

NO_PROBABILITIES = "probabilities of tokens are not returned"

ONLY_TEXT = "answers are plain text, of whatever form the model gives them"

NOT_SUPPORTED = {
    **dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"), NO_TOOLS
    ),
    **dict.fromkeys(("logprobs", "top_logprobs"), NO_PROBABILITIES),
    **dict.fromkeys(
        ("response_format", "guided_json", "guided_regex", "guided_choice", "grammar"), ONLY_TEXT
    ),
    **dict.fromkeys(("modalities", "audio"), "turns and answers are text"),
    "prediction": "every token is generated",
    "reasoning_effort": "a model thinks as it was trained to",
    "verbosity": "a model says as much as it was trained to; max_tokens limits it",
    "web_search_options": "nothing is searched",
    "store": "nothing is stored",
    "best_of": "one answer is made for each that is returned; n asks for several",
    "echo": "an answer does not repeat its prompt",
    "suffix": "an answer goes on from the prompt's end",
    "chat_template_kwargs": "prompts are rendered as in training",
}
"""Fields of other servers, by what they ask for that this one does not do."""

FORMS = {
    "content": "give text, or a list of {type: text, text: ...}",
    "stop": "give a string, or a list of at most 16",
    "prompt": "give one text, or the ids of its tokens as one list",
}
"""Fields that are taken in two forms: what pydantic says of each form says nothing to a client."""


class Problem(BaseModel):
    """Body of an error."""

    detail: str
    code: str
    bad: list[str] | None = None
    """Names of the tensors at fault."""


class OpenAIError(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIProblem(BaseModel):
    """Body of an error on `/v1`."""

    error: OpenAIError


class WeightsRefusedError(Exception):
    """An offer, part or set that cannot be taken; `status` and `code` say why to a program."""

    def __init__(self, status: int, code: str, message: str, bad: list[str] | None = None) -> None:
        """Take the HTTP status, a short code, the message, and the tensors at fault."""
        super().__init__(message)
        self.status, self.code, self.bad = status, code, bad or []


def problem_body(
    path: str,
    status: int,
    detail: str,
    code: str | None = None,
    bad: list[str] | None = None,
    param: str | None = None,
) -> dict[str, Any]:
    """The JSON of an error, in the shape of the route's family."""
    code = code or CODES.get(status, "error")
    if path.startswith(OPENAI_PREFIX):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        return {"error": {"message": detail, "type": kind, "param": param, "code": code}}
    return {"detail": detail, "code": code, **({"bad": bad} if bad else {})}


def documented(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route for its OpenAPI description, beside those that any route gives."""
    model = OpenAIProblem if openai else Problem
    found: dict[int | str, dict[str, Any]] = {}
    for status in (400, 401, 403, 413, 421, *statuses):
        found[status] = {"model": model}
        if status in (429, 503):
            found[status]["headers"] = {
                "Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}
            }
    return found


def add_problem_handlers(app: FastAPI) -> None:
    """Turn exceptions into bodies; what nobody foresaw is told to the log, not to the client."""

    def answer(
        request: Request, status: int, detail: str, code: str | None = None, **more: Any
    ) -> JSONResponse:
        path = request.url.path
        body = problem_body(path, status, detail, code, more.get("bad"), more.get("param"))
        return JSONResponse(body, status, headers=more.get("headers"))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(WeightsRefusedError)
    async def _refused(request: Request, error: WeightsRefusedError) -> JSONResponse:
        headers = {"Retry-After": "2"} if error.status in (429, 503) else None
        return answer(request, error.status, str(error), error.code, bad=error.bad, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The input is left out: it may be large, and it is the client's own anyway.
        items = error.errors()[:20]
        problems = list(dict.fromkeys(map(_said, items)))
        place = items[0]["loc"][1:2] if items else ()
        param = str(place[0])[:100] if place and isinstance(place[0], str) else None
        return answer(request, 422, "; ".join(problems)[:2000], param=param)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it, and it is no fault of this server

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(request, 500, "internal error; details are in the server's log", "internal")


def _said(item: dict[str, Any]) -> str:
    """One thing that is wrong with a body: which field, what is wrong, what to do."""
    place = ".".join(map(str, item["loc"][1:]))[:300] or "body"
    name = str(item["loc"][1]) if len(item["loc"]) > 1 else ""
    if name in NOT_SUPPORTED:
        return f"{name} is not supported: {NOT_SUPPORTED[name]}; leave {name} out"
    is_of_form = any(str(part).startswith(("constrained-", "list[")) for part in item["loc"])
    for form, words in FORMS.items():
        if is_of_form and form in item["loc"] and not item["type"].endswith(("_long", "_short")):
            found = ".".join(map(str, item["loc"][1 : item["loc"].index(form, 1) + 1]))
            return f"{found}: {words}"
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg'].removeprefix('Value error, ')}"
    if str(item["loc"][-1]) in SAMPLING:
        return f"{place} is not supported: {ONLY_SAMPLING}; leave it out"
    if name == "messages":
        return f"{place}: a turn has role and content only; leave it out"
    return f"{place}: this request has no such field; leave it out (GET /openapi.json lists all)"
