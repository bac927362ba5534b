"""Bodies of the OpenAI surface. A field with no effect is taken at its default and refused else."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainer.publish.wire import MAX_NEW_TOKENS, MAX_PROMPT_CHARS, Body, Name, Stop, TokenIds
from trainer.server.problems import ONLY_SAMPLING

DEFAULT_MAX_TOKENS = 256

MAX_SAMPLES = 16

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]

Limit = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]

Zero = Annotated[float, Field(ge=0, le=0)]

One = Annotated[float, Field(ge=1, le=1)]

OneInt = Annotated[int, Field(ge=1, le=1)]

Nothing = Annotated[list[Any], Field(max_length=0)]


class TextPart(Body):
    """A piece of a turn's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer word for `system`."""
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=100)]

    def turn(self) -> dict[str, str]:
        """Role and whole text."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class StreamOptions(Body):
    """Only with `stream: true`."""

    include_usage: bool = False


class PlainText(Body):
    """The only response format."""

    type: Literal["text"]


class OpenAIRequest(Body):
    """What both kinds of completion take; anything else is refused, not ignored."""

    model: Name
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    """Another name of `max_tokens`; not both."""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    """1 where it is not given."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Without one every answer is drawn afresh; the same seed gives the same answer."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=1000)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    """How many answers, each from noise of its own."""
    # No effect here: at its default each of them says nothing, at another value it asks for
    # something that this server would not do.
    top_p: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("top_p", "presence_penalty", "frequency_penalty", "logit_bias", mode="before")
    @classmethod
    def _says_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        default = {"top_p": 1, "logit_bias": {}}.get(info.field_name or "", 0)
        is_number = not isinstance(value, bool) and isinstance(value, (int, float, dict))
        if is_number and value != default:
            raise ValueError(
                f"{info.field_name}={str(value)[:50]} is not supported: {ONLY_SAMPLING}; leave "
                f"{info.field_name} out or give {default}"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> OpenAIRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def settings(self) -> dict[str, Any]:
        """The fields of a GenerateRequest, without the prompt."""
        return {
            "max_new_tokens": self.max_tokens or self.max_completion_tokens or DEFAULT_MAX_TOKENS,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "seed": self.seed,
            "stop": self.stops,
        }

    def sent(self, prompt_token_ids: list[int] | None = None, **what: Any) -> bytes:
        """JSON for the engine: a GenerateRequest, with what stands for its prompt beside it."""
        request = self.settings()
        if prompt_token_ids is not None:
            request["prompt_token_ids"] = prompt_token_ids
        return json.dumps({**what, "request": request, "samples": self.n or 1}).encode()


class ChatRequest(OpenAIRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=500)]
    logprobs: Literal[False] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: PlainText | None = None
    store: Literal[False] | None = None

    def job(self) -> tuple[str, bytes]:
        """The engine's operation and body."""
        turns = [message.turn() for message in self.messages]
        return "chat", self.sent(messages=turns)


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`."""

    prompt: (
        Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)]
        | Annotated[TokenIds, Field(min_length=1)]
    )
    """Text, or the ids of its tokens."""
    best_of: OneInt | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def job(self) -> tuple[str, bytes]:
        """The engine's operation and body."""
        if isinstance(self.prompt, str):
            return "complete", self.sent(text=self.prompt)
        return "generate", self.sent(prompt_token_ids=self.prompt)


# ---- answers


class Usage(BaseModel):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Said(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class TextChoice(BaseModel):
    """One answer."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class _Answer(BaseModel):
    id: str
    created: int
    """Unix seconds."""
    model: str
    system_fingerprint: str
    """The weights id."""
    usage: Usage


class ChatCompletion(_Answer):
    """Answer to a chat."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextCompletion(_Answer):
    """Answer to a completion."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """One name that a completion may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "trainer"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
