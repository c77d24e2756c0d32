"""HTTP over the service: a plain ASGI application, one table of routes, one shape for every failure.

A framework (FastAPI, Starlette) brings routing by pattern, dependency injection and middleware; there are ten fixed paths
here, and a framework's share of a one-millisecond answer would be half of it. Uvicorn speaks HTTP. The application runs
without a socket too: ``get`` asks it in the same process, which is how the tests and ``serve --get`` use it.

A failure says what was wrong and, after a semicolon in our errors, what to do: these become ``message`` and ``remedy``. What
we did not foresee is a 500 with a number to find its trace by in the log, and no trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hmac
import importlib.resources
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import numpy as np
import uvicorn
import uvloop

import pennyweight
from pennyweight.core import hardware, memory
from pennyweight.core.errors import (
    DeviceError,
    Forbidden,
    NotFound,
    PennyweightError,
    RequestError,
    StorageError,
    TooLarge,
)
from pennyweight.model import bundle as bundles
from pennyweight.model.bundle import Bundle
from pennyweight.schedule.queue import Ticket
from pennyweight.serve import binary, wire
from pennyweight.serve import messages as m
from pennyweight.serve.alarm import Alarm
from pennyweight.serve.binary import KIND
from pennyweight.serve.engine import Answer, Engine
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.openapi import Codec, Route, document
from pennyweight.serve.pool import Pool
from pennyweight.serve.reply import Reply, failed, fields, problem
from pennyweight.serve.service import Service
from pennyweight.serve.wire import Connection, connections

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = logging.getLogger("pennyweight.serve")
Given = Mapping[bytes, bytes]
"""Headers by their names in lower case."""
BINARY, encode = KIND.encode(), msgspec.json.Encoder(enc_hook=np.ndarray.tolist).encode

STOP_S = 30
"""Seconds that accepted requests are given when the service stops."""
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Target(msgspec.Struct, frozen=True):
    """What the head of a request asks for; the same for every request with that head."""

    method: str
    path: str
    """As it is counted."""
    query: bytes = b""
    route: Route | None = None
    packed: Codec | None = None
    """How bodies are read and written where they are not JSON."""
    said: m.Scheduled | None = None
    """What headers say of its scheduling."""
    reply: Reply | None = None
    """The answer, where it needs no more."""


class Seat:
    """A request for scores that was begun: what a task and its future would be, for less."""

    __slots__ = ("_app", "_done", "_over", "ask", "start", "target", "ticket")

    def __init__(self, app: App, target: Target, ask: Any, start: float, done: Callable[[Reply], None]) -> None:
        self._app, self._done, self._over = app, done, False
        self.target, self.ask, self.start = target, ask, start
        self.ticket: Ticket | None = None

    def done(self) -> bool:
        """Whether nobody waits here any more."""
        return self._over

    def set_result(self, result: Answer | Exception, /) -> None:
        """Answer it."""
        self._over, self.ticket = True, None  # which holds this: neither is left to the collector of cycles
        self._done(self._app.told(self, result))

    set_exception = set_result

    def cancel(self, msg: object = None) -> None:
        """The client has left, or the service gives up."""
        if not self._over:
            self._over = True
            assert self.ticket is not None
            self._app.service.engine.leave(self.ticket)
            self._app.left()


class App:
    """The ASGI application of one bundle and one event log."""

    def __init__(self, service: Service, token: str = "") -> None:
        self.service = service
        self._token = token
        self.alarms = Alarm(), Alarm(), Alarm()
        """For heads, bodies and silence, of all connections together."""
        self.heads: dict[bytes, wire.Head] = {}
        self.most = max(1 << 20, 64 * service.policy.candidates)
        """Bytes of a body."""
        self._kept: set[asyncio.Future[Any]] = set()

    @classmethod
    def open(cls, bundle: str | Path, store: str | Path | None = None, allow: Sequence[str] = ()) -> App:
        """The application for a bundle's folder.

        Events go to ``events.db`` beside it unless ``store`` names a file or the URL of a Valkey or Redis server.

        Raises:
            BundleError, ConfigError: the bundle cannot be loaded or served.
            DataError, DeviceError, StorageError: the event log cannot be used.
        """
        path = Path(bundle)
        return cls(Service(bundles.load(path), store or path.absolute().parent / "events.db", allow))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it: under Uvicorn's own protocol or another server, whose bounds are its own."""
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return  # a websocket: the server answers 403 to an application that does not accept
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        try:
            async with asyncio.timeout(wire.BODY_S):
                body = await self._read(receive, int(dict(headers).get(b"content-length", b"0")))
        except TimeoutError:
            return await _send(failed(RequestError(wire.SLOW.format(wire.BODY_S))), send)
        except RequestError as error:
            return await _send(failed(error), send)
        target = self._target(scope["method"], scope["path"], scope["query_string"], headers)
        work = asyncio.ensure_future(self.reply(target, body))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return self.left()
            await _send(work.result(), send, head=scope["method"] == "HEAD")
        finally:
            work.cancel()
            gone.cancel()

    def target(self, method: str, url: bytes, headers: wire.Headers) -> Target:
        """What a request's head asks for; headers' names are in lower case."""
        try:
            path, query = wire.split(url)
        except RequestError as error:
            return Target(method, "other", reply=failed(error))
        return self._target(method, path, query, headers)

    async def reply(self, target: Target, body: bytes) -> Reply:
        """Answer one request that is here whole."""
        start = time.perf_counter()
        try:
            reply = target.reply or await self._answer(target, body)
        except Exception as error:
            reply = self._wrong(target, error)
        self._counted(target, reply, start)
        return reply

    def begin(self, target: Target, body: bytes, done: Callable[[Reply], None]) -> Reply | Seat | None:
        """Answer a request for scores without a task of its own: at once, or later by ``done``. None for any other."""
        if target.reply is not None or target.route is not SCORE:
            return None
        start = time.perf_counter()
        try:
            ask = self._ask(target, body)
            seat = Seat(self, target, ask, start, done)
            seat.ticket = self.service.begin(ask, seat)
            if seat.ticket is not None:
                return seat
        except Exception as error:
            reply = self._wrong(target, error)
            self._counted(target, reply, start)
            return reply
        return None

    def told(self, seat: Seat, outcome: Answer | Exception) -> Reply:
        """The answer to a request that was begun."""
        target = seat.target
        try:
            if isinstance(outcome, Exception):
                self.service.wrong(seat.ask, outcome)
                raise outcome
            reply = _said(target, self.service.scores(seat.ask, outcome))
        except Exception as error:
            reply = self._wrong(target, error)
        self._counted(target, reply, seat.start)
        return reply

    def left(self) -> None:
        """A client left before its answer."""
        self.service.metrics.left()

    async def get(self, target: str) -> tuple[int, str]:
        """Status and body of a GET, without a socket."""
        url = urlsplit(target)
        reply = await self.reply(self._target("GET", url.path, url.query.encode(), []), b"")
        return reply.status, reply.body.decode()

    async def close(self) -> None:
        """Finish what was accepted and let go of everything."""
        if self._kept:
            await asyncio.wait(self._kept)
        await self.service.close()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    def _target(self, method: str, path: str, query: bytes, headers: wire.Headers) -> Target:
        counted = path if path in PATHS else "other"
        try:
            found = self._routed("GET" if method == "HEAD" else method, path, query, dict(headers))
        except RequestError as error:
            found = failed(error)
        if isinstance(found, Reply):
            return Target(method, counted, reply=found)
        route, packed, said = found
        return Target(method, counted, query, route, packed, said)

    def _routed(
        self, method: str, path: str, query: bytes, given: Given
    ) -> Reply | tuple[Route, Codec | None, m.Scheduled | None]:
        """Who answers, how bodies are read, what headers say of scheduling; or the answer, where it needs no more."""
        known = PATHS.get(path)
        if known is None:
            raise NotFound(f"no path {path!r}; known: {', '.join(p for p in PATHS if not p.startswith('/page/'))}")
        route = known.get(method)
        if route is None:
            allowed = ", ".join([*known, "HEAD"] if "GET" in known else known)
            return problem(405, "method_not_allowed", f"{path} does not take {method}; use {allowed}", ("allow", allowed))
        if method == "POST" and _foreign(given):
            origin = given[b"origin"].decode("latin-1")
            return problem(403, "foreign_origin", f"a page of {origin} may not write here; ask from the service's own page")
        if isinstance(route, Reply):
            return route
        if route.takes is m.Swap:
            self._entitled(given)
        packed = route.packed if given.get(b"content-type", b"").startswith(BINARY) else None
        return route, packed, _headed(given)

    def _ask(self, target: Target, body: bytes) -> Any:
        """The message of a request."""
        route = target.route
        assert route is not None
        if route.method == "GET":
            ask = _query(target.query, route.takes)
        else:
            ask = target.packed[0](body) if target.packed is not None else _json(body, route.takes)
        if target.said is not None and isinstance(ask, m.Scheduled):
            for field in FIELDS:
                if getattr(ask, field) in ("", None):
                    setattr(ask, field, getattr(target.said, field))
        return ask

    async def _answer(self, target: Target, body: bytes) -> Reply:
        ask, route = self._ask(target, body), target.route
        assert route is not None
        work = route.answer(self.service, ask)
        answer = await (self._through(work) if route.method == "POST" and not isinstance(ask, m.Scheduled) else work)
        return answer if isinstance(answer, Reply) else _said(target, answer)

    def _wrong(self, target: Target, error: Exception) -> Reply:
        if isinstance(error, (RequestError, StorageError)):
            return failed(error)
        number = uuid.uuid4().hex[:12]
        log.error("error %s at %s %s", number, target.method, target.path, exc_info=error)
        return problem(500, "internal", f"something inside the service failed; its log says what, under {number}")

    def _counted(self, target: Target, reply: Reply, start: float) -> None:
        self.service.metrics.answered(target.path, reply.status, time.perf_counter() - start)

    async def _through(self, work: Awaitable[Any]) -> Any:
        """What comes of work that goes on even if its client leaves: what is to be stored, or exchanged."""
        task = asyncio.ensure_future(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return await asyncio.shield(task)

    def _entitled(self, headers: Given) -> None:
        if not self._token:
            raise Forbidden(
                "bundles are exchanged here by who has the service's token, and it was started without one; set "
                "PENNYWEIGHT_TOKEN, or send the process SIGHUP"
            )
        if not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self._token}".encode()):
            raise Forbidden("that is not the service's token; send it as: authorization: Bearer TOKEN")

    async def _read(self, receive: Receive, announced: int) -> bytes:
        body, more, size = [], True, announced
        while more:
            if size > self.most:
                raise TooLarge(f"a body of {size} bytes or more, and {self.most} are taken; send it in parts")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError("the client left before its body arrived")
            body.append(message.get("body", b""))
            size = max(announced, sum(map(len, body)))
            more = message.get("more_body", False)
        return b"".join(body)


