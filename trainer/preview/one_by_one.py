"""OneByOneBackend: what backends share that ask a server for one prompt after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from trainer.errors import PreviewError
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.http import AwayError, BoundedClient, TooSlowError


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
