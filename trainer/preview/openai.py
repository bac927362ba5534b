"""OpenAIPreviewBackend: previews from any OpenAI-compatible server, with the weights it has.

Such a server cannot say which weights answered, so every result is labelled unverified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError, PreviewError
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.http import (
    AwayError,
    BoundedClient,
    KeyRefusedError,
    RefusedError,
)
from trainer.preview.one_by_one import OneByOneBackend

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER = 16 << 20


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    content: str | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")
    completion_tokens: int = 0


class _Completion(BaseModel):
    model_config = ConfigDict(extra="ignore")
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class OpenAIPreviewBackend(OneByOneBackend):
    """Asks `POST {base_url}/chat/completions`, one prompt after the other."""

    backend_type = "openai"

    def __init__(
        self,
        *,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 42,
        stop: Sequence[str] = (),
        system_prompt: str | None = None,
        compare: Callable[[str, str], bool] | None = None,
    ) -> None:
        """Take where the server is; nothing is sent yet.

        Args:
            base_url: up to and including `/v1`.
            model: None: the only one that the server lists.
            api_key: None: from the environment variable OPENAI_API_KEY, if set.
            timeout: seconds for one prompt.
            compare: the profile's comparison of an answer with golden.
        """
        self.url, self.model, self.timeout = base_url.rstrip("/"), model, timeout
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.stop, self.system_prompt, self.compare = list(stop), system_prompt, compare
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        self._client = BoundedClient(
            self.url, key, timeout_s=timeout, timeout_name="time-out", max_answer=MAX_ANSWER
        )

    def check(self) -> None:
        """Find out, once, whether the server can be asked at all.

        Raises:
            ConfigError: it refuses the key, does not have the model, or is no such server.
            AwayError: nobody is there.
        """
        try:
            self._find_model(time.monotonic() + 10.0)
        except AwayError:
            raise
        except KeyRefusedError as error:
            raise ConfigError(f"{self.url} refuses the key; set {KEY_VARIABLE}.") from error
        except PreviewError as error:
            raise ConfigError(f"monitoring.openai_base_url={self.url}: {error}") from error

    def _find_model(self, deadline: float) -> str:
        """The model to ask for; one that is named is taken at its word if the list is closed."""
        try:
            _, found = self._client.call("GET", "/models", deadline)
            names = [str(one["id"]) for one in found["data"]]
        except RefusedError:
            names = []  # some servers do not list their models
        except (KeyError, TypeError) as error:
            raise PreviewError("its list of models is none; is it OpenAI-compatible?") from error
        if self.model is None:
            if len(names) != 1:
                shown = ", ".join(names[:8]) or "none"
                raise PreviewError(f"set monitoring.openai_model; the server lists {shown}")
            self.model = names[0]
        elif names and self.model not in names:
            raise PreviewError(f"no model {self.model!r} there; it lists {', '.join(names[:8])}")
        return self.model

    def _ask(self, request: PreviewRequest, step: int, max_new_tokens: int) -> PreviewResult:
        started = time.monotonic()
        deadline = started + self.timeout
        turns = [{"role": "user", "content": request.prompt}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        body: dict[str, Any] = {
            "model": self.model or self._find_model(deadline),
            "messages": turns,
            "max_tokens": max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.stop:
            body["stop"] = self.stop
        _, found = self._client.call("POST", "/chat/completions", deadline, body)
        try:
            answer = _Completion.model_validate(found)
        except ValidationError as error:
            raise PreviewError(f"{self.url} sent a completion of another shape.") from error
        return self._result(request, step, answer, time.monotonic() - started)

    def _result(
        self, request: PreviewRequest, step: int, answer: _Completion, seconds: float
    ) -> PreviewResult:
        choice, golden = answer.choices[0], request.golden_answer
        text = choice.message.content or ""
        tokens = answer.usage.completion_tokens if answer.usage is not None else 0
        return PreviewResult(
            step=step,
            prompt=request.prompt,
            text=text,
            raw_text=text,
            golden_answer=golden,
            matches=self._matches(text, golden),
            tokens_generated=tokens,
            generation_time_sec=seconds,
            tokens_per_sec=tokens / max(seconds, 1e-9),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            weights="unverified",
            backend_type=self.backend_type,
            prompt_id=request.prompt_id,
            held_out=request.held_out,
        )
