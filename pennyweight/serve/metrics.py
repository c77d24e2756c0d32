"""What Prometheus reads from ``/metrics``: requests, their latency, the queue, the batches.

Each service has a registry of its own, so that several can live in one process (tests do that). Paths that are not ours
share the label ``other``: a scanner must not be able to fill the memory with labels.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("pennyweight_requests", "Requests answered.", ("path", "status"), registry=self.registry)
        self._seconds = Histogram(
            "pennyweight_request_seconds",
            "From the request's head to its answer.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "pennyweight_batch_requests", "Requests joined into one forward.", buckets=REQUESTS, registry=self.registry
        )
        Gauge("pennyweight_queue_requests", "Requests waiting for the model.", registry=self.registry).set_function(waiting)

    def hot_rows(self, rate: Callable[[], float]) -> None:
        """Report how often a hot row answered a lookup."""
        Gauge(
            "pennyweight_hot_rows_hit_ratio", "Lookups answered by rows near the compute.", registry=self.registry
        ).set_function(rate)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, size: int) -> None:
        """Count one batch."""
        self._batches.observe(size)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
