"""The best point of a space of settings, by measuring few of them.

Settings multiply (six engines, three numbers of threads, six cuts: 108 points) and act nearly one by one: what a second thread
gains, it gains for most cuts. So ``explore`` measures each value of the first axis once, tries the second axis from the three
best, and walks from the best along the others; then it fits log T = sum of one number a value (ridge) to all it has seen, and
measures what the fit still believes to be better, until it believes in nothing; then the next best. Where settings do act
together the fit is wrong in the open: it proposes, a measurement decides.

The alternatives: a full grid measures all; Bayesian optimization learns the same additive structure from as many random points
as this takes in all. Nothing here knows what a setting is or reads a clock. A point that fails (out of memory, an operator
an engine lacks) gives no time but a reason, and the search goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pennyweight.core.errors import PlanError

Point = tuple[object, ...]
"""A value for each axis, in the axes' order."""

SHARE = 0.2
"""Of all points, how many may be measured; at least one a value of the first axis."""
STARTS = 3
"""Values of the first axis to walk from."""
HOPELESS = 4.0
"""A value of the first axis this many times slower than the best is not walked from."""
GAIN = 0.98
"""A point must be faster by this to be moved to, and to be believed in."""
RIDGE = 0.1
"""How strongly effects are held at 0, in squared logarithms."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One point and what came of it."""

    point: Point
    ms: float | None
    """Its time; None where it failed."""
    note: str = ""
    """Why it was measured, or the reason it failed."""


Measured = tuple[float | None, str]
"""A time, or None and the reason."""


def explore(
    axes: Mapping[str, Sequence[object]],
    measure: Callable[[Point], Measured],
    *,
    share: float = SHARE,
    skip: Callable[[Point], str] | None = None,
) -> tuple[Point, tuple[Tried, ...]]:
    """The fastest point found, and every trial in order.

    Args:
        axes: each axis' values, the usual one first; the first axis is the one that matters most.
        measure: the time of a point, or None and a reason.
        share: of all points that may be measured.
        skip: a reason not to measure a point at all, or an empty text; such points do not count.

    Raises:
        PlanError: an axis is empty, or no point could be measured.
    """
    empty = [name for name, values in axes.items() if not values]
    if empty or not axes:
        raise PlanError(f"nothing to choose from: {', '.join(empty) or 'no axes'} without a value")
    search = _Search(list(axes), [list(v) for v in axes.values()], measure, skip or (lambda _: ""), share)
    search.run()
    best = search.best()
    if best is None:
        raise PlanError("nothing could be measured: " + "; ".join(sorted({t.note for t in search.trials})))
    return best, tuple(search.trials)


class _Search:
    def __init__(
        self,
        names: list[str],
        values: list[list[object]],
        measure: Callable[[Point], Measured],
        skip: Callable[[Point], str],
        share: float,
    ) -> None:
        self.names, self.values, self.measure, self.skip = names, values, measure, skip
        self.points = [p for p in itertools.product(*values) if not skip(p)]
        self.allowance = max(len(values[0]), math.floor(share * len(self.points)))
        self.trials: list[Tried] = []
        self.seen: dict[Point, float | None] = {}

    def run(self) -> None:
        """Firsts; the second axis from the best of those; the other axes from the best first, with what the fit believes in."""
        usual = tuple(v[0] for v in self.values)
        for value in self.values[0]:
            self.try_((value, *usual[1:]), f"{self.names[0]} {value}")
        timed = sorted(((ms, p) for p, ms in self.seen.items() if ms is not None), key=lambda t: t[0])
        starts = [self.walk(p, 1) for ms, p in timed[:STARTS] if ms <= HOPELESS * timed[0][0]]
        for point in sorted(starts, key=self.time):
            for axis in range(2, len(self.names)):
                point = self.walk(point, axis)
            while self.left > 0 and (other := self.believed()) is not None:
                self.try_(other, "the fit believes in it")

    def time(self, point: Point) -> float:
        """What a point took; infinite where it failed or was not measured."""
        ms = self.seen.get(point)
        return math.inf if ms is None else ms

    @property
    def left(self) -> int:
        """Trials that are left."""
        return self.allowance - len(self.trials)

    def best(self) -> Point | None:
        """The fastest point so far."""
        timed = {p: ms for p, ms in self.seen.items() if ms is not None}
        return min(timed, key=timed.__getitem__) if timed else None

    def try_(self, point: Point, why: str) -> float | None:
        """Measure a point, once, as long as trials are left."""
        if point in self.seen:
            return self.seen[point]
        if self.left <= 0 or self.skip(point):
            return None
        ms, reason = self.measure(point)
        self.seen[point] = ms
        self.trials.append(Tried(point, ms, why if ms is not None else reason))
        return ms

    def walk(self, point: Point, axis: int) -> Point:
        """The best point along an axis, each value measured."""
        for value in self.values[axis][1:] if axis < len(self.values) else ():
            other = (*point[:axis], value, *point[axis + 1 :])
            ms = self.try_(other, f"{self.names[axis]} {value}")
            if ms is not None and ms < GAIN * self.time(point):
                point = other
        return point

    def believed(self) -> Point | None:
        """The unmeasured point of the least predicted time, if that is below the best."""
        timed = {p: ms for p, ms in self.seen.items() if ms is not None}
        if not timed:
            return None
        rows = np.array([self.row(p) for p in timed])
        wanted = np.log(np.array(list(timed.values())))
        centre = wanted.mean()
        effects = np.linalg.solve(rows.T @ rows + RIDGE * np.eye(rows.shape[1]), rows.T @ (wanted - centre))
        failed = {v for p, ms in self.seen.items() if ms is None for v in [p[0]]} - {p[0] for p in timed}
        rest = [p for p in self.points if p not in self.seen and p[0] not in failed]
        if not rest:
            return None
        guesses = np.array([self.row(p) for p in rest]) @ effects + centre
        least = int(guesses.argmin())
        return rest[least] if math.exp(guesses[least]) < GAIN * min(timed.values()) else None

    def row(self, point: Point) -> list[float]:
        """A 1 for each value the point has, by axis."""
        return [float(v == p) for values, p in zip(self.values, point, strict=True) for v in values]
