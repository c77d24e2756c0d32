"""What a piece of work takes, as one learned curve: T = a + r * requests + b * items, in milliseconds.

A forward has a cost of its own (``a``), each request adds features and bookkeeping (``r``), each item adds arithmetic
(``b``). Three numbers a (variant, device) predict when a device will be free, which is what dispatch, admission and batching
ask; utilization counters, the usual signal, say how busy a device was. The price: cache effects are no straight line, so
predict inside the sizes that were seen.

``Learned`` is recursive least squares in its information form: it keeps the weighted sums of what was seen and solves a
3 by 3 system when asked. Sums fade by ``forgetting`` an observation, not to nothing but to those of the prior profile. The
textbook form lets the covariance of a direction nobody exercises (always one request) grow until one odd value throws
it anywhere; here it returns to what was profiled. Errors are taken relative to the prior's prediction, so a request of 2000
items does not drown those of ten, and one that ran ten times too long (a scheduler's slice, a page fault) counts as twice.

Nothing here reads a clock: the server and a simulator feed the same code. An observation costs some 20 microseconds.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from scipy.optimize import nnls

from pennyweight.core.errors import ConfigError

WINDOW = 256
"""Observations whose ratio of measured to predicted gives the safety factor."""
ENOUGH = 20
"""Observations below which the prior's safety factor is the least."""
TAIL = 0.95
"""The share of work that ends within the predicted time times the safety factor."""
SPREAD = 5.0
"""How far a coefficient may be from its prior, as a multiple of it, at the cost of one observation missed by all of it."""
OUTLIER = 2.0
"""A measured time counts as at most this many times the predicted one, and at least one over it."""
SOLVED = 8
"""Observations after which a curve is solved anew even if nobody asked for it: what is expected must follow what is seen.
It is after each of the first ``WINDOW``, when a wrong prior is unlearned."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What work takes on one device by one variant: a profile that can be stored, and what ``Learned`` starts from."""

    fixed_ms: float
    """``a``: each forward."""
    request_ms: float
    """``r``: each request in it."""
    item_ms: float
    """``b``: each item in it."""
    safety: float = 1.2
    """The 95th percentile of measured over predicted, at least 1."""

    def __post_init__(self) -> None:
        given = (self.fixed_ms, self.request_ms, self.item_ms)
        if not all(math.isfinite(v) and v >= 0 for v in given) or not any(given):
            raise ConfigError(
                f"a cost curve needs numbers of 0 or more, one above, got {', '.join(f'{v:g}' for v in given)} ms"
            )
        if not (math.isfinite(self.safety) and self.safety >= 1):
            raise ConfigError(f"a safety factor is 1 or more, got {self.safety:g}")

    def ms(self, requests: int, items: int) -> float:
        """Predicted milliseconds of one forward of so many requests with so many items in all."""
        return self.fixed_ms + self.request_ms * requests + self.item_ms * items

    def safe_ms(self, requests: int, items: int) -> float:
        """Milliseconds within which 95 % of such work ended."""
        return self.safety * self.ms(requests, items)

    @classmethod
    def fit(cls, samples: Iterable[tuple[int, int, float]]) -> Curve:
        """The curve of (requests, items, milliseconds) measured, by least squares of relative errors, none negative.

        Sizes that never vary apart cannot be told apart; the split is then arbitrary and the sum right where it was measured.

        Raises:
            ConfigError: there are no samples, or a time is not above 0.
        """
        rows = np.asarray(list(samples), float).reshape(-1, 3)
        if not len(rows) or not (np.isfinite(rows).all() and (rows[:, 2] > 0).all()):
            raise ConfigError(f"a cost curve is fitted to times above 0 ms, got {len(rows)} samples; profile the variant again")
        taken = rows[:, 2]
        seen = np.column_stack([np.ones(len(rows)), rows[:, :2]])
        found, _ = nnls(seen / taken[:, None], np.ones(len(rows)))
        if not found.any():
            raise ConfigError(f"no cost curve fits {len(rows)} samples of {taken.min():g} to {taken.max():g} ms")
        ratio = float(np.quantile(taken / (seen @ found), TAIL))
        return cls(float(found[0]), float(found[1]), float(found[2]), max(1.0, ratio))


