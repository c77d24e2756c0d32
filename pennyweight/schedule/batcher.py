"""The scheduler inside one event loop: whoever asks waits at a ``Desk``; over one model in a thread of its own, a ``Batcher``.

``Scheduler`` decides and does nothing else. ``Desk`` is the thin asyncio part that asks it, has batches started, and hands out
answers and refusals; who runs a batch is its caller's affair: the service's worker processes, or ``Batcher``'s one thread.
Only the bundle's own model is in that thread, so of the policy's variants the first is used alone. A batch that takes less time
than the way to the thread and back is run by the loop itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any, Generic, Protocol, TypeVar

from pennyweight.model.bundle import Policy
from pennyweight.schedule.queue import Queue, Ticket
from pennyweight.schedule.scheduler import Batch, Scheduler

LEARN_S = 0.01
"""Seconds between lessons: solving a curve anew takes as long as all else about several batches."""
HOP_S, SHORT = 0.0005, 16
"""Seconds of a batch below which handing it to a thread costs more than it takes; how many have to be so short in a row."""
Q = TypeVar("Q")
A = TypeVar("A")


class Seat(Protocol):
    """Where an outcome is waited for: a future of asyncio, or less."""

    def done(self) -> bool:
        """Whether nobody waits here any more."""

    def set_result(self, result: Any, /) -> None:
        """Tell it an answer."""

    def set_exception(self, exception: Any, /) -> None:
        """Tell it an error."""


async def seated(place: Callable[[Seat], Ticket], leave: Callable[[Ticket], None]) -> Any:
    """What a request placed so is told; one who is cancelled leaves.

    Raises:
        Overloaded: it would not be answered in time, or was not; the queue is full; the quota is spent.
        RequestError: no such class or tenant, or what else its ticket was settled with.
    """
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    ticket = place(future)
    try:
        return await future
    except asyncio.CancelledError:
        leave(ticket)
        raise


class Desk:
    """Those who wait for a scheduler's answers; use it inside one event loop.

    ``start`` gets each batch as it is due; whoever runs it tells the scheduler (``done``, ``failed``, ``died``), settles the
    tickets that gives, and calls ``pump``. A ticket's value is the caller's own and the ``Seat`` that waits.
    """

    def __init__(self, scheduler: Scheduler, start: Callable[[Batch], None]) -> None:
        self.scheduler = scheduler
        self._start = start
        self._timer: asyncio.TimerHandle | None = None
        self._alarm = math.inf
        self._closing = self._hurried = self._called = False
        self._learned = -math.inf
        self._empty = asyncio.Event()

    def place(self, value: Any, seat: Seat, items: int = 1, **asked: Any) -> Ticket:
        """Let a request of so many items wait; its seat is told later. ``asked`` is what else ``Scheduler.offer`` takes.

        Raises:
            Overloaded: it would not be answered in time; the queue is full; the quota is spent. Its seat is not told.
            RequestError: no such class or tenant.
        """
        if self._called and self.scheduler.queue.size >= self.scheduler.policy.queue:
            self.pump()  # whoever came in this turn and can start now makes room
        ticket = self.scheduler.offer((value, seat), items, **asked)
        if not self._called:  # who comes in the same turn of the loop may share a batch
            self._called = True
            asyncio.get_running_loop().call_soon(self._soon)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Forget one whose client has left."""
        self.scheduler.drop(ticket)
        self.pump()

    def pump(self) -> None:
        """Do what is due now, and come back when the clock alone gives something to do."""
        scheduler = self.scheduler
        for batch in scheduler.dispatch(hurry=self._hurried):
            self._start(batch)
        for ticket in scheduler.late():
            settle(ticket, scheduler.refusal(ticket))
        due = scheduler.due()
        if due is not None and due < self._alarm:
            if self._timer is not None:
                self._timer.cancel()
            self._alarm = due
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - scheduler.clock()), self._ring)
        if self._closing and not scheduler.inside:
            self._empty.set()
        now = scheduler.clock()
        if now - self._learned >= LEARN_S:
            self._learned = now
            scheduler.learn()

    def hurry(self) -> None:
        """Let nobody wait for company any more."""
        self._hurried = True
        self.pump()

    async def close(self) -> None:
        """Have what was accepted run; back when everybody has an answer."""
        self._closing = True
        self.hurry()
        await self._empty.wait()
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self._alarm = math.inf
        self.pump()

    def _soon(self) -> None:
        self._called = False
        self.pump()


