"""Uvicorn's HTTP protocol with bounds on what a connection may cost: time, memory, and their number.

Uvicorn leaves these to a proxy in front. A service that is reached without one must survive a head that never ends or never
comes, a client that reads nothing, and ten thousand that say nothing: each is cut off after some seconds, and holds no more
than some kilobytes meanwhile. What is refused here has the same shape of error as everything else.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pennyweight.serve import messages as m

HEAD_S = 10.0
"""Seconds a client has for a request's head, from the connection or from the head's first byte."""
SEND_S = 30.0
"""Seconds a client has to read some of an answer that waits for it."""
HEAD_BYTES = 1 << 16
"""Bytes of a request's head."""
RESERVED = 256
"""File descriptors that are not for connections."""


def connections() -> int:
    """How many connections there may be: as many as this process may open files, after asking for all it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(64, soft - RESERVED)


class Guarded(HttpToolsProtocol):
    """One connection, bounded."""

    most = 1 << 16
    """Connections at once (see ``connections``)."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head = 0
        self._in_head = False
        self._slow: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            return self._refuse(503, "crowded", f"{self.most} clients are connected; try again later")
        self._slow = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        for timer in (self._slow, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse(431, "head_too_large", f"the request's head has more than {HEAD_BYTES} bytes; shorten it")
            elif self._slow is None and self._head:
                self._slow = self.loop.call_later(HEAD_S, self._late)

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head, self._head = False, 0
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(400, "bad_request", "this is not an HTTP request; send HTTP/1.1, as curl does")

    def pause_writing(self) -> None:
        """The client reads more slowly than we answer."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(SEND_S, self._unheard)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_response_complete(self) -> None:
        """An answer is written, though perhaps not read."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and self._unread is None:
            self._unread = self.loop.call_later(SEND_S, self._unheard)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more is asked."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _late(self) -> None:
        self._slow = None
        if self._head:
            self._refuse(408, "slow", f"the request's head did not arrive within {HEAD_S:g} s; send it again")
        else:
            self.transport.abort()

    def _unheard(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, status: int, code: str, text: str) -> None:
        message, _, remedy = text.partition("; ")
        body = msgspec.json.encode(m.Failure(m.Problem(status, code, message, remedy)))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
