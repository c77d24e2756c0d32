"""Requests over loopback as a trace has them, sent when they are due whatever became of those before; and a server to ask.

A client that waits for an answer before it sends the next one (a closed loop) slows down with the server, and what would have
been late is never asked. Here each request is due at a moment of the trace, and its latency counts from that moment, whether a
connection was free by then or not. The trace is the file that the simulator replays, and the outcome has the simulator's type,
so that both are judged by one code. The client speaks just enough HTTP, since it shares the processor with who is measured.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

from pennyweight.core import measure, memory
from pennyweight.core.errors import DeviceError
from pennyweight.data.requests import Arrivals
from pennyweight.model.bundle import Policy
from pennyweight.schedule.simulate import FATES, Replay, capacity, fluid
from pennyweight.serve import binary

CONNECTIONS = 512
"""At most; a server that falls behind is not to be measured by how it opens thousands."""
LOST, CUT = 0, -1
"""In place of a status: no answer within the time; the connection was cut."""
START_S = 300


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, owner: Asker) -> None:
        self.owner = owner
        self.place = -1
        self.buffer = bytearray()
        self.transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[: end + 2].lower()
        start = head.find(b"content-length: ")
        assert start > 0, "an answer without its length"
        size = int(head[start + 16 : head.find(b"\r\n", start)])
        if len(self.buffer) < end + 4 + size:
            return
        assert len(self.buffer) == end + 4 + size and self.place >= 0, "an answer nobody asked for"
        status, body = int(self.buffer[9:12]), bytes(self.buffer[end + 4 :])
        closing = b"\r\nconnection: close" in head
        self.buffer.clear()
        place, self.place = self.place, -1
        if closing:
            self.transport.close()
        self.owner.answered(self, place, status, body, closing)

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.lost(self)

    def ask(self, place: int, data: bytes) -> None:
        self.place = place
        self.transport.write(data)


class Asker:
    """What is sent, on as many connections as it takes, and what came back."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes] | Callable[[int], bytes], total: int) -> None:
        self.host, self.port = host, port
        self.request = requests if callable(requests) else requests.__getitem__
        self.status = np.zeros(total, np.int16)
        self.when = np.full(total, np.inf)
        self.bodies: list[bytes] = [b""] * total
        self.idle: list[Connection] = []
        self.waiting: collections.deque[int] = collections.deque()
        """Requests that are due and have no connection; their time runs."""
        self.open = 0
        self.left = total
        self.done = asyncio.Event()

    async def send(self, place: int) -> None:
        data = self.request(place)
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                return connection.ask(place, data)
        if self.open >= CONNECTIONS:
            return self.waiting.append(place)
        try:
            self.open += 1
            _, made = await asyncio.get_running_loop().create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self.open -= 1
            return self._end(place, CUT)
        made.ask(place, data)

    def answered(self, connection: Connection, place: int, status: int, body: bytes, closing: bool) -> None:
        self.when[place] = time.perf_counter()
        self.bodies[place] = body
        if not closing and self.waiting:
            following = self.waiting.popleft()
            connection.ask(following, self.request(following))
        elif not closing:
            self.idle.append(connection)
        self._end(place, status)

    def lost(self, connection: Connection) -> None:
        self.open -= 1
        if connection.place >= 0:
            self._end(connection.place, CUT)
        if self.waiting:
            self.again = asyncio.get_running_loop().create_task(self.send(self.waiting.popleft()))

    def _end(self, place: int, status: int) -> None:
        self.status[place] = status
        self.left -= 1
        if not self.left:
            self.done.set()

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.close()


