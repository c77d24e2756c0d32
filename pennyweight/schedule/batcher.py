"""Requests waiting for the model: who runs next, with whom, and who is refused.

``Queue`` decides and does nothing else: no thread, no timer, the clock handed in, so the same code runs in a test or a
simulation. ``Batcher`` is the thin asyncio part that asks it and runs the batches, one at a time, in the model's thread.

Deadlines are all equally far, so first come, first served is earliest-deadline-first and a deque is enough. A full queue
refuses at arrival; one that could not start by its deadline is refused at its deadline, even while a batch runs. Starting
the model at once for whoever is there was preferred to deferring batches until the last safe moment, which pays only with
many models on many GPUs. It costs: a lone request still waits ``wait_ms`` when joining is on.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from pennyweight.core.errors import Overloaded
from pennyweight.model.bundle import Policy

Q = TypeVar("Q")
A = TypeVar("A")


@dataclasses.dataclass(frozen=True, eq=False)
class Waiting(Generic[Q]):
    """A request in the queue; times are seconds on the queue's clock."""

    value: Q
    arrived: float
    deadline: float


class Queue(Generic[Q]):
    """Waiting requests under a policy. Nothing here waits: each method says what holds at the clock's now."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.clock = clock
        self._waiting: collections.deque[Waiting[Q]] = collections.deque()
        self._seconds = 0.0  # per request, smoothed over the batches that ran

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, value: Q) -> Waiting[Q]:
        """Take a request in.

        Raises:
            Overloaded: ``policy.queue`` requests wait already; ``retry_after`` is how long they will take.
        """
        if len(self) >= self.policy.queue:
            raise Overloaded(
                f"{len(self)} requests wait, and the queue holds {self.policy.queue}; try again in {self.drain:.3g} s",
                self.drain,
            )
        now = self.clock()
        waiting = Waiting(value, now, now + self.policy.deadline_ms / 1000)
        self._waiting.append(waiting)
        return waiting

    def take(self, *, hurry: bool = False) -> list[Waiting[Q]]:
        """The next batch, removed from the queue; empty while nobody waits or others may still join it.

        ``hurry`` runs whoever is there, as when the service stops.
        """
        due = self.due
        if due is None or (due > self.clock() and not hurry):
            return []
        return [self._waiting.popleft() for _ in range(min(self.policy.batch, len(self)))]

    def late(self) -> list[Waiting[Q]]:
        """Those whose deadline has passed, removed from the queue."""
        now, late = self.clock(), []
        while self._waiting and self._waiting[0].deadline <= now:
            late.append(self._waiting.popleft())
        return late

    def refusal(self, waiting: Waiting[Q]) -> Overloaded:
        """What one who was late is told."""
        return Overloaded(
            f"not started within {self.policy.deadline_ms:g} ms, the deadline; try again in {self.drain:.3g} s", self.drain
        )

    def drop(self, waiting: Waiting[Q]) -> None:
        """Forget a request whose client has left; one that is not here any more is no matter."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(waiting)

    @property
    def due(self) -> float | None:
        """When the next batch may start: at once if it is full or nobody is waited for; None while nobody waits."""
        if not self._waiting:
            return None
        alone = self.policy.batch == 1 or len(self) >= self.policy.batch
        return self._waiting[0].arrived + (0.0 if alone else self.policy.wait_ms / 1000)

    @property
    def expires(self) -> float | None:
        """When the next deadline passes; None while nobody waits."""
        return self._waiting[0].deadline if self._waiting else None

    @property
    def drain(self) -> float:
        """Seconds until those who wait now have been run, as the last batches went."""
        return len(self) * self._seconds

    def ran(self, requests: int, seconds: float) -> None:
        """Learn what a batch took."""
        share = seconds / requests
        self._seconds += (share - self._seconds) * (0.1 if self._seconds else 1.0)


class Batcher(Generic[Q, A]):
    """Joins requests by a policy and runs them, a batch at a time, on ``executor``; use it inside one event loop.

    ``run`` gets the requests of a batch and gives an answer for each, in order; ``observe`` hears the size of each batch.
    """

    def __init__(
        self,
        policy: Policy,
        run: Callable[[Sequence[Q]], Sequence[A]],
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.queue: Queue[tuple[Q, asyncio.Future[A]]] = Queue(policy, clock)
        self._run = run
        self._executor = executor
        self._observe = observe
        self._running: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    async def submit(self, value: Q) -> A:
        """The answer to one request.

        Raises:
            Overloaded: the queue is full, or the request's deadline passed before it could start.
        """
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        waiting = self.queue.offer((value, future))
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self.queue.drop(waiting)
            raise

    async def close(self) -> None:
        """Run what was accepted, then stop."""
        self._closing = True
        self._pump()
        while self._running is not None:
            await self._running

    def _pump(self) -> None:
        """Do what is due now, and come back when the clock alone gives something to do."""
        for waiting in self.queue.late():
            _settle(waiting.value[1], self.queue.refusal(waiting))
        if self._running is None and (batch := self.queue.take(hurry=self._closing)):
            self._running = asyncio.create_task(self._go(batch))
        if self._timer is not None:
            self._timer.cancel()
        times = (self.queue.expires, None if self._running else self.queue.due)
        known = [time for time in times if time is not None]
        pause = max(0.0, min(known) - self.queue.clock()) if known else None
        self._timer = None if pause is None else asyncio.get_running_loop().call_later(pause, self._pump)

    async def _go(self, batch: list[Waiting[tuple[Q, asyncio.Future[A]]]]) -> None:
        values, futures = zip(*(waiting.value for waiting in batch), strict=True)
        start = self.queue.clock()
        self._observe(len(batch))
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, values)
            self.queue.ran(len(batch), self.queue.clock() - start)
            for future, answer in zip(futures, answers, strict=True):
                _settle(future, answer)
        except Exception as error:
            for future in futures:
                _settle(future, error)
        self._running = None
        self._pump()


def _settle(future: asyncio.Future[A], outcome: A | Exception) -> None:
    """Hand over an outcome, unless the client has left or has one already."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
