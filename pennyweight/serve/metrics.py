"""What Prometheus reads from ``/metrics``: requests, their latency, the queue, the batches, who was refused, who answered.

Each service has a registry of its own, so that several can live in one process (tests do that). Paths, classes and tenants
that are not ours share the label ``other``: a scanner must not be able to fill the memory with labels.

Numbers are kept in plain dictionaries and given to the library when it is asked to write them: its own are locked one by one,
for threads that there are none of here, which was a tenth of what a small answer cost the front.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pennyweight.model.bundle import Policy
from pennyweight.schedule.scheduler import Scheduler

C = TypeVar("C", bound=Collector)
Labels = tuple[str | int, ...]
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


class Metrics:
    """Counters of one service."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, policy: Policy) -> None:
        self.registry = CollectorRegistry()
        self._classes = {c.name for c in policy.classes} | {""}
        self._tenants = {t.name for t in policy.tenants} - {"*"} | {""}
        self._requests = self._kept(_Counter("requests", "Requests answered.", "path", "status"))
        self._seconds = self._kept(_Histogram("request_seconds", "From the request's head to its answer.", SECONDS, "path"))
        self._batches = self._kept(_Histogram("batch_requests", "Requests joined into one forward.", REQUESTS))
        self._predicted = self._kept(
            _Histogram("predicted_over_actual", "A batch's predicted seconds over those it took.", RATIOS)
        )
        self._took = self._kept(
            _Histogram("batch_seconds", "A batch on its worker, by the variant that ran.", SECONDS, "variant")
        )
        self._answers = self._kept(_Counter("answers", "Queries answered, by the variant that did.", "variant"))
        self._sheds = self._kept(
            _Counter("sheds", "Requests refused for load, by class, tenant and reason.", "class", "tenant", "reason")
        )
        self._deaths = self._kept(_Counter("worker_deaths", "Workers that ended without being told to."))
        self._again = self._kept(_Counter("requeued", "Requests scored again since their worker died."))
        self._poison = self._kept(_Counter("poison", "Requests refused after two workers died with them."))
        self._left = self._kept(_Counter("clients_left", "Requests whose client left before the answer."))
        self._swaps = self._kept(_Counter("swaps", "Bundles exchanged while serving, by outcome.", "outcome"))

    def _kept(self, made: C) -> C:
        self.registry.register(made)
        return made

    def follow(self, scheduler: Scheduler) -> None:
        """Report a scheduler's queue and workers from now on."""
        self._kept(_Follows(scheduler))

    def hot_rows(self, rate: Callable[[], float]) -> None:
        """Report how often a hot row answered a lookup."""
        self._kept(_Gauge("hot_rows_hit_ratio", "Lookups answered by rows near the compute.", rate))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.add((path, status))
        self._seconds.add(seconds, (path,))

    def answers(self, variant: str) -> None:
        """Count one query answered by a variant."""
        self._answers.add((variant,))

    def batch(self, size: int, predicted_s: float, actual_s: float, variant: str, worker_s: float) -> None:
        """Count one batch; a prediction of nothing is none. ``actual_s`` has the ways to the worker and back in it."""
        self._batches.add(size)
        self._took.add(worker_s, (variant,))
        if predicted_s > 0 and actual_s > 0:
            self._predicted.add(predicted_s / actual_s)

    def shed(self, priority: str, tenant: str, reason: str) -> None:
        """Count one request refused for load."""
        known = (priority if priority in self._classes else "other", tenant if tenant in self._tenants else "other")
        self._sheds.add((*known, reason))

    def death(self, requeued: int, poison: int) -> None:
        """Count a worker that died, and what became of its requests."""
        self._deaths.add()
        self._again.add(count=requeued)
        self._poison.add(count=poison)

    def left(self) -> None:
        """Count a client that left."""
        self._left.add()

    def swap(self, outcome: str) -> None:
        """Count a bundle exchanged, or not."""
        self._swaps.add((outcome,))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Counter(Collector):
    """Numbers by labels, in a plain dictionary: everything here is of one thread, so none is locked."""

    def __init__(self, name: str, says: str, *labels: str) -> None:
        self._about = f"pennyweight_{name}", says
        self._labels = labels
        self._counts: dict[Labels, int] = {} if labels else {(): 0}

    def add(self, labels: Labels = (), count: int = 1) -> None:
        """Count."""
        self._counts[labels] = self._counts.get(labels, 0) + count

    def collect(self) -> Iterable[Metric]:
        """As Prometheus has it."""
        family = CounterMetricFamily(*self._about, labels=self._labels)
        for labels, count in self._counts.items():
            family.add_metric([*map(str, labels)], count)
        yield family


