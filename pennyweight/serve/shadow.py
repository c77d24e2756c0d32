"""Whether another bundle scores as the one that serves: live requests, scored by both, compared.

What counts is whether the order of candidates would change, so differences are measured against how much the candidates' scores
differ among themselves: the root of the mean squared difference over their standard deviation, both after the mean is taken
out, since a shift of all scores changes no order. The median over requests is compared with the tolerance; one odd request
decides nothing, and a score that is no number is never agreement. Comparing the top items alone would call two good models
different that exchange near-equals.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import statistics
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np

from pennyweight.serve.worker import Floats, Query, Ranked

ANSWER_S = 10.0
"""Seconds the other bundle has for one request; it may be hanging."""
WAITING = 64
"""Requests that wait for their second score at most; those who come then are not compared."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two bundles' scores lie apart."""

    requests: int
    """Compared."""
    median: float
    """Of the root mean squared difference over the scores' own deviation."""
    most: float
    failed: int = 0
    """Requests that the other bundle could not score."""

    def within(self, tolerance: float) -> bool:
        """Whether that is agreement; nothing to compare is."""
        return not self.failed and (self.requests == 0 or self.median <= tolerance)

    def __str__(self) -> str:
        if self.failed:
            return f"the other bundle could not score {self.failed} of {self.requests + self.failed} requests"
        return (
            f"over {self.requests} requests the scores differ by {self.median:.3g} of their deviation (at most {self.most:.3g})"
        )


class Shadow:
    """Requests to be scored a second time, one at a time, beside the traffic they came from."""

    def __init__(self, score: Callable[[Query, str], Awaitable[Ranked]], requests: int) -> None:
        self._score = score
        self._wanted = requests
        self._queue: asyncio.Queue[tuple[Query, Ranked, str]] = asyncio.Queue(WAITING)

    def feed(self, query: Query, ranked: Ranked, variant: str) -> None:
        """A request as it was answered: compared on the candidates of the answer. Single scores tell nothing."""
        if len(ranked.items) > 1:
            asked = msgspec.structs.replace(query, items=ranked.items, k=0, start=0, stop=None)
            with contextlib.suppress(asyncio.QueueFull):
                self._queue.put_nowait((asked, ranked, variant))

    async def judged(self, seconds: float) -> Difference:
        """What came of so many requests, or of those that came in time."""
        found: list[float] = []
        failed = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while len(found) + failed < self._wanted:
            try:
                query, ranked, variant = await asyncio.wait_for(self._queue.get(), max(0.0, end - loop.time()))
            except TimeoutError:
                break
            try:
                async with asyncio.timeout(ANSWER_S):
                    other = await self._score(query, variant)
                found.append(apart(ranked.scores, other.scores))
            except (RuntimeError, ValueError, TimeoutError):
                failed += 1
        return Difference(len(found), statistics.median(found) if found else 0.0, max(found, default=0.0), failed)


def apart(ours: Floats, others: Floats) -> float:
    """Root mean squared difference over the deviation of ``ours``, means taken out; infinite where one is no number."""
    if not (np.isfinite(ours).all() and np.isfinite(others).all()):
        return math.inf
    a, b = ours.astype(np.float64), others.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    error, spread = float(np.sqrt(np.mean((a - b) ** 2))), float(a.std())
    return 0.0 if error == 0 else math.inf if spread == 0 else error / spread
