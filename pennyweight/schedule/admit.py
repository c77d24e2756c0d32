"""Who is let in: quotas in device-milliseconds, and a guard against what nobody predicted.

Whether a request can be done in time is the scheduler's question, since it knows the queue. Here are the two limits beside it.

A ``Bucket`` refills with a tenant's quota and is charged what a request is predicted to take, corrected by what it took.
Counting requests, the usual way, lets one tenant take a thousand items a request where another takes ten.

A ``Guard`` bounds the requests inside by comparing what they took with what was predicted, after Netflix' Gradient2. A limiter
that learns its own notion of *no load* drifts with any lasting slowdown (concurrency-limits issues 137, 165; Envoy's 38338);
here the prediction is that notion. Its known upward drift, headroom that is added while it shrinks (its pull request 134), is
left out: the limit grows only where nothing was late, and only while it is in use.
"""

from __future__ import annotations

import math


class Bucket:
    """Device-milliseconds of one tenant.

    Args:
        quota: milliseconds a second.
        burst_s: seconds of quota it holds at most.
        now: the clock's time, in seconds; the bucket starts full.
    """

    __slots__ = ("level", "limit", "rate", "then")

    def __init__(self, quota: float, burst_s: float, now: float) -> None:
        self.rate = quota
        self.limit = quota * burst_s
        self.level = self.limit
        self.then = now

    def wait(self, ms: float, now: float) -> float:
        """Seconds until ``ms`` may be spent: 0 if now. More than the bucket holds may be spent when it is full."""
        self.level = min(self.limit, self.level + self.rate * max(0.0, now - self.then))
        self.then = max(now, self.then)
        return max(0.0, (min(ms, self.limit) - self.level) / self.rate)

    def spend(self, ms: float) -> None:
        """Take ``ms`` out, or put them back if negative; below 0 is a debt that refills first."""
        self.level = min(self.limit, self.level - ms)


class Guard:
    """How many requests may be inside, from how much later than predicted they were answered."""

    __slots__ = ("least", "limit", "most", "smoothing", "tolerance")

    def __init__(self, most: int, *, least: int = 8, tolerance: float = 2.0, smoothing: float = 0.1) -> None:
        self.most = float(most)
        self.limit = float(most)
        self.least = float(min(least, most))
        self.tolerance = tolerance
        self.smoothing = smoothing

    def answered(self, predicted_s: float, actual_s: float, inside: int) -> None:
        """Learn from one answer: seconds from arrival, as predicted at admission and as they were."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        gradient = max(0.5, min(1.0, self.tolerance * predicted_s / actual_s))
        if gradient == 1.0 and inside < self.limit / 2:
            return  # nobody needed more
        wanted = self.limit * gradient + (math.sqrt(self.limit) if gradient == 1.0 else 0.0)
        self.limit += self.smoothing * (max(self.least, min(self.most, wanted)) - self.limit)
