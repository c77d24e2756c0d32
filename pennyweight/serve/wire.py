"""HTTP on a connection, with bounds on what it may cost: time, memory, and their number.

Uvicorn keeps the sockets, the signals and the clock, httptools parses; what happens on a connection is ours. Uvicorn's own
protocol makes a scope, an event, a cycle and two messages of every request, which is more than half of what an answer by a
small model costs; and it leaves bounds to a proxy in front. Here a request is collected whole, answered by one call, and
written at once. A service that is reached without a proxy must survive a head that never ends or never comes, a client that
reads nothing, and ten thousand that say nothing: each is cut off after some seconds, and holds no more than some kilobytes
meanwhile. What is refused here has the same shape of error as everything else. Work for a client that leaves is cancelled.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import http
import resource
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.server import ServerState

from pennyweight.core.errors import RequestError, TooLarge
from pennyweight.serve.alarm import Alarm
from pennyweight.serve.reply import Reply, failed, fields, problem

HEAD_S = 10.0
"""Seconds a client has for a request's head, from the connection or from the head's first byte."""
BODY_S = 30.0
"""Seconds it has for the body."""
SEND_S = 30.0
"""Seconds it has to read some of an answer that waits for it."""
KEEP_S = 5.0
"""Seconds after which a connection is closed on which nothing more is asked."""
HEAD_BYTES = 1 << 16
"""Bytes of a request's head."""
RESERVED = 256
"""File descriptors that are not for connections."""

SLOW = "the body did not arrive within {:g} s; send it again"

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values."""
Request = tuple[str, bytes, Headers, bytes, bool]
"""Method, target, headers, body, and whether the connection is kept."""


class Answering(Protocol):
    """An application that answers whole requests."""

    most: int
    """Bytes of a body."""
    alarms: tuple[Alarm, Alarm, Alarm]
    """For heads, bodies and silence, of all connections together."""

    async def reply(self, method: str, path: str, query: bytes, headers: Headers, body: bytes) -> Reply:
        """The answer."""

    def left(self) -> None:
        """A client left before its answer."""


def connections() -> int:
    """How many connections there may be: as many as this process may open files, after asking for all it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(64, soft - RESERVED)


