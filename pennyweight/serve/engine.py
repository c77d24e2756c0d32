"""Who scores: one thread of this process, or the worker processes of a ``Pool``; the service asks both in the same way.

A thread saves the hop to another process and back, most of what a small answer costs in Python; it is what ``serve --get``,
tests and ``--workers 0`` use. It scores with the best variant alone. All else that schedules, limits and counts is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from pennyweight.accelerate.cache import hit_rate
from pennyweight.model.bundle import Bundle, Policy
from pennyweight.schedule.batcher import Batcher, Seat
from pennyweight.schedule.queue import Ticket
from pennyweight.schedule.scheduler import Batch, Scheduler
from pennyweight.serve.child import Ready
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.worker import Query, Ranked, Worker


class Answer(msgspec.Struct, frozen=True):
    """What came of a query, and which variant gave it."""

    ranked: Ranked
    variant: str
    gap: float
    """What that variant loses at most against the best, in the policy's metric, as proven."""


class Engine(Protocol):
    """Scores queries as a policy says."""

    @property
    def about(self) -> Ready:
        """What is loaded."""

    @property
    def scheduler(self) -> Scheduler:
        """Who decides."""

    def place(self, query: Query, seat: Seat, items: int, **asked: Any) -> Ticket:
        """Let a query wait whose cost is that of so many items; its seat is told an ``Answer``, or what is wrong.

        ``asked`` is how it wants to be scheduled, as ``Scheduler.offer`` takes it; what is not said is as the policy has it.

        Raises:
            Overloaded: it would not be answered in time; the queue is full; the quota is spent.
            RequestError: no such class or tenant, or the query's context is wrong.
        """

    def leave(self, ticket: Ticket) -> None:
        """Forget one whose client has left."""

    def hurry(self) -> None:
        """The service is about to stop: let nobody wait for company any more."""

    async def close(self) -> None:
        """Answer what was accepted, then let go of the models."""


class Local:
    """A bundle in a thread of this process.

    Raises:
        BundleError, ConfigError: the bundle cannot be served.
    """

    def __init__(self, bundle: Bundle, allow: Sequence[str], metrics: Metrics) -> None:
        self.thread = ThreadPoolExecutor(1, "model")
        self.worker = self.thread.submit(Worker, bundle, allow).result()
        self._metrics = metrics
        self._batcher: Batcher[Query, Answer] = Batcher(bundle.policy, self._answers, self.thread, observe=self._observe)
        runner, worker = self.worker.runner, self.worker
        every = len(worker.ids) if worker.index is None else 0
        self.about = Ready(type(runner.module).__name__, runner.engine, worker.vectors is not None, every)
        if runner.hot:
            metrics.hot_rows(lambda: hit_rate(runner.hot))
        metrics.follow(self.scheduler)

    @property
    def scheduler(self) -> Scheduler:
        """Who decides."""
        return self._batcher.scheduler

    @property
    def policy(self) -> Policy:
        """What it decides by."""
        return self.scheduler.policy

    def place(self, query: Query, seat: Seat, items: int, **asked: Any) -> Ticket:
        """As ``Engine.place`` says."""
        return self._batcher.place(query, seat, items, **asked)

    def leave(self, ticket: Ticket) -> None:
        """As ``Engine.leave`` says."""
        self._batcher.leave(ticket)

    def _answers(self, queries: Sequence[Query]) -> list[Answer | Exception]:
        best = self.scheduler.variants[0]
        found = self.worker.answer(queries)
        return [Answer(one, best.name, best.gap) if isinstance(one, Ranked) else one for one in found]

    def hurry(self) -> None:
        """As ``Engine.hurry`` says."""
        self._batcher.hurry()

    async def close(self) -> None:
        """Answer what was accepted, then let go of the model."""
        await self._batcher.close()
        self.thread.shutdown()

    def _observe(self, batch: Batch, seconds: float) -> None:
        self._metrics.batch(len(batch.pieces), batch.expected, seconds, self.scheduler.variants[batch.variant].name, seconds)
