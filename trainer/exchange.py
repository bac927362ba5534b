"""One bounded HTTP exchange after another with a server that need not be friendly. No torch here.

Every wait has an end, every answer a size, redirects are not followed, and whatever goes wrong is a
PreviewError that says what to expect: away (come back later) or refused (asking again is no use).
"""

from __future__ import annotations

import json
import re
import threading
import time
import zlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import httpx

from trainer.errors import PreviewError
from trainer.net import CUT, KEY_VARIABLE, without_secrets

MAX_ANSWER = 1 << 20
"""Bytes of an answer that are read, unless a client asks for more; one preview is far smaller."""

CONNECT_TIMEOUT_S = 3.0

IDLE_TIMEOUT_S = 15.0
"""Longest pause in the middle of an upload."""

MIN_RETRY_S = 0.1

GRACE_S = 0.5
"""Time behind a deadline in which an exchange may still end by itself, with a better message."""

MIN_SECRET = 4
"""Shorter passwords are parts of ordinary words, so that cutting them out would garble messages."""


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
        kind: str = "preview server of this program",
        key_variable: str = KEY_VARIABLE,
        trust_env: bool = False,
        is_patient: bool = True,
    ) -> None:
        """Take where the server is; nothing is sent yet.

        Args:
            url: a path and a query are kept with every request, a user name and password too; none
                of these secrets stands in a message.
            kind: what the server should be, for messages.
            key_variable: what messages name for the key: an environment variable, or an option too.
            trust_env: go through the proxies that this shell names.
            is_patient: ask a busy server again until the deadline.
        """
        self.max_answer, self.kind, self.key_variable = max_answer, kind, key_variable
        self.is_patient = is_patient
        self.url, self.timeout_s, self.timeout_name = without_secrets(url), timeout_s, timeout_name
        parts = urlsplit(url)
        auth, self._secrets = _login(parts.netloc), [key] if key else []
        headers = {"Accept-Encoding": "identity"}
        if key and auth is None:
            headers["Authorization"] = f"Bearer {key}"
        path = parts.path.rstrip("/")
        query = parse_qsl(parts.query, keep_blank_values=True)
        self._secrets += [value for _, value in query if f"={value}" not in self.url]
        self._secrets += [auth[1]] if auth else []
        self._options: dict[str, Any] = {
            "base_url": urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", "")),
            "params": query or None,
            "auth": auth,
            "headers": headers,
            "follow_redirects": False,  # a key must not be carried to another place
            # A proxy of this shell is not meant for the machine under the desk.
            "trust_env": trust_env,
        }
        self._client = httpx.Client(**self._options)

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
            if not self.is_patient:
                raise TooSlowError(f"{self.url} is busy (HTTP {status}); ask again in a moment.")
            pause = _retry_after(answered)
            if pieces is not None or time.monotonic() + pause >= deadline:
                raise TooSlowError(
                    f"{self.url} is busy (HTTP {status}) and asks to come back in {pause:g} s, "
                    f"which is after {self.timeout_name}."
                )
            time.sleep(pause)

    def post(self, path: str, deadline: float, body: dict[str, Any]) -> int:
        """Send JSON once, to somebody whose answer says nothing; its HTTP status.

        Raises:
            PreviewError: nobody there, too slow, or an answer without an end.
        """
        status, _, _ = self._exchange("POST", path, deadline, body, None, None)
        return status

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
        """One request, and its answer before the deadline, whatever the server does.

        httpx's own time-outs begin anew with every byte, and looking up a name has none: it is a
        thread that waits, and it is left behind when the time is over.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise self._too_late()
        sent: dict[str, Any] = {"json": body} if pieces is None else {"content": pieces}
        client, found = self._client, _Outcome()

        def exchange() -> None:
            try:
                options = {"headers": headers, **sent}
                found.answer = self._answer(client, method, path, deadline, options)
            except BaseException as error:  # handed to the thread that waits
                found.error = error

        thread = threading.Thread(target=exchange, name="exchange", daemon=True)
        thread.start()
        thread.join(remaining + GRACE_S)
        if thread.is_alive():
            self._client = httpx.Client(**self._options)
            client.close()  # what still waits there ends with its connection
            raise self._too_late()
        if found.error is not None:
            raise found.error
        assert found.answer is not None, "either an answer or an error"
        return found.answer

    def _answer(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        deadline: float,
        options: dict[str, Any],
    ) -> tuple[int, httpx.Headers, bytes]:
        remaining = max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(
            remaining,
            connect=min(CONNECT_TIMEOUT_S, remaining),
            write=min(IDLE_TIMEOUT_S, remaining),
        )
        data = bytearray()
        try:
            with client.stream(method, path, timeout=timeout, **options) as response:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > self.max_answer:
                        raise PreviewError(
                            f"{self.url} sent more than {self.max_answer} bytes; not read."
                        )
                    if time.monotonic() > deadline:  # a read time-out never sees a slow trickle
                        raise self._too_late()
                packing = response.headers.get("content-encoding", "identity")
                content = self._unpacked(bytes(data), packing.strip().lower())
                return response.status_code, response.headers, content
        except httpx.ConnectTimeout as error:
            raise AwayError(self._away_text("no connection in time")) from error
        except httpx.TimeoutException as error:
            raise self._too_late() from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise AwayError(self._away_text(f"{type(error).__name__}: {error}")) from error

    def _unpacked(self, data: bytes, packing: str) -> bytes:
        """An answer that was compressed although we asked for none; its size has a limit too."""
        if packing in ("identity", "none", "") or not data:
            return data
        if packing not in ("gzip", "x-gzip", "deflate"):
            raise PreviewError(
                f"{self.url} answers in {packing[:20]!r}, which was not asked for and is not read."
            )
        try:
            reader = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
            content = reader.decompress(data, self.max_answer + 1)
        except zlib.error as error:
            raise PreviewError(f"{self.url} sent an answer that is no {packing}.") from error
        if len(content) > self.max_answer:
            raise PreviewError(f"{self.url} sent more than {self.max_answer} bytes; not read.")
        return content

    def without_secrets(self, text: str) -> str:
        """A server's words without the key that it may have repeated in them."""
        for secret in self._secrets:
            if len(secret) >= MIN_SECRET:
                text = text.replace(secret, CUT)
        return text

    def _decode(self, status: int, data: bytes) -> Any:
        if 300 <= status < 400:
            raise PreviewError(
                f"{self.url} answers with a redirect (HTTP {status}), which is not followed; give "
                "the server's own host and port."
            )
        if status in (401, 403):
            raise KeyRefusedError(
                f"{self.url} refuses the key (HTTP {status}); "
                f"set {self.key_variable} to the server's key."
            )
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            if status >= 400:  # proxies and frameworks write their own pages
                raise self._refused(status, data[:2000].decode("utf-8", "replace")) from error
            raise PreviewError(
                f"{self.url} answered HTTP {status} with something that is not JSON; "
                f"is it {_article(self.kind)}?"
            ) from error
        if status >= 400:
            raise self._refused(status, found)
        return found

    def _refused(self, status: int, found: Any) -> RefusedError:
        """A status that says no, with the server's reason wherever it put it."""
        detail, code = found, ""
        if isinstance(found, dict):
            code = str(found.get("code", ""))[:100]
            detail = found.get("detail", found.get("error", found))
            if isinstance(detail, dict):
                detail = detail.get("message", detail)
        words = self.without_secrets(" ".join(re.sub(r"<[^>]*>", " ", str(detail)).split()))[:300]
        return RefusedError(
            f"{self.url} refused the request (HTTP {status}): {words or 'no reason given'}",
            status,
            code,
        )

    def _too_late(self) -> TooSlowError:
        return TooSlowError(
            f"{self.url} did not answer within {self.timeout_s:g} s ({self.timeout_name})."
        )

    def _away_text(self, cause: str) -> str:
        return (
            f"{self.url} cannot be reached ({self.without_secrets(cause)}); is the {self.kind} "
            "running there, and does the firewall let it through? Training goes on."
        )


class _Outcome:
    """What an exchange came to, in the thread that made it."""

    answer: tuple[int, httpx.Headers, bytes] | None = None
    error: BaseException | None = None


def _login(netloc: str) -> tuple[str, str] | None:
    """User name and password of an address; None where it has none."""
    user, _, password = netloc.rpartition("@")[0].partition(":")
    return (unquote(user), unquote(password)) if user or password else None


def _article(kind: str) -> str:
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds of a Retry-After header, within reason; dates and garbage count as one second."""
    try:
        wanted = float(headers.get("retry-after", "1"))
    except ValueError:
        wanted = 1.0
    return wanted if wanted == wanted and wanted >= MIN_RETRY_S else MIN_RETRY_S
