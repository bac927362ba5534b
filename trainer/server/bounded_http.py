"""HTTP with limits, before any route or key is looked at: heads, bodies, connections, time.

uvicorn's protocol has none of them: whoever connects could send headers without end, or nothing.
"""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from trainer.server.problems import problem_body

MAX_HEAD = 32 << 10
"""Bytes of request line and headers, and of whatever stands between the pieces of a body."""

MAX_CONNECTIONS = 256

MAX_PIPELINED = 16

HEAD_TIMEOUT_S = 10.0
"""A request's head must be there so long after its first byte, and the first one after the
connection."""

BODY_IDLE_S = 30.0
"""Longest pause in a body,"""

BODY_TIMEOUT_S = 600.0
"""and its whole time."""

WRITE_TIMEOUT_S = 60.0
"""How long a client may leave its answer unread."""


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """One connection."""

    def connection_made(self, transport: Any) -> None:
        """Begin to count; where all places are taken, whoever asks nothing gives one back."""
        super().connection_made(transport)
        self._head_bytes = self._between = 0
        self._is_in_head, self._is_in_body, self._is_refused = True, False, False
        self._timers: dict[str, Any] = {}
        self._start("head", HEAD_TIMEOUT_S)
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if one is not self and one.is_idle]
            # Without an idle one, every other connection has a request that is being answered.
            victim = min(idle, key=lambda one: one.began, default=self)
            victim.transport.abort()
            self.connections.discard(victim)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being read or answered here."""
        return self._is_in_head and (self.cycle is None or self.cycle.response_complete)

    def _start(self, name: str, seconds: float) -> None:
        self._stop(name)
        if name == "head":
            self.began = self.loop.time()
        self._timers[name] = self.loop.call_later(seconds, self._too_late, name)

    def _stop(self, *names: str) -> None:
        for name in names:
            timer = self._timers.pop(name, None)
            if timer is not None:
                timer.cancel()

    def _too_late(self, name: str) -> None:
        self._timers.pop(name, None)
        if name == "write" or self._is_refused:
            self.transport.abort()
        elif self.cycle is not None and not self.cycle.response_complete:
            # An answer may be under way, or the route waits for the rest: it learns of the end.
            self.transport.abort()
        elif self._is_in_head and not self._head_bytes:
            self.transport.close()  # it never asked for anything
        else:
            self._refuse(408, "the request was not received in time")

    # ---- what comes in

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to the parser, and count those that it keeps to itself."""
        if self._is_refused:
            return
        if self._is_in_head:
            if not self._head_bytes and "head" not in self._timers:
                self._start("head", HEAD_TIMEOUT_S)
            self._head_bytes += len(data)
        elif self._is_in_body:
            self._between += len(data)
            self._start("idle", BODY_IDLE_S)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if (self._is_in_head and self._head_bytes > MAX_HEAD) or self._between > 8 * MAX_HEAD:
            self._refuse(431, f"request line and headers may have at most {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._is_in_head, self._is_in_body = True, False
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind the body."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, count: int) -> None:
        self._field_bytes += count
        if self._field_bytes > MAX_HEAD:
            raise ValueError("too long")  # the parser stops, see send_400_response

    def on_headers_complete(self) -> None:
        """The head is there: from now on it is the body's time."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        self._stop("head")
        self._is_in_head, self._is_in_body = False, True
        self._head_bytes = self._between = 0
        self._start("body", BODY_TIMEOUT_S)
        self._start("idle", BODY_IDLE_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._between = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._stop("body", "idle")
        self._is_in_head, self._is_in_body = True, False
        self._head_bytes = self._between = 0
        super().on_message_complete()

    # ---- what goes out

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it, ends the connection."""
        if self._field_bytes_exceeded:
            self._refuse(431, f"request line and headers may have at most {MAX_HEAD} bytes")
        else:
            self._refuse(400, msg)

    @property
    def _field_bytes_exceeded(self) -> bool:
        return getattr(self, "_field_bytes", 0) > MAX_HEAD

    def _refuse(self, status: int, detail: str) -> None:
        """Answer and close; where an answer is under way, only close."""
        if self._is_refused:
            return
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json.dumps(problem_body("", status, detail)).encode()
        head = [
            STATUS_LINE[status],
            b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
            b"connection: close\r\n\r\n",
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read its answer."""
        super().pause_writing()
        self._start("write", WRITE_TIMEOUT_S)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop("write")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop(*self._timers)
        super().connection_lost(exc)