class Batcher(Desk, Generic[Q, A]):
    """A desk that joins requests by a policy and runs them, a batch at a time, on ``executor``; use it inside one event loop.

    ``run`` gets the requests of a batch and gives an answer for each, in order, or what is wrong with it as an exception;
    ``observe`` hears of each batch and what it took.
    """

    def __init__(
        self,
        policy: Policy,
        run: Callable[[Sequence[Q]], Sequence[A | Exception]],
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[Batch, float], None] = lambda batch, seconds: None,
    ) -> None:
        super().__init__(Scheduler(dataclasses.replace(policy, variants=policy.variants[:1]), clock), self._begin)
        self.scheduler.join("model")
        self._run = run
        self._executor = executor
        self._observe = observe
        self._running: asyncio.Task[None] | None = None
        self._short = 0
        """Batches in a row that were short."""

    @property
    def queue(self) -> Queue:
        """Who waits."""
        return self.scheduler.queue

    async def submit(self, value: Q, items: int = 1, **asked: Any) -> A:
        """The answer to one request of so many items; see ``seated``."""
        answer: A = await seated(lambda seat: self.place(value, seat, items, **asked), self.leave)
        return answer

    async def close(self) -> None:
        """Run what was accepted, then stop."""
        await super().close()
        while self._running is not None:
            await self._running

    def _begin(self, batch: Batch) -> None:
        values = [piece.ticket.value[0] for piece in batch.pieces]
        if self._short >= SHORT:
            asyncio.get_running_loop().call_soon(self._here, batch, values)
        else:
            self._running = asyncio.create_task(self._there(batch, values))

    def _here(self, batch: Batch, values: Sequence[Q]) -> None:
        self._ended(batch, self._tried(values))

    async def _there(self, batch: Batch, values: Sequence[Q]) -> None:
        answers: Sequence[A | Exception] | Exception
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._executor, self._tried, values)
        except Exception as error:  # the executor takes nothing more
            answers = error
        self._running = None
        self._ended(batch, answers)

    def _tried(self, values: Sequence[Q]) -> Sequence[A | Exception] | Exception:
        """The answers, or what is wrong with all of them; whether they took long is noted."""
        began = time.perf_counter()
        try:
            answers = self._run(values)
        except Exception as error:
            return error
        self._short = self._short + 1 if time.perf_counter() - began < HOP_S else 0
        return answers

    def _ended(self, batch: Batch, answers: Sequence[A | Exception] | Exception) -> None:
        tickets = [piece.ticket for piece in batch.pieces]
        try:
            if isinstance(answers, Exception):
                raise answers
            self._observe(batch, self.scheduler.clock() - batch.start)
            self.scheduler.done(batch)
            for ticket, answer in zip(tickets, answers, strict=True):
                settle(ticket, answer)
        except Exception as error:
            if batch.worker.batch is batch:
                self.scheduler.failed(batch)
            settle_all(tickets, error)
        self.pump()


def settle(ticket: Ticket, outcome: Any) -> None:
    """Hand over an outcome, unless the client has left or has one already."""
    seat: Seat = ticket.value[1]
    if seat.done():
        return
    if isinstance(outcome, Exception):
        seat.set_exception(outcome)
    else:
        seat.set_result(outcome)


def settle_all(tickets: Iterable[Ticket], outcome: Any) -> None:
    """Hand the same outcome to several."""
    for ticket in tickets:
        settle(ticket, outcome)
