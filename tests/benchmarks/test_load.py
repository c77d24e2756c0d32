"""The open-loop client, against a server whose answers are known."""

import asyncio
import os
import sys
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.load import CUT, LOST, Live, Process, hammer, post, replay
from pennyweight.core.curve import Curve
from pennyweight.core.measure import Foreign
from pennyweight.data.requests import Load
from pennyweight.model.bundle import Policy, Variant
from pennyweight.serve import binary
from pennyweight.serve.messages import Scores

TRACE = Load(rate=200, seconds=0.25, sizes="fixed", items=1, seed=3).draw()
COSTS = {"cpu": Curve(1.0, 1.0, 0.0)}
POLICY = Policy(deadline_ms=60_000, variants=(Variant("a", costs=COSTS), Variant("b", gap=0.5, costs=COSTS)))
GOOD = binary.encode(Scores(None, False, [1.0], "b", 0.5))


async def scene(answer: Any, **options: Any) -> Live:
    """A trace against a server that answers the n-th request as it is told, and cuts the connection where that is None."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                assert await reader.readexactly(size) == b"body"
                count += 1
                given = answer(count - 1)
                if given is None:
                    break
                status, body = await given if asyncio.iscoroutine(given) else given
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    one = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with one:
        port = one.sockets[0].getsockname()[1]
        return await replay("127.0.0.1", port, TRACE, [post("/score", b"body")] * len(TRACE), **options)


def test_each_request_has_one_answer_and_the_outcome_is_the_simulators() -> None:
    live = asyncio.run(scene(lambda n: (200, GOOD) if n % 2 else (429, b"{}")))
    assert sorted(set(live.status.tolist())) == [200, 429] and live.lost == 0
    replayed = live.replay(POLICY, 1)
    assert replayed.on_time == pytest.approx((live.status == 200).mean())
    assert replayed.mix == {"a": 0.0, "b": 1.0} and replayed.sheds == {"late": int((live.status == 429).sum())}
    assert replayed.quality == pytest.approx(replayed.on_time / 2)


def test_latency_counts_from_when_a_request_was_due_though_it_was_held_up() -> None:
    """The first answer takes half a second; with one who waits for it the others would be sent late, and look quick."""

    async def slow() -> tuple[int, bytes]:
        await asyncio.sleep(0.5)
        return 200, GOOD

    live = asyncio.run(scene(lambda n: slow()))
    assert (live.latency >= 0.5).all() and live.lost == 0


def test_cut_connections_and_missing_answers_are_lost() -> None:
    live = asyncio.run(scene(lambda n: None if n == 3 else (200, GOOD)))
    assert live.lost == 1 and (live.status == CUT).sum() == 1

    async def never() -> tuple[int, bytes]:
        await asyncio.sleep(3600)
        raise AssertionError

    live = asyncio.run(scene(lambda n: never() if n == 0 else (200, GOOD), wait_s=0.3))
    assert (live.status == LOST).sum() == 1 and np.isinf(live.latency[live.status == LOST]).all()


def test_a_closed_loop_counts_answers() -> None:
    async def both() -> tuple[float, float]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    await reader.readexactly(4)
                    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n")
            except asyncio.IncompleteReadError:
                pass
            finally:
                writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as one:
            return await hammer("127.0.0.1", one.sockets[0].getsockname()[1], post("/score", b"body"), 4, 0.2)

    rate, p99 = asyncio.run(both())
    assert rate > 0 and p99 > 0


LEAVES = """
import subprocess, sys, time
sleeps = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=2).pid)"
pid = subprocess.check_output([sys.executable, "-c", sleeps], text=True).strip()
print(f"http://127.0.0.1:{pid}", file=sys.stderr, flush=True)
time.sleep(60)
"""
"""A server that says the id of a daemon it leaves behind for its port."""


def test_what_a_server_leaves_behind_ends_with_it() -> None:
    with Process([sys.executable, "-c", LEAVES]) as process:
        assert psutil.pid_exists(process.port)
    assert not psutil.pid_exists(process.port)


IGNORES = r"""
import signal, subprocess, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
work = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass\nprint(flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
child.stdout.readline()
print("http://127.0.0.1:1", file=sys.stderr, flush=True)
time.sleep(60)
"""
"""A server whose worker's time the kernel forgets."""


def test_what_a_server_takes_is_ours_whoever_waits_for_its_workers() -> None:
    before = Foreign.lost_s + sum(os.times()[:4])
    with Process([sys.executable, "-c", IGNORES]):
        pass
    assert Foreign.lost_s + sum(os.times()[:4]) >= before + 0.6