def run(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    store: str | Path | None = None,
    allow: Sequence[str] = (),
    workers: int | None = None,
    spares: int = 1,
) -> None:
    """Serve a bundle until Ctrl-C or SIGTERM, then finish what was accepted. Reachable from this machine only by default.

    SIGHUP exchanges the bundle for what its folder holds by then (see ``Service.swap``).

    Args:
        bundle: its folder.
        host: an address to listen on.
        port: where; 0 is a free one.
        store: the event log, ``events.db`` beside the bundle by default.
        allow: import paths of factories that may be loaded.
        workers: processes that score; one a core or GPU by default, 0 scores in this process.
        spares: processes more, loaded and idle, that take a dead one's place.

    Raises:
        DeviceError: the port is in use, the host is not one of this machine's, or a worker could not be started.
        BundleError, ConfigError, DataError, StorageError: as for ``App.open``.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.closing(_listen(host, port)) as listener,
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(Path(bundle), host, listener, store, allow, workers, spares))


async def _serve(
    path: Path,
    host: str,
    listener: socket.socket,
    store: str | Path | None,
    allow: Sequence[str],
    workers: int | None,
    spares: int,
) -> None:
    engine: Callable[[Metrics], Engine] | None = None
    pool: list[Pool] = []
    loaded = bundles.load(path, mapped=True if workers != 0 else None)
    if workers == 0:
        sys.setswitchinterval(0.0005)  # the model's thread and this one take turns: 5 ms of waiting is most of an answer
    if workers != 0:
        device, usual = _devices(loaded)

        def engine(metrics: Metrics) -> Engine:
            pool.append(Pool(path, loaded.policy, workers or usual, metrics, spares=spares, allow=allow, device=device))
            return pool[0]

    service = Service(loaded, store or path.absolute().parent / "events.db", allow, engine)
    app = App(service, os.environ.get("PENNYWEIGHT_TOKEN", ""))
    try:
        if pool:
            await pool[0].start()
        config = uvicorn.Config(
            app,
            http=Connection,
            lifespan="off",
            log_level="error",  # what is no HTTP is not worth a line each time
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=STOP_S,
        )
        shown = f"[{host}]" if ":" in host else host
        Connection.most = connections()
        memory.settled()
        listener.listen(BACKLOG)  # who comes from here on is answered
        print(f"{path} is served on http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)", file=sys.stderr, flush=True)
        if pool:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _exchange, service)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises what it caught again, once it has stopped
            await _Server(config, service).serve(sockets=[listener])
    finally:
        await app.close()


class _Server(uvicorn.Server):
    """Uvicorn, whose stop waits for no other bundle and for no company."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.leave()
        await super().shutdown(sockets)