def post(path: str, body: bytes, kind: str = binary.KIND, **headers: str) -> bytes:
    """A request as bytes."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value)
    head = f"POST {path} HTTP/1.1\r\nhost: b\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def asks(trace: Arrivals, catalog: int, path: str = "/score") -> list[bytes]:
    """Each request of a trace, to score its candidates: ranks of items, which are the names of what ``Server`` serves."""
    made = []
    for place in range(len(trace)):
        size = int(trace.items[place])
        items = [place % catalog] if size == 1 else trace.candidates(place) % catalog
        tenant, priority = trace.tenants[trace.tenant[place]], trace.priorities[trace.priority[place]]
        made.append(post(path, binary.ask(items), x_tenant=tenant, x_priority=priority))
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """What became of each request of a trace."""

    trace: Arrivals
    status: Any
    """HTTP's, int16 [n]; ``LOST`` or ``CUT``."""
    latency: Any
    """Seconds from when it was due to its answer, whichever that was; infinite without one."""
    bodies: list[bytes]

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return int(np.isin(self.status, (LOST, CUT)).sum())

    def replay(self, policy: Policy, workers: int, *, ours: bool = True) -> Replay:
        """As the simulator has it; a peer's answers name no variant."""
        trace, n = self.trace, len(self.trace)
        names = {v.name: k for k, v in enumerate(policy.variants)}
        well = self.status == 200
        variant = np.full(n, -1, np.int8)
        for place in np.flatnonzero(well):
            variant[place] = names.get(binary.answer(self.bodies[place])[0]["variant"], 0) if ours else 0
        fates = {200: "answered", 429: "late", 422: "poison"}
        fate = np.array([FATES.index(fates.get(int(s), "lost")) for s in self.status], np.int8)  # type: ignore[arg-type]
        spans = {c.name: (c.deadline_ms or policy.deadline_ms) / 1000 for c in policy.classes}
        first = next(iter(spans.values()), policy.deadline_ms / 1000)
        deadline = np.array([spans.get(name, first) for name in trace.priorities])[trace.priority]
        curves = [v.costs["cpu"] for v in policy.variants]
        latency, most = np.where(well, self.latency, np.inf), capacity(policy, curves, trace, workers)
        best = fluid(policy, curves, trace, workers)
        return Replay(
            trace, policy, workers, fate, latency, deadline, variant, well.astype(np.int8), 0.0, 0.0, most, best
        )  # fmt: skip


async def replay(
    host: str,
    port: int,
    trace: Arrivals,
    requests: Sequence[bytes],
    *,
    wait_s: float = 10.0,
    beside: Callable[[float], Coroutine[Any, Any, None]] | None = None,
) -> Live:
    """Send a trace; ``beside`` runs meanwhile, told when it began (``time.perf_counter``)."""
    asker = Asker(host, port, requests, len(trace))
    tasks: set[asyncio.Task[Any]] = set()
    loop = asyncio.get_running_loop()
    memory.settled()
    begin = time.perf_counter() + 0.2
    other = loop.create_task(beside(begin)) if beside is not None else None
    at = trace.at.tolist()
    for place, due in enumerate(at):
        pause = begin + due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        elif place % 32 == 0:
            await asyncio.sleep(0)
        task = loop.create_task(asker.send(place))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    try:
        async with asyncio.timeout(wait_s):
            await asker.done.wait()
    except TimeoutError:
        pass  # what has no answer by now is lost
    if other is not None:
        await other
    asker.close()
    return Live(trace, asker.status.copy(), asker.when - begin - trace.at, asker.bodies)