class _Histogram(Collector):
    """How often a value was at most each of some, by labels."""

    def __init__(self, name: str, says: str, ends: Sequence[float], *labels: str) -> None:
        self._about = f"pennyweight_{name}", says
        self._labels = labels
        self._ends = ends
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        if not labels:
            self._new(())

    def add(self, value: float, labels: Labels = ()) -> None:
        """Count a value."""
        (self._counts.get(labels) or self._new(labels))[bisect.bisect_left(self._ends, value)] += 1
        self._sums[labels] += value

    def _new(self, labels: Labels) -> list[int]:
        self._sums[labels] = 0.0
        return self._counts.setdefault(labels, [0] * (len(self._ends) + 1))

    def collect(self) -> Iterable[Metric]:
        """As Prometheus has it: each number holds those below it."""
        family = HistogramMetricFamily(*self._about, labels=self._labels)
        ends = [*map(str, map(float, self._ends)), "+Inf"]
        for labels, counts in self._counts.items():
            family.add_metric(
                [*map(str, labels)], [*zip(ends, itertools.accumulate(counts), strict=True)], self._sums[labels]
            )  # fmt: skip
        yield family


class _Gauge(Collector):
    """A number that is asked for when it is written."""

    def __init__(self, name: str, says: str, ask: Callable[[], float]) -> None:
        self._about, self._ask = (f"pennyweight_{name}", says), ask

    def collect(self) -> Iterable[Metric]:
        """As Prometheus has it."""
        yield GaugeMetricFamily(*self._about, self._ask())


class _Follows(Collector):
    """What a scheduler says of itself when it is asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        """The queue, in all and by class, in requests and in seconds; who is inside; the workers."""
        scheduler = self._scheduler
        queue = scheduler.queue
        yield GaugeMetricFamily("pennyweight_queue_requests", "Requests waiting for the model.", queue.size)
        waiting = GaugeMetricFamily("pennyweight_waiting_requests", "Requests waiting, by class.", labels=["class"])
        seconds = GaugeMetricFamily("pennyweight_waiting_seconds", "Work that waits, by class.", labels=["class"])
        for priority, count, load in zip(scheduler.classes, queue.counts, queue.loads, strict=True):
            waiting.add_metric([priority.name], count)
            seconds.add_metric([priority.name], load)
        yield waiting
        yield seconds
        yield GaugeMetricFamily("pennyweight_inside_requests", "Requests accepted and not answered yet.", scheduler.inside)
        yield GaugeMetricFamily("pennyweight_guard_requests", "Requests that may be inside.", scheduler.guard.limit)
        workers = scheduler.workers.values()
        states = GaugeMetricFamily("pennyweight_workers", "Workers, by what they do.", labels=["state"])
        busy = sum(w.batch is not None for w in workers)
        states.add_metric(["busy"], busy)
        states.add_metric(["idle"], len(workers) - busy)
        yield states
        speed = GaugeMetricFamily("pennyweight_worker_speed", "A worker's time over its device's curve.", labels=["worker"])
        for worker in workers:
            speed.add_metric([worker.name], worker.speed)
        yield speed
