"""Who scores: one thread of this process, or the worker processes of a ``Pool``; the service asks both in the same way.

A thread saves the hop to another process and back, most of what a small answer costs in Python; it is what ``serve --get``,
tests and ``--workers 0`` use. It scores with the best variant alone. All else that schedules, limits and counts is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from pennyweight.accelerate.cache import hit_rate
from pennyweight.model.bundle import Bundle, Policy
from pennyweight.schedule.batcher import Batcher
from pennyweight.schedule.scheduler import Batch, Scheduler
from pennyweight.serve.child import Ready
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.worker import Query, Ranked, Worker


class Asked(msgspec.Struct, frozen=True):
    """How a request wants to be scheduled; what is not said is as the policy has it."""

    priority: str = ""
    """Its class."""
    tenant: str = ""
    deadline_s: float | None = None
    degrade: bool | None = None
    """Whether variants outside the margin may answer."""


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

    async def submit(self, query: Query, items: int, asked: Asked) -> Answer:
        """The answer to a query whose cost is that of so many items.

        Raises:
            Overloaded: it would not be answered in time, or was not; the queue is full; the quota is spent.
            RequestError: no such class or tenant, or the query's context is wrong.
        """

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
        self._batcher: Batcher[Query, Ranked] = Batcher(bundle.policy, self.worker.answer, self.thread, observe=self._observe)
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

    async def submit(self, query: Query, items: int, asked: Asked) -> Answer:
        """As ``Engine.submit`` says."""
        ranked = await self._batcher.submit(
            query, items, priority=asked.priority, tenant=asked.tenant, deadline_s=asked.deadline_s, degrade=asked.degrade
        )
        best = self.scheduler.variants[0]
        self._metrics.answers(best.name)
        return Answer(ranked, best.name, best.gap)

    def hurry(self) -> None:
        """As ``Engine.hurry`` says."""
        self._batcher.hurry()

    async def close(self) -> None:
        """Answer what was accepted, then let go of the model."""
        await self._batcher.close()
        self.thread.shutdown()

    def _observe(self, batch: Batch, seconds: float) -> None:
        self._metrics.batch(len(batch.pieces), batch.expected, seconds)
