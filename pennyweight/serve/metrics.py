"""What Prometheus reads from ``/metrics``: requests, their latency, the queue, the batches, who was refused, who answered.

Each service has a registry of its own, so that several can live in one process (tests do that). Paths, classes and tenants
that are not ours share the label ``other``: a scanner must not be able to fill the memory with labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pennyweight.model.bundle import Policy
from pennyweight.schedule.scheduler import Scheduler

M = TypeVar("M")
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
        self._requests = self._counter("requests", "Requests answered.", "path", "status")
        self._seconds = self._made(
            Histogram, "request_seconds", "From the request's head to its answer.", "path", buckets=SECONDS
        )
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._batches = self._made(Histogram, "batch_requests", "Requests joined into one forward.", buckets=REQUESTS)
        self._predicted = self._made(
            Histogram, "predicted_over_actual", "A batch's predicted seconds over those it took.", buckets=RATIOS
        )
        self._answers = self._counter("answers", "Queries answered, by the variant that did.", "variant")
        self._variants: dict[str, Counter] = {}
        self._sheds = self._counter(
            "sheds", "Requests refused for load, by class, tenant and reason.", "class", "tenant", "reason"
        )
        self._deaths = self._counter("worker_deaths", "Workers that ended without being told to.")
        self._again = self._counter("requeued", "Requests scored again since their worker died.")
        self._poison = self._counter("poison", "Requests refused after two workers died with them.")
        self._left = self._counter("clients_left", "Requests whose client left before the answer.")
        self._swaps = self._counter("swaps", "Bundles exchanged while serving, by outcome.", "outcome")

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return self._made(Counter, name, says, *labels)

    def _made(self, kind: Callable[..., M], name: str, says: str, *labels: str, **more: Any) -> M:
        """One of this service's own: between labels and where it is kept the library has namespace, subsystem and unit."""
        return kind(f"pennyweight_{name}", says, labels, "", "", "", self.registry, **more)

    def follow(self, scheduler: Scheduler) -> None:
        """Report a scheduler's queue and workers from now on."""
        self.registry.register(_Follows(scheduler))

    def hot_rows(self, rate: Callable[[], float]) -> None:
        """Report how often a hot row answered a lookup."""
        self._made(Gauge, "hot_rows_hit_ratio", "Lookups answered by rows near the compute.").set_function(rate)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one answer."""
        count, spent = self._answered.get((path, status)) or self._answered.setdefault(
            (path, status), (self._requests.labels(path, str(status)), self._seconds.labels(path))
        )
        count.inc()
        spent.observe(seconds)

    def answers(self, variant: str) -> None:
        """Count one query answered by a variant."""
        count = self._variants.get(variant) or self._variants.setdefault(variant, self._answers.labels(variant))
        count.inc()

    def batch(self, size: int, predicted_s: float, actual_s: float) -> None:
        """Count one batch; a prediction of nothing is none."""
        self._batches.observe(size)
        if predicted_s > 0 and actual_s > 0:
            self._predicted.observe(predicted_s / actual_s)

    def shed(self, priority: str, tenant: str, reason: str) -> None:
        """Count one request refused for load."""
        known = (priority if priority in self._classes else "other", tenant if tenant in self._tenants else "other")
        self._sheds.labels(*known, reason).inc()

    def death(self, requeued: int, poison: int) -> None:
        """Count a worker that died, and what became of its requests."""
        self._deaths.inc()
        self._again.inc(requeued)
        self._poison.inc(poison)

    def left(self) -> None:
        """Count a client that left."""
        self._left.inc()

    def swap(self, outcome: str) -> None:
        """Count a bundle exchanged, or not."""
        self._swaps.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


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
