"""The scheduler in an event loop, over a model in a thread that only the test lets go."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pennyweight.core.errors import Overloaded
from pennyweight.model.bundle import Policy
from pennyweight.schedule import batcher
from pennyweight.schedule.batcher import Batcher


class Gate:
    """A model that answers each request with its double, and only when the test opens it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.started = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        self.started.set()
        assert self.open.wait(60)
        if 13 in batch:
            raise RuntimeError("thirteen")
        return [2 * value for value in batch]

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_those_who_come_while_a_batch_runs_are_joined(gate: Gate, pool: ThreadPoolExecutor) -> None:
    sizes: list[int] = []

    async def scene() -> list[int]:
        batcher = Batcher[int, int](Policy(batch=2), gate, pool, observe=lambda batch, _: sizes.append(len(batch.pieces)))
        first = asyncio.create_task(batcher.submit(1))
        await gate.busy()
        rest = [asyncio.create_task(batcher.submit(i)) for i in (2, 3, 4)]
        await asyncio.sleep(0)
        assert len(batcher.queue) == 3
        gate.open.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(scene()) == [2, 4, 6, 8]
    assert gate.batches == [[1], [2, 3], [4]]
    assert sizes == [1, 2, 1]


def test_a_lone_request_runs_when_its_wait_is_over(gate: Gate, pool: ThreadPoolExecutor) -> None:
    gate.open.set()

    async def scene() -> int:
        return await Batcher[int, int](Policy(batch=8, wait_ms=5), gate, pool).submit(1)

    assert asyncio.run(scene()) == 2


def test_the_deadline_passes_while_a_batch_runs(gate: Gate, pool: ThreadPoolExecutor) -> None:
    async def scene() -> int:
        batcher = Batcher[int, int](Policy(deadline_ms=20), gate, pool)
        first = asyncio.create_task(batcher.submit(1))
        await gate.busy()
        with pytest.raises(Overloaded, match="not started within 20 ms"):
            await batcher.submit(2)
        gate.open.set()
        return await first

    assert asyncio.run(scene()) == 2
    assert gate.batches == [[1]]


def test_a_full_queue_refuses_and_keeps_whom_it_has(gate: Gate, pool: ThreadPoolExecutor) -> None:
    async def scene() -> list[int]:
        batcher = Batcher[int, int](Policy(queue=1), gate, pool)
        first = asyncio.create_task(batcher.submit(1))
        await gate.busy()
        second = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="the queue holds 1"):
            await batcher.submit(3)
        gate.open.set()
        return await asyncio.gather(first, second)

    assert asyncio.run(scene()) == [2, 4]


def test_a_failed_batch_fails_its_own_requests_and_no_other(gate: Gate, pool: ThreadPoolExecutor) -> None:
    gate.open.set()

    async def scene() -> int:
        batcher = Batcher[int, int](Policy(), gate, pool)
        with pytest.raises(RuntimeError, match="thirteen"):
            await batcher.submit(13)
        return await batcher.submit(1)

    assert asyncio.run(scene()) == 2


def test_a_client_that_leaves_makes_room(gate: Gate, pool: ThreadPoolExecutor) -> None:
    async def scene() -> list[int]:
        batcher = Batcher[int, int](Policy(queue=1), gate, pool)
        first = asyncio.create_task(batcher.submit(1))
        await gate.busy()
        leaver = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
        third = asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(first, third)

    assert asyncio.run(scene()) == [2, 6]
    assert gate.batches == [[1], [3]]


def test_closing_finishes_what_was_accepted_without_waiting_for_more(gate: Gate, pool: ThreadPoolExecutor) -> None:
    async def scene() -> list[int]:
        batcher = Batcher[int, int](Policy(batch=4, wait_ms=900_000, deadline_ms=1_000_000), gate, pool)
        accepted = [asyncio.create_task(batcher.submit(i)) for i in (1, 2)]
        await asyncio.sleep(0)
        gate.open.set()
        await batcher.close()
        return await asyncio.gather(*accepted)

    assert asyncio.run(scene()) == [2, 4]


def test_batches_shorter_than_the_way_to_the_thread_are_run_by_the_loop_until_one_is_long(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "HOP_S", 0.02)  # of a machine that is busy
    here: list[bool] = []

    def run(batch: Sequence[int]) -> list[int]:
        here.append(threading.current_thread() is threading.main_thread())
        if batch == [7]:
            time.sleep(0.05)
        if batch == [13]:
            raise RuntimeError("thirteen")
        return [2 * value for value in batch]

    async def scene() -> list[int]:
        one = Batcher[int, int](Policy(), run, pool)
        found = [await one.submit(value) for value in [*[1] * batcher.SHORT, 2]]
        with pytest.raises(RuntimeError, match="thirteen"):
            await one.submit(13)
        found += [await one.submit(value) for value in (7, 3)]
        await one.close()
        return found

    assert asyncio.run(scene())[-3:] == [4, 14, 6]
    assert here[-4:] == [True, True, True, False] and not any(here[: batcher.SHORT])


def test_too_few_answers_are_told_to_all_who_wait(pool: ThreadPoolExecutor) -> None:
    async def scene() -> int:
        one = Batcher[int, int](Policy(), lambda batch: [], pool)
        with pytest.raises(ValueError, match="zip"):
            await one.submit(1)
        await one.close()
        return one.scheduler.inside

    assert asyncio.run(scene()) == 0