def _devices(bundle: Bundle) -> tuple[str, int]:
    """What workers compute on, and how many of those there are: GPUs where the bundle places a table on one, else cores."""
    if any(where.startswith("cuda") for where in bundle.placement.tables.values()):
        return "cuda", len(hardware.detect().gpus) or 1
    return "cpu", hardware.limits()[0]


def _exchange(service: Service) -> None:
    """Serve what the bundle's folder holds now; the log says what came of it."""

    async def swap() -> None:
        try:
            done = await service.swap(m.Swap())
            log.warning("serving %s as it is now; %d requests compared", done.bundle, done.compared)
        except PennyweightError as error:
            log.error("the bundle was not exchanged: %s", error)

    task = asyncio.get_running_loop().create_task(swap())
    EXCHANGES.add(task)
    task.add_done_callback(EXCHANGES.discard)


EXCHANGES: set[asyncio.Task[None]] = set()
"""Under way; the loop itself holds a task weakly."""
BACKLOG = 2048


async def get(
    bundle: str | Path, target: str, *, store: str | Path | None = None, allow: Sequence[str] = ()
) -> tuple[int, str]:
    """Status and body of one GET (``/recommend?user=1&k=5``) asked without a port.

    Raises:
        BundleError, ConfigError, DataError, StorageError: as for ``App.open``.
    """
    app = App.open(bundle, store, allow)
    try:
        return await app.get(target)
    finally:
        await app.close()


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is known before the model is loaded."""
    reasons = {
        errno.EADDRINUSE: f"port {port} of {host} is in use; stop what listens there, or name another with --port",
        errno.EACCES: f"port {port} needs rights this user lacks; name one from 1024 on with --port",
    }
    with contextlib.ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            other = f"cannot listen on {host}:{port}: {error.strerror}; name another address with --host"
            raise DeviceError(reasons.get(error.errno or 0, other)) from error
        undo.pop_all()
        return listener


async def _send(reply: Reply, send: Send, head: bool = False) -> None:
    size = (b"content-length", b"%d" % len(reply.body))
    await send({"type": "http.response.start", "status": reply.status, "headers": [size, *fields(reply.kind, reply.headers)]})
    await send({"type": "http.response.body", "body": b"" if head else reply.body})


async def _gone(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


HEADERS = {
    b"x-priority": "priority",
    b"x-tenant": "tenant",
    b"x-deadline-ms": "deadline_ms",
    b"x-degrade": "degrade",
}
FIELDS = tuple(HEADERS.values())


def _headed(headers: Given) -> m.Scheduled | None:
    """What headers say of a request's scheduling, where its body does not."""
    given = {field: headers[name].decode("latin-1") for name, field in HEADERS.items() if name in headers}
    try:
        return msgspec.convert(given, m.Scheduled, strict=False) if given else None
    except msgspec.ValidationError as error:
        raise RequestError(f"a header is wrong: {error}; headers: {b', '.join(HEADERS).decode()}") from error


