"""Clients that are slow, rude or silent, over a real socket: each costs little, is cut off, and harms no other."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn

from pennyweight.model.bundle import Bundle
from pennyweight.serve import app as server
from pennyweight.serve import wire
from pennyweight.serve.wire import Connection, connections

Scene = Callable[[int], Awaitable[Any]]


@pytest.fixture
def at_socket(serve: Callable[[Bundle], Any], cascade: Bundle) -> Callable[[Scene], Any]:
    """Runs a scene against the service on a port, which it is told."""
    client = serve(cascade)

    async def whole(scene: Scene) -> Any:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(client.app, http=Connection, lifespan="off", log_level="critical", access_log=False, ws="none")
        one = uvicorn.Server(config)
        one.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(one._serve([listener]))
        while not one.started:
            await asyncio.sleep(0.01)
        try:
            return await scene(listener.getsockname()[1])
        finally:
            one.should_exit = one.force_exit = True
            await task

    def run(scene: Scene) -> Any:
        return client.run(whole(scene))

    run.app = client.app  # type: ignore[attr-defined]
    return run


async def said(port: int, data: bytes) -> bytes:
    """All that is answered until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


def failure(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    error = json.loads(body)["error"]
    assert error["status"] == status and error["remedy"]
    message: str = error["message"]
    return message


async def well(port: int) -> None:
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://127.0.0.1:{port}/health", timeout=60)).status_code == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n"])
def test_what_is_no_http_is_400_in_the_one_shape(at_socket: Any, data: bytes) -> None:
    async def scene(port: int) -> bytes:
        answer = await said(port, data)
        await well(port)
        return answer

    assert "not an HTTP request" in failure(at_socket(scene), 400)


@pytest.mark.parametrize("piece", [b"a: b\r\n", b"a" * 64])
def test_a_head_without_end_is_refused_when_it_is_too_large(at_socket: Any, piece: bytes) -> None:
    async def scene(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\n")
        sent = 0
        try:
            while sent < 4 * wire.HEAD_BYTES:
                writer.write(piece * 100)
                sent += 100 * len(piece)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        await well(port)
        try:
            return await reader.read()
        except ConnectionResetError:  # what was still being sent met a closed connection
            return b""

    answer = at_socket(scene)
    assert not answer or "more than 65536 bytes" in failure(answer, 431)


def test_a_head_that_stops_is_cut_off_and_one_that_never_begins_too(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_S", 0.2)

    async def scene(port: int) -> tuple[bytes, bytes, bytes]:
        half = said(port, b"GET /health HTTP/1.1\r\nhost: x\r\n")
        silent = said(port, b"")
        after = said(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
        return tuple(await asyncio.gather(half, silent, after))  # type: ignore[return-value]

    half, silent, after = at_socket(scene)
    assert "did not arrive within 0.2 s" in failure(half, 408) and silent == b""
    assert after.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in after


def test_a_body_that_stops_is_400(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BODY_S", 0.2)
    head = b"POST /score HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{"
    assert "did not arrive" in failure(at_socket(lambda port: said(port, head)), 400)


def test_a_client_that_reads_nothing_is_cut_off(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SEND_S", 0.3)

    async def scene(port: int) -> bool:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, ("127.0.0.1", port))
        ask = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
        try:
            async with asyncio.timeout(60):
                while True:  # each answer is some kilobytes that are never read
                    await loop.sock_sendall(deaf, ask * 50)
                    await asyncio.sleep(0.02)
        except (ConnectionError, BrokenPipeError):
            return True
        except TimeoutError:
            return False
        finally:
            deaf.close()
            await well(port)

    assert at_socket(scene)


def test_more_clients_than_there_may_be_are_told_so(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "most", 5)

    async def scene(port: int) -> bytes:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        refused = await said(port, b"")
        for _, writer in idle:
            writer.close()
        await asyncio.sleep(0.1)
        await well(port)
        return refused

    assert "5 clients are connected" in failure(at_socket(scene), 503)


def test_many_idle_connections_harm_nobody(at_socket: Any) -> None:
    """As many as there are descriptors for, up to 2,000: ten thousand differ in number only."""
    many = min(2_000, connections() // 2 - 100)

    async def scene(port: int) -> None:
        idle = []
        for _ in range(many // 50):
            idle += await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(50)))
        await well(port)
        for _, writer in idle:
            writer.close()

    at_socket(scene)


def test_an_answer_may_take_longer_than_a_head(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_S", 0.2)
    answer = server.App._answer

    async def slow(*given: Any) -> server.Reply:
        await asyncio.sleep(0.6)
        return await answer(*given)

    monkeypatch.setattr(server.App, "_answer", slow)
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert at_socket(lambda port: said(port, head)).startswith(b"HTTP/1.1 200")


SCORE = b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%s\r\n%s"
ASKS = {
    "get": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "head": b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "query": b"GET /recommend?user=15&k=3 HTTP/1.1\r\nhost: x\r\n\r\n",
    "score": SCORE % (13, b"", b'{"items":[3]}'),
    "score of another": SCORE % (13, b"", b'{"items":[4]}'),
    "a user's, whose events are read": SCORE % (25, b"", b'{"user":15,"items":[3,9]}'),
    "a body that is no JSON": SCORE % (13, b"", b'{"items":[3}}'),
    "a deadline": SCORE % (13, b"x-deadline-ms: 900\r\n", b'{"items":[3]}'),
    "a deadline that is none": SCORE % (13, b"x-deadline-ms: -1\r\n", b'{"items":[3]}'),
    "no class": SCORE % (13, b"x-priority: no\r\n", b'{"items":[3]}'),
    "no path": b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n",
    "no method": b"PUT /score HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
    "no host": b"GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    "in chunks": b"POST /score HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nd\r\n"
    + b'{"items":[3]}'
    + b"\r\n0\r\n\r\n",
    "after an empty line": b"\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n",
}


def test_a_head_that_came_before_means_what_it_meant(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        size = 0 if data.startswith(b"HEAD") else int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return head.split(b"\r\n")[0] + await reader.readexactly(size)

    async def scene(port: int) -> list[list[bytes]]:
        found = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            found.append([await ask(reader, writer, data) for data in ASKS.values()])
            cut, score = 40, ASKS["score"]
            writer.write(score[:cut])
            await asyncio.sleep(0.02)
            found[-1].append(await ask(reader, writer, score[cut:]))
            found[-1].append(await ask(reader, writer, score * 2))
            found[-1].append(await ask(reader, writer, b""))
            writer.close()
        return found

    first, second, third = at_socket(scene)
    monkeypatch.setattr(wire, "KNOWN_BYTES", 0)
    at_socket.app.heads.clear()
    for plain in at_socket(scene):
        assert first == second == third == plain
    assert first[3] != first[4] and len(set(first)) > 9


def test_heads_that_never_come_again_take_little_memory(at_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "KNOWN", 20)
    known: list[int] = []

    async def scene(port: int) -> None:
        async with httpx.AsyncClient() as http:
            for k in range(50):
                await http.get(f"http://127.0.0.1:{port}/health", headers={"x-trace": str(k)})
                known.append(len(at_socket.app.heads))

    at_socket(scene)
    assert max(known) == 20 and min(known) == 1