class Learned:
    """A curve that follows what is measured, from a prior that it returns to where nothing is.

    Args:
        prior: a profile of this variant on this device, or the best guess.
        forgetting: the share of the past that each observation leaves; .99 remembers about the last hundred.
    """

    def __init__(self, prior: Curve, forgetting: float = 0.99) -> None:
        if not 0 < forgetting <= 1:
            raise ConfigError(f"forgetting is above 0 and at most 1, got {forgetting:g}")
        self.prior, self.forgetting = prior, forgetting
        self.count = 0
        """Observations so far."""
        self._curve = prior
        self._since = 0
        """Observations that it does not know yet."""
        theta = (prior.fixed_ms, prior.request_ms, prior.item_ms)
        # A coefficient of 0 may still turn out to be there: it is as uncertain as a part of a usual request.
        least = 0.05 * prior.ms(1, 100)
        spread = [SPREAD * max(t, floor) for t, floor in zip(theta, (least, least, least / 100), strict=True)]
        self._own = [1 / s**2 for s in spread]
        self._pull = [w * t for w, t in zip(self._own, theta, strict=True)]
        # The upper triangle of the information matrix (aa, ar, ab, rr, rb, bb) and its right-hand side.
        self._sums = [self._own[0], 0.0, 0.0, self._own[1], 0.0, self._own[2]]
        self._right = list(self._pull)
        self._ratios: collections.deque[float] = collections.deque()
        self._ordered: list[float] = []

    @property
    def curve(self) -> Curve:
        """The curve as it is now: solved when it is asked for, which costs more than many observations."""
        if self._since:
            self._since = 0
            self._curve = Curve(*_positive(self._sums, self._right), self._safety())
        return self._curve

    def ms(self, requests: int, items: int) -> float:
        """Predicted milliseconds."""
        return self.curve.ms(requests, items)

    def safe_ms(self, requests: int, items: int) -> float:
        """Milliseconds within which 95 % of the last work like it ended."""
        return self.curve.safe_ms(requests, items)

    def observe(self, requests: int, items: int, ms: float) -> None:
        """Learn from one piece of work; a time that is not above 0 (a clock that went back) teaches nothing.

        What was expected is by the curve as it was solved last, so that several at once are compared with the same.
        """
        if not (math.isfinite(ms) and ms > 0):
            return
        curve = self.curve if self._since >= SOLVED or self.count < WINDOW else self._curve
        expected = curve.ms(requests, items) or ms  # nothing is predicted for an empty piece of work without a fixed cost
        self._remember(ms / expected)
        self._add(requests, items, min(max(ms, expected / OUTLIER), expected * OUTLIER))
        self.count += 1
        self._since += 1

    def _add(self, requests: int, items: int, ms: float) -> None:
        scale = self.prior.ms(requests, items) or ms
        x, ratio = (1 / scale, requests / scale, items / scale), ms / scale
        squares = (x[0] * x[0], x[0] * x[1], x[0] * x[2], x[1] * x[1], x[1] * x[2], x[2] * x[2])
        kept, fresh = self.forgetting, 1 - self.forgetting
        own = (self._own[0], 0.0, 0.0, self._own[1], 0.0, self._own[2])
        self._sums = [kept * s + fresh * o + q for s, o, q in zip(self._sums, own, squares, strict=True)]
        self._right = [kept * s + fresh * o + v * ratio for s, o, v in zip(self._right, self._pull, x, strict=True)]

    def _remember(self, ratio: float) -> None:
        if len(self._ratios) == WINDOW:
            self._ordered.pop(bisect.bisect_left(self._ordered, self._ratios.popleft()))
        self._ratios.append(ratio)
        bisect.insort(self._ordered, ratio)

    def _safety(self) -> float:
        tail = self._ordered[min(len(self._ordered) - 1, math.ceil(TAIL * len(self._ordered)) - 1)]
        return max(1.0, tail) if len(self._ordered) >= ENOUGH else max(self.prior.safety, tail)


def _positive(sums: list[float], right: list[float]) -> tuple[float, float, float]:
    """The solution of the normal equations with no coefficient below 0: the most negative is left out, and so on."""
    live = [0, 1, 2]
    at = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 1): 3, (1, 2): 4, (2, 2): 5}
    while live:
        solved = _solve([[sums[at[min(i, j), max(i, j)]] for j in live] for i in live], [right[i] for i in live])
        worst = min(range(len(live)), key=solved.__getitem__)
        if solved[worst] >= 0:
            found = dict(zip(live, solved, strict=True))
            return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)
        live.pop(worst)
    return 0.0, 0.0, 0.0


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """A small symmetric positive definite system by Cholesky, scaled to a unit diagonal first."""
    n = len(right)
    scale = [1 / math.sqrt(matrix[i][i]) for i in range(n)]
    lower = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = matrix[i][j] * scale[i] * scale[j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(max(rest, 1e-12)) if i == j else rest / lower[j][j]
    half = [0.0] * n
    for i in range(n):
        half[i] = (right[i] * scale[i] - sum(lower[i][k] * half[k] for k in range(i))) / lower[i][i]
    out = [0.0] * n
    for i in reversed(range(n)):
        out[i] = (half[i] - sum(lower[k][i] * out[k] for k in range(i + 1, n))) / lower[i][i]
    return [o * s for o, s in zip(out, scale, strict=True)]
