"""Backends that ask a server for one prompt after the other, and the one for a preview server.

Everything that can go wrong becomes a PreviewResult with an error message, within the time-out;
nothing a server says is trusted beyond being text. Weights are not sent: an answer is marked with
whatever identity the server claims, and None (unverified) where it claims none.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from pydantic import ValidationError

from trainer.errors import PreviewError
from trainer.exchange import MIN_RETRY_S, AwayError, BoundedClient, TooSlowError
from trainer.net import KEY_VARIABLE, key_with_scope, read_key_file, url_of
from trainer.preview.base import PreviewRequest, PreviewResult, ServerAnswer, is_match


def server_key(key_file: str | None) -> str | None:
    """The key that a run shows to its preview server: of a file, else of the environment.

    Raises:
        ConfigError: the file holds no key.
    """
    if key_file is None:
        return os.environ.get(KEY_VARIABLE)
    keys = read_key_file(key_file, "monitoring.remote_3090_key_file=")
    return key_with_scope(keys, "publish")


class OneByOneBackend(ABC):
    """Whatever goes wrong with a prompt becomes a PreviewResult with an error message."""

    backend_type: str
    max_new_tokens: int
    """Of an answer, where the caller names no other number."""
    compare: Callable[[str, str], bool] | None
    """The profile's comparison of an answer with golden."""
    _client: BoundedClient

    def preview(
        self,
        prompt: str,
        golden_answer: str | None,
        step: int,
        *,
        max_new_tokens: int | None = None,
    ) -> PreviewResult:
        """Answer one user turn."""
        request = PreviewRequest(prompt=prompt, golden_answer=golden_answer)
        return self.preview_batch([request], step, max_new_tokens=max_new_tokens)[0]

    def preview_batch(
        self, requests: list[PreviewRequest], step: int, *, max_new_tokens: int | None = None
    ) -> list[PreviewResult]:
        """Answer the requests one after the other; a server that is away is asked only once."""
        results: list[PreviewResult] = []
        away: str | None = None
        for request in requests:
            message = away
            if message is None:
                try:
                    results.append(self._ask(request, step, max_new_tokens or self.max_new_tokens))
                    continue
                except TooSlowError as error:  # the next prompt may be a quicker one
                    message = str(error)
                except AwayError as error:
                    message = away = str(error)
                except PreviewError as error:
                    message = str(error)
            results.append(PreviewResult.failed(request, step, message, self.backend_type))
        return results

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @abstractmethod
    def _ask(self, request: PreviewRequest, step: int, max_new_tokens: int) -> PreviewResult:
        """Answer one request.

        Raises:
            PreviewError: with a message for people.
        """


LONG_POLL_S = 25

DONE, FAILED = ("done", "completed", "succeeded"), ("failed", "error", "cancelled")


class Remote3090Backend(OneByOneBackend):
    """Asks a preview server at `host:port`."""

    backend_type = "remote_3090"

    def __init__(
        self,
        *,
        host: str,
        port: int = 8765,
        timeout: float = 30,
        model_id: str | None = None,
        api_key: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        stop: Sequence[str] = (),
        system_prompt: str | None = None,
        compare: Callable[[str, str], bool] | None = None,
    ) -> None:
        """Take where the server is; nothing is sent yet.

        Args:
            timeout: seconds for one prompt, waiting, retries and polling included.
            model_id: model the server is asked for; None: its active one.
            api_key: None: from the environment variable ULTIMATE_TRAINER_KEY, if set.
            stop: stop strings of the profile.
            system_prompt: sent with prompts that come as text.
            compare: the profile's comparison of an answer with golden.
        """
        self.url = url_of(host, port)
        self.timeout, self.model_id = timeout, model_id
        self.max_new_tokens, self.temperature, self.stop = max_new_tokens, temperature, tuple(stop)
        self.system_prompt, self.compare = system_prompt, compare
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        self._client = BoundedClient(
            self.url, key, timeout_s=timeout, timeout_name="monitoring.remote_3090_timeout"
        )

    def _ask(self, request: PreviewRequest, step: int, max_new_tokens: int) -> PreviewResult:
        started = time.monotonic()
        deadline = started + self.timeout
        body: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": self.temperature,
            "stop": list(self.stop),
            "model_id": self.model_id,
        }
        if request.prompt_token_ids is not None:
            body["prompt_token_ids"] = list(request.prompt_token_ids)
        else:
            body |= {"prompt": request.prompt, "system_prompt": self.system_prompt}
        status, found = self._client.call("POST", "/generate", deadline, body)
        if status == httpx.codes.ACCEPTED:
            found = self._poll(found, deadline)
        answer = self._parse(found)
        seconds = answer.generation_time_sec or time.monotonic() - started
        golden = request.golden_answer
        return PreviewResult(
            step=step,
            prompt=request.prompt,
            text=answer.text,
            raw_text=answer.raw_text if answer.raw_text is not None else answer.text,
            golden_answer=golden,
            matches=is_match(request, answer.text, self.compare),
            tokens_generated=answer.tokens_generated,
            generation_time_sec=seconds,
            tokens_per_sec=answer.tokens_per_sec or answer.tokens_generated / max(seconds, 1e-9),
            finish_reason=answer.finish_reason,
            weights_id=answer.weights_id,
            backend_type=self.backend_type,
            prompt_id=request.prompt_id,
            held_out=request.held_out,
        )

    def _poll(self, found: Any, deadline: float) -> Any:
        """Wait for a job; a job that is given up is cancelled."""
        job_id = found.get("job_id") if isinstance(found, dict) else None
        if not isinstance(job_id, str) or not job_id.replace("-", "").replace("_", "").isalnum():
            raise PreviewError(f"{self.url} accepted the prompt but named no usable job_id.")
        try:
            while True:
                wait = max(0, min(LONG_POLL_S, int(deadline - time.monotonic())))
                _, job = self._client.call("GET", f"/jobs/{job_id}?wait={wait}", deadline)
                state = job.get("status") if isinstance(job, dict) else None
                if state in DONE:
                    return job.get("result", job)
                if state in FAILED:
                    reason = str(job.get("error") or job.get("error_message") or state)[:300]
                    raise PreviewError(f"{self.url}: the job failed: {reason}")
                time.sleep(min(MIN_RETRY_S, max(deadline - time.monotonic(), 0)))
        except PreviewError:
            self._client.cancel(f"/jobs/{job_id}")
            raise

    def _parse(self, found: Any) -> ServerAnswer:
        try:
            return ServerAnswer.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the answer"
            raise PreviewError(
                f"{self.url} sent an answer of another shape ({field}: {first['msg']}); is it a "
                "preview server of this program?"
            ) from error