class Connection(asyncio.Protocol):
    """One connection, as ``uvicorn.Config(http=Connection)`` makes it."""

    most = 1 << 16
    """Connections at once (see ``connections``)."""

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, app_state: Any, _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._app: Answering = config.app  # type: ignore[assignment]
        self._loop = _loop or asyncio.get_running_loop()
        self._server = server_state
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # what comes after the last request is no error
        self._transport: asyncio.Transport
        self._heads, self._bodies, self._silences = self._app.alarms
        self._method, self._url, self._headers, self._body = "", b"", Headers(), list[bytes]()
        self._size = self._head = 0
        """Bytes of the body so far, and of a head that is not whole."""
        self._part = ""
        """What of a request is not whole: its ``head``, its ``body``, or nothing."""
        self._alarm = 0
        """For the end of that."""
        self._silence = 0
        self._task: asyncio.Task[None] | None = None
        self._waiting = collections.deque[Request]()
        """Requests that came before the one ahead was answered."""
        self._keep = True
        self._gone = self._full = False
        self._last: Reply | None = None
        """A refusal that is to be said after the answer that is under way."""
        self._unread: asyncio.TimerHandle | None = None

    # -- the connection ------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport  # type: ignore[assignment]
        self._server.connections.add(self)  # type: ignore[arg-type]
        if len(self._server.connections) > self.most:
            return self._refuse(problem(503, "crowded", f"{self.most} clients are connected; try again later"))
        self._part, self._alarm = "head", self._heads.set(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._gone = True
        self._server.connections.discard(self)
        self._whole()
        self._silences.off(self._silence)
        self._waiting.clear()
        if self._unread is not None:
            self._unread.cancel()
        if self._task is not None:
            self._task.cancel()

    def shutdown(self) -> None:
        """The service stops: what is under way is answered, nothing more is taken."""
        self._keep = False
        if self._task is None:
            self._transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than we answer."""
        self._full = True
        if self._unread is None:
            self._unread = self._loop.call_later(SEND_S, self._unheard)

    def resume_writing(self) -> None:
        """It has read."""
        self._full = False
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        self._next()

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        if self._transport.is_closing() or self._last is not None:
            return
        self._silences.off(self._silence)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._keep = False  # the request is answered as if it had not asked for another protocol
        except httptools.HttpParserError:
            return self._refuse(problem(400, "bad_request", "this is not an HTTP request; send HTTP/1.1, as curl does"))
        if not self._part or self._transport.is_closing():
            return
        if self._part == "body":
            self._alarm = self._alarm or self._bodies.set(BODY_S, self._late)
            return
        self._head += len(data)
        if self._head > HEAD_BYTES:
            text = f"the request's head has more than {HEAD_BYTES} bytes; shorten it"
            self._refuse(problem(431, "head_too_large", text))
        elif not self._alarm:
            self._alarm = self._heads.set(HEAD_S, self._late)

    # -- a request, as the parser tells it -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self._part, self._url, self._headers, self._body, self._size = "head", b"", [], [], 0

    def on_url(self, url: bytes) -> None:
        """Some of what is asked for."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._whole()
        self._part, self._head, self._method = "body", 0, self._parser.get_method().decode("ascii")
        for name, value in self._headers:
            if name == b"content-length" and int(value) > self._app.most:
                return self._too_large(int(value))
            if name == b"expect" and value.lower() == b"100-continue" and self._task is None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        if self._transport.is_closing() or self._last is not None:
            return  # it was refused already
        self._size += len(body)
        if self._size > self._app.most:
            return self._too_large(self._size)
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._whole()
        if self._transport.is_closing() or self._last is not None:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._waiting.append((self._method, self._url, self._headers, body, self._parser.should_keep_alive()))
        if self._task is None:
            self._next()
        elif len(self._waiting) == 1:
            self._transport.pause_reading()

    def _whole(self) -> None:
        """What was waited for is there, or nobody waits for it any more."""
        if self._alarm:
            (self._heads if self._part == "head" else self._bodies).off(self._alarm)
        self._part, self._alarm = "", 0

    # -- its answer ----------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Answer the next request, or wait for one."""
        if self._task is not None or self._full or self._gone:
            return
        if self._waiting:
            request = self._waiting.popleft()
            self._task = task = self._loop.create_task(self._answer(*request))
            self._server.tasks.add(task)
            task.add_done_callback(self._server.tasks.discard)
            if not self._waiting:
                self._transport.resume_reading()
        elif not self._part:
            self._silence = self._silences.set(KEEP_S, self._silent)

    async def _answer(self, method: str, url: bytes, given: Headers, body: bytes, keep: bool) -> None:
        try:
            path, query = _target(url)
            reply = await self._app.reply(method, path, query, given, body)
        except RequestError as error:
            reply = failed(error)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            return self._app.left()  # nobody is there to be told
        self._task = None
        self._server.total_requests += 1
        if self._gone:
            return
        self._keep = self._keep and keep
        self._write(reply, method == "HEAD")
        if self._last is not None:
            self._refuse(self._last)
        elif self._keep:
            self._next()

    def _write(self, reply: Reply, head: bool = False) -> None:
        begin, dated = _head(reply.status, reply.kind, reply.headers), _dated(self._server)
        end = b"\r\n\r\n" if self._keep else b"\r\nconnection: close\r\n\r\n"
        body = b"" if head else reply.body
        self._transport.write(b"%s%scontent-length: %d%s%s" % (begin, dated, len(reply.body), end, body))
        if not self._keep:
            self._transport.close()
        if self._unread is None and self._transport.get_write_buffer_size():
            self._unread = self._loop.call_later(SEND_S, self._unheard)

    # -- bounds --------------------------------------------------------------------------------------------------------------

    def _refuse(self, reply: Reply) -> None:
        """Say why, and close the connection."""
        self._whole()
        self._waiting.clear()
        if self._task is not None:
            self._last = reply
            return
        self._keep = False
        self._write(reply)

    def _too_large(self, size: int) -> None:
        most = self._app.most
        self._refuse(failed(TooLarge(f"a body of {size} bytes or more, and {most} are taken; send it in parts")))

    def _late(self) -> None:
        self._alarm = 0
        if self._part == "body":
            self._refuse(failed(RequestError(SLOW.format(BODY_S))))
        elif self._head:
            self._refuse(problem(408, "slow", f"the request's head did not arrive within {HEAD_S:g} s; send it again"))
        else:
            self._transport.abort()

    def _silent(self) -> None:
        self._silence = 0
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def _unheard(self) -> None:
        self._unread = None
        if self._transport.get_write_buffer_size():
            self._transport.abort()


def _target(url: bytes) -> tuple[str, bytes]:
    """Path and query string of what is asked for.

    Raises:
        RequestError: it is no URL.
    """
    if url[:1] == b"/" and b"%" not in url and b"?" not in url and b"#" not in url:
        return url.decode("latin-1"), b""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError as error:
        raise RequestError("that is no URL's path; ask for one of /docs") from error
    return unquote((parsed.path or b"/").decode("latin-1")), parsed.query or b""


@functools.lru_cache(256)
def _head(status: int, kind: str, more: tuple[tuple[str, str], ...]) -> bytes:
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
    return line.encode() + b"".join(b"%s: %s\r\n" % pair for pair in fields(kind, more))


_date: tuple[object, bytes] = (None, b"")


def _dated(server: ServerState) -> bytes:
    """The headers that Uvicorn gives all answers, which change once a second."""
    global _date
    if _date[0] is not server.default_headers:
        _date = server.default_headers, b"".join(b"%s: %s\r\n" % pair for pair in server.default_headers)
    return _date[1]