def _said(target: Target, answer: Any) -> Reply:
    """An answer as its client reads it."""
    return Reply(200, encode(answer)) if target.packed is None else Reply(200, target.packed[1](answer), KIND)


def _foreign(headers: Given) -> bool:
    """Whether a browser sends this for a page of another site."""
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")


def _json(body: bytes, takes: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=takes)
    except msgspec.ValidationError as error:
        raise RequestError(_says(error, takes)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON ({error}); send an object such as {EXAMPLE}") from error


def _query(text: bytes, takes: Any) -> Any:
    """A query string as a message: repeat a name for a list, every other one is given once."""
    lists = {f.name for f in msgspec.structs.fields(takes) if isinstance(f.default_factory, type) and f.default_factory is list}
    found: dict[str, Any] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        if name in lists:
            found.setdefault(name, []).append(value)
        elif name in found:
            raise RequestError(f"{name!r} is given twice; give it once")
        else:
            found[name] = value
    try:
        return msgspec.convert(found, takes, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(_says(error, takes)) from error


EXAMPLE = '{"user": 1, "k": 10}'


def _says(error: msgspec.ValidationError, takes: Any) -> str:
    struct = takes if isinstance(takes, type) else m.Event
    fields = ", ".join(f.name for f in msgspec.structs.fields(struct))
    return f"{error}; {f'fields: {fields}' if fields else 'it takes no fields'} (see /docs)"


async def _metrics(service: Service, ask: m.Nothing) -> Reply:
    return Reply(200, service.metrics.text(), service.metrics.content_type)


async def _openapi(service: Service, ask: m.Nothing) -> Reply:
    return Reply(200, _document())


@functools.cache
def _document() -> bytes:
    return json.dumps(document(ROUTES, pennyweight.__version__)).encode()


def _page() -> dict[str, dict[str, Reply]]:
    root = importlib.resources.files("pennyweight.serve") / "page"
    secure = (("content-security-policy", "default-src 'self'; frame-ancestors 'none'"),)
    return {path: {"GET": Reply(200, (root / name).read_bytes(), kind, secure)} for path, (name, kind) in PAGE.items()}


ROUTES = (
    Route(
        "GET",
        "/recommend",
        "The top k items for a user, or for a list of likes.",
        m.Recommend,
        m.Recommendations,
        Service.recommend,
    ),
    Route("POST", "/recommend", "The same, asked in JSON.", m.Recommend, m.Recommendations, Service.recommend),
    Route(
        "POST",
        "/score",
        "Scores of given items for one person; in binary too (application/octet-stream).",
        m.Score,
        m.Scores,
        Service.score,
        (binary.decode, binary.encode),
    ),
    Route(
        "POST",
        "/events",
        "Store what users did, one event or a list of them.",
        m.Event | list[m.Event],
        m.Stored,
        Service.events,
    ),
    Route("POST", "/swap", "Serve another bundle from now on, if its scores agree.", m.Swap, m.Swapped, Service.swap),
    Route("GET", "/items", "Find items by title.", m.Search, m.Items, Service.items),
    Route("GET", "/users", "Find users by id.", m.Search, m.Users, Service.users),
    Route("GET", "/health", "What is served.", m.Nothing, m.Health, Service.health),
    Route("GET", "/metrics", "Counters for Prometheus.", m.Nothing, None, _metrics),
    Route("GET", "/openapi.json", "This document.", m.Nothing, None, _openapi),
)
PATHS: dict[str, dict[str, Route | Reply]] = {**_page()}  # type: ignore[dict-item]
for _route in ROUTES:
    PATHS.setdefault(_route.path, {})[_route.method] = _route
SCORE = PATHS["/score"]["POST"]
