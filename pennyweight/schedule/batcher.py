"""The scheduler inside one event loop, over one model in a thread of its own.

``Scheduler`` decides and does nothing else. ``Batcher`` is the thin asyncio part that asks it, runs the batches one at a time
in the model's thread and hands out answers and refusals. Only the bundle's own model is here, so of the policy's variants
the first is used alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

from pennyweight.model.bundle import Policy
from pennyweight.schedule.queue import Queue, Ticket
from pennyweight.schedule.scheduler import Batch, Scheduler

Q = TypeVar("Q")
A = TypeVar("A")


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
        self.scheduler = Scheduler(dataclasses.replace(policy, variants=policy.variants[:1]), clock)
        self.scheduler.join("model")
        self._run = run
        self._executor = executor
        self._observe = observe
        self._running: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def queue(self) -> Queue:
        """Who waits."""
        return self.scheduler.queue

    async def submit(self, value: Q, items: int = 1, **asked: Any) -> A:
        """The answer to one request of so many items; ``asked`` is what else ``Scheduler.offer`` takes.

        Raises:
            Overloaded: it would not be answered in time, or was not; the queue is full; the quota is spent.
            RequestError: no such class or tenant.
        """
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        ticket = self.scheduler.offer((value, future), items, **asked)
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self.scheduler.drop(ticket)
            raise

    async def close(self) -> None:
        """Run what was accepted, then stop."""
        self._closing = True
        self._pump()
        while self._running is not None:
            await self._running

    def _pump(self) -> None:
        """Do what is due now, and come back when the clock alone gives something to do."""
        for batch in self.scheduler.dispatch(hurry=self._closing):
            self._running = asyncio.create_task(self._go(batch))
        for ticket in self.scheduler.late():
            _settle(ticket, self.scheduler.refusal(ticket))
        self.scheduler.learn()
        if self._timer is not None:
            self._timer.cancel()
        due = self.scheduler.due()
        pause = None if due is None else max(0.0, due - self.scheduler.clock())
        self._timer = None if pause is None else asyncio.get_running_loop().call_later(pause, self._pump)

    async def _go(self, batch: Batch) -> None:
        tickets = [piece.ticket for piece in batch.pieces]
        self._observe(len(tickets))
        try:
            values = [ticket.value[0] for ticket in tickets]
            answers = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, values)
            self.scheduler.done(batch)
            for ticket, answer in zip(tickets, answers, strict=True):
                _settle(ticket, answer)
        except Exception as error:
            if batch.worker.batch is batch:
                self.scheduler.failed(batch)
            for ticket in tickets:
                _settle(ticket, error)
        self._running = None
        self._pump()


def _settle(ticket: Ticket, outcome: Any) -> None:
    """Hand over an outcome, unless the client has left or has one already."""
    future = ticket.value[1]
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
