"""HTTP on a connection, with bounds on what it may cost: time, memory, and their number.

Uvicorn keeps the sockets, the signals and the clock, httptools parses; what happens on a connection is ours. Uvicorn's own
protocol makes a scope, an event, a cycle and two messages of every request, which is more than half of what an answer by a
small model costs; and it leaves bounds to a proxy in front. Here a request is collected whole, answered by one call, and
written at once. A client says the same head again and again: one that came before, byte for byte, is not parsed again. A
service that is reached without a proxy must survive a head that never ends or never comes, a client that reads nothing, and
ten thousand that say nothing: each is cut off after some seconds, and holds no more than some kilobytes meanwhile. What is
refused here has the same shape of error as everything else. Work for a client that leaves is cancelled.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import http
import resource
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
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

KNOWN, KNOWN_BYTES = 512, 1024
"""Heads that are kept parsed, and how long one may be for that."""
SPECIAL = {b"expect", b"transfer-encoding", b"upgrade"}
"""Headers that make more of a request than a head and so many bytes."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values."""


class Aim(Protocol):
    """What a request's head asks for."""

    @property
    def method(self) -> str:
        """HTTP's."""


class Begun(Protocol):
    """An answer that is under way without a task."""

    def cancel(self, msg: object = None) -> object:
        """Nobody waits for it any more."""


class Answering(Protocol):
    """An application that answers whole requests."""

    most: int
    """Bytes of a body."""
    alarms: tuple[Alarm, Alarm, Alarm]
    """For heads, bodies and silence, of all connections together."""
    heads: dict[bytes, Head]
    """Those that came before, as bytes: clients say the same again and again."""

    def target(self, method: str, url: bytes, headers: Headers) -> Any:
        """What a head asks for: an ``Aim``."""

    def begin(self, target: Any, body: bytes, done: Callable[[Reply], None]) -> Reply | Begun | None:
        """The answer; or ``done`` is called with it later; None where it takes a task."""

    async def reply(self, target: Any, body: bytes) -> Reply:
        """The answer."""

    def left(self) -> None:
        """A client left before its answer."""


class Head(NamedTuple):
    """A request's head, parsed."""

    target: Aim
    length: int
    """Bytes of the body."""
    keep: bool
    """Whether the connection is kept."""


Request = tuple[Head, bytes]
"""A request that is here whole: its head and its body."""


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
        self._task: asyncio.Task[None] | Begun | None = None
        self._asked: Head
        """The request that is being answered."""
        self._known, self._whole_head = self._app.heads, b""
        """Heads that came before, and one that came in one piece and may be kept with them."""
        self._waiting = collections.deque[Request]()
        """Requests that came before the one ahead was answered."""
        self._keep = True
        self._gone = self._full = self._paused = False
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
            self._server.tasks.discard(self._task)
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
        self._whole_head = b""
        if self._task is None and not self._head and self._part != "body" and not self._waiting:
            end = data.find(b"\r\n\r\n") + 4
            head = data[:end]
            known = self._known.get(head)
            if known is not None and len(data) == end + known.length:  # the parser would say what it said before
                self._whole()
                self._waiting.append((known, data[end:]))
                return self._next()
            if 4 < end <= KNOWN_BYTES and head[:1].isalpha():
                self._whole_head = head
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
        target, keep = self._app.target(self._method, self._url, self._headers), self._parser.should_keep_alive()
        head = Head(target, len(body), keep)
        self._waiting.append((head, body))
        if self._whole_head and self._method in ("GET", "POST") and SPECIAL.isdisjoint(name for name, _ in self._headers):
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[self._whole_head] = head
        self._whole_head = b""
        if self._task is None:
            self._next()
        elif not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _whole(self) -> None:
        """What was waited for is there, or nobody waits for it any more."""
        if self._alarm:
            (self._heads if self._part == "head" else self._bodies).off(self._alarm)
        self._part, self._alarm = "", 0

    # -- its answer ----------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Answer the next request, or wait for one."""
        while self._task is None and not self._full and not self._gone:
            if not self._waiting:
                if not self._part:
                    self._silence = self._silences.set(KEEP_S, self._silent)
                return
            self._asked, body = self._waiting.popleft()
            target = self._asked.target
            if self._paused and not self._waiting:
                self._paused = False
                self._transport.resume_reading()
            begun = self._app.begin(target, body, self._told)
            if isinstance(begun, Reply):
                if not self._answered(begun):
                    return
                continue
            if begun is None:
                self._task = task = self._loop.create_task(self._answer(target, body))
                task.add_done_callback(self._server.tasks.discard)
            else:
                self._task = begun
            self._server.tasks.add(self._task)  # type: ignore[arg-type]

    async def _answer(self, target: Aim, body: bytes) -> None:
        try:
            reply = await self._app.reply(target, body)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            return self._app.left()  # nobody is there to be told
        if self._answered(reply):
            self._next()

    def _told(self, reply: Reply) -> None:
        """An answer that was begun."""
        self._server.tasks.discard(self._task)
        if self._answered(reply):
            self._next()

    def _answered(self, reply: Reply) -> bool:
        """Send an answer; whether another may follow."""
        self._task = None
        self._server.total_requests += 1
        if self._gone:
            return False
        self._keep = self._keep and self._asked.keep
        self._write(reply, self._asked.target.method == "HEAD")
        if self._last is not None:
            self._refuse(self._last)
            return False
        return self._keep

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


def split(url: bytes) -> tuple[str, bytes]:
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
