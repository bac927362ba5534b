"""One bounded HTTP exchange after another with a server that need not be friendly. No torch here.

Every wait has an end, every answer a size, redirects are not followed, and whatever goes wrong is
a PreviewError that says what to expect: away (come back later) or refused (asking again is no use).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from trainer.errors import ConfigError, PreviewError

MAX_ANSWER = 1 << 20
"""Bytes of an answer that are read, unless a client asks for more; one preview is far smaller."""
CONNECT_TIMEOUT_S = 3.0
IDLE_TIMEOUT_S = 15.0
"""Longest pause in the middle of an upload."""
MIN_RETRY_S = 0.1
KEY_VARIABLE = "ULTIMATE_TRAINER_KEY"


class AwayError(PreviewError):
    """Nobody is there, or it is too busy: asking again at once would only wait again."""


class TooSlowError(AwayError):
    """It is there, and did not answer in time."""


class KeyRefusedError(PreviewError):
    """The server wants another key."""


class RefusedError(PreviewError):
    """The server answered that it will not; `status` and `code` say why to a program."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        """Take the message for people, the HTTP status and the body's short code."""
        super().__init__(message)
        self.status, self.code = status, code


def read_key(key_file: str | None) -> str | None:
    """The server's key: from a file, else from the environment, else none.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if key_file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        lines = Path(key_file).read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"monitoring.remote_3090_key_file={key_file}: cannot be read ({error}); give the file "
            "that holds the server's key."
        ) from error
    keys = [line.rpartition(":")[2].strip() for line in lines if line.strip()]
    publish = [line for line in lines if line.strip().startswith("publish:")]
    if not keys:
        raise ConfigError(f"monitoring.remote_3090_key_file={key_file}: the file holds no key.")
    return publish[0].partition(":")[2].strip() if publish else keys[0]


class BoundedClient:
    """Asks one server; `timeout_name` is the option that its time-out messages name."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float,
        timeout_name: str,
        max_answer: int = MAX_ANSWER,
    ) -> None:
        """Take where the server is; nothing is sent yet."""
        self.max_answer = max_answer
        self.url, self.timeout_s, self.timeout_name = url, timeout_s, timeout_name
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,  # a key must not be carried to another place
            trust_env=False,  # a proxy of this shell is not meant for the machine under the desk
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        deadline: float,
        body: dict[str, Any] | None = None,
        *,
        pieces: Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Send a request until it is answered or the time is over; busy servers are asked again.

        Args:
            deadline: of `time.monotonic()`.
            body: sent as JSON.
            pieces: raw body instead, with its `content-length` in `headers`; sent once.
        Returns:
            Status below 300 and the JSON body.
        Raises:
            AwayError: nobody there, too slow or busy for too long.
            KeyRefusedError, RefusedError, PreviewError: 401/403, other statuses, garbage.
        """
        while True:
            status, answered, data = self._exchange(method, path, deadline, body, pieces, headers)
            if status not in (429, 503):
                return status, self._decode(status, data)
            pause = _retry_after(answered)
            if pieces is not None or time.monotonic() + pause >= deadline:
                raise TooSlowError(
                    f"{self.url} is busy (HTTP {status}) and asks to come back in {pause:g} s, "
                    f"which is after {self.timeout_name}."
                )
            time.sleep(pause)

    def cancel(self, path: str) -> None:
        """DELETE something that is being given up; whether it works no longer matters."""
        try:
            self._client.delete(path, timeout=1.0)
        except httpx.HTTPError:
            return  # it is being given up because the server is slow or away: nothing more to do

    def _exchange(
        self,
        method: str,
        path: str,
        deadline: float,
        body: dict[str, Any] | None,
        pieces: Iterable[bytes] | None,
        headers: dict[str, str] | None,
    ) -> tuple[int, httpx.Headers, bytes]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise self._too_late()
        timeout = httpx.Timeout(
            remaining,
            connect=min(CONNECT_TIMEOUT_S, remaining),
            write=min(IDLE_TIMEOUT_S, remaining),
        )
        sent: dict[str, Any] = {"json": body} if pieces is None else {"content": pieces}
        data = bytearray()
        try:
            with self._client.stream(
                method, path, timeout=timeout, headers=headers, **sent
            ) as response:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > self.max_answer:
                        raise PreviewError(
                            f"{self.url} sent more than {self.max_answer} bytes; not read."
                        )
                    if time.monotonic() > deadline:  # a read time-out never sees a slow trickle
                        raise self._too_late()
                return response.status_code, response.headers, bytes(data)
        except httpx.ConnectTimeout as error:
            raise AwayError(self._away_text("no connection in time")) from error
        except httpx.TimeoutException as error:
            raise self._too_late() from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise AwayError(self._away_text(f"{type(error).__name__}: {error}")) from error

    def _decode(self, status: int, data: bytes) -> Any:
        if 300 <= status < 400:
            raise PreviewError(
                f"{self.url} answers with a redirect (HTTP {status}), which is not followed; give "
                "the server's own host and port."
            )
        if status in (401, 403):
            raise KeyRefusedError(
                f"{self.url} refuses the key (HTTP {status}); "
                f"set {KEY_VARIABLE} to the server's key."
            )
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PreviewError(
                f"{self.url} answered HTTP {status} with something that is not JSON; "
                "is it a preview server of this program?"
            ) from error
        if status >= 400:
            detail = found.get("detail", found) if isinstance(found, dict) else found
            code = str(found.get("code", ""))[:100] if isinstance(found, dict) else ""
            raise RefusedError(
                f"{self.url} refused the request (HTTP {status}): {str(detail)[:300]}", status, code
            )
        return found

    def _too_late(self) -> TooSlowError:
        return TooSlowError(
            f"{self.url} did not answer within {self.timeout_s:g} s ({self.timeout_name})."
        )

    def _away_text(self, cause: str) -> str:
        return (
            f"{self.url} cannot be reached ({cause}); is the preview server running there, "
            "and does the firewall let it through? Training goes on."
        )


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds of a Retry-After header, within reason; dates and garbage count as one second."""
    try:
        wanted = float(headers.get("retry-after", "1"))
    except ValueError:
        wanted = 1.0
    return wanted if wanted == wanted and wanted >= MIN_RETRY_S else MIN_RETRY_S