async def hammer(
    host: str, port: int, request: bytes, connections: int, seconds: float, failing: float = 0.0
) -> tuple[float, float]:
    """A closed loop: each connection asks again as soon as it is answered. Good answers a second, and the p99 in seconds.

    Raises:
        DeviceError: more than the share ``failing`` of all answers were no success.
    """
    times: list[float] = []
    failed = 0

    class Loop(Connection):
        def __init__(self) -> None:
            super().__init__(asker)
            self.since = 0.0

    class Again(Asker):
        def answered(self, connection: Any, place: int, status: int, body: bytes, closing: bool) -> None:
            nonlocal failed
            now = time.perf_counter()
            if status == 200:
                times.append(now - connection.since)
            else:
                failed += 1
            if now < end:
                connection.since = now
                connection.ask(0, request)

        def lost(self, connection: Connection) -> None:
            return

    asker = Again(host, port, lambda place: request, 1)
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Loop, host, port))[1] for _ in range(connections)]
    begin = time.perf_counter()
    end = begin + seconds
    for one in made:
        one.since = time.perf_counter()
        one.ask(0, request)
    await asyncio.sleep(seconds + 0.5)
    for one in made:
        one.transport.close()
    if failed > failing * (failed + len(times)):
        raise DeviceError(f"{failed} of {failed + len(times)} answers were no success; look at the server's output")
    return len(times) / seconds, float(np.percentile(times, 99))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """On a loop of its own, the fast one."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


class Process:
    """A server in a process of its own, that says where it listens on its standard error; or is given a port, and tried.

    What it starts ends with it, and the time it took counts as this process's own: daemons that leave their parents, as Ray's
    and Triton's do, become children of this one.
    """

    def __init__(self, command: Sequence[str], says: str = r"http://127\.0\.0\.1:(\d+)", port: int = 0, **options: Any) -> None:
        self.host, self.port = "127.0.0.1", port
        _adopt_orphans()
        self._before = {child.pid for child in psutil.Process().children()}
        if port:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, text=True, **quiet, **options)
            self._tried(command)
            return
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
        assert self.process.stderr is not None
        told = []
        while line := self.process.stderr.readline():
            told.append(line)
            if found := re.search(says, line):
                self.port = int(found[1])
                # a log nobody reads fills its pipe, and then whoever writes to it waits
                self._log = threading.Thread(target=collections.deque, args=(self.process.stderr, 100), daemon=True)
                self._log.start()
                return
        raise DeviceError(f"{' '.join(command[:4])} did not start: {''.join(told)[-2000:]}")

    def _tried(self, command: Sequence[str]) -> None:
        end = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < end:
            try:
                socket.create_connection((self.host, self.port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        self.process.kill()
        raise DeviceError(f"{' '.join(command[:3])} did not listen on port {self.port} within {START_S} s; run it by hand")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        took, waited = self._seconds(), _waited_s()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        patience = 5.0
        while left := self._left():  # a peer's workers may outlive it, and work on
            for one in psutil.wait_procs(left, timeout=patience)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            patience = 0.5
        measure.Foreign.lost_s += max(0.0, took - (_waited_s() - waited))
        if self.process.stderr is not None:
            self._log.join(5)
            if not self._log.is_alive():  # else somebody who was not found holds its end
                self.process.stderr.close()

    def _seconds(self) -> float:
        """Of the processor, by it and all it started and waited for."""
        total, family = 0.0, self._left()
        for one in list(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                family += one.children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:4])
        return total

    def _left(self) -> list[psutil.Process]:
        """What it started and is still there; what has ended is waited for by whoever asks for it."""
        return [child for child in psutil.Process().children() if child.pid not in self._before]

    def workers(self) -> list[psutil.Process]:
        """The processes that score, the oldest first: the last one is the spare."""
        children = psutil.Process(self.process.pid).children()
        return sorted((c for c in children if "pennyweight.serve.child" in c.cmdline()), key=lambda c: c.create_time())


def _waited_s() -> float:
    """Seconds of the processor by children that were waited for."""
    return sum(os.times()[2:4])


def _adopt_orphans() -> None:
    """Have this process be the parent of those whose own has ended (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def free() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def serve(folder: Path, workers: int = 2, *, spares: int = 0, token: str = "") -> Process:
    """``pennyweight serve`` of a bundle, on a free port."""
    command = [sys.executable, "-m", "pennyweight", "serve", str(folder), "--port", "0", "--allow", "benchmarks.device"]
    options = ["--workers", str(workers), "--spares", str(spares), "--store", str(folder.parent / "events.db")]
    root = str(Path(__file__).parents[1])
    return Process([*command, *options], env={**os.environ, "PYTHONPATH": root, "PENNYWEIGHT_TOKEN": token})
