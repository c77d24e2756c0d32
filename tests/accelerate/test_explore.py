"""Within 5 % of the best in a fifth of the trials, on landscapes with and without settings that act together."""

import itertools
import math
import random

import pytest

from pennyweight.accelerate.explore import Measured, Point, explore
from pennyweight.core.errors import PlanError

AXES = {"engine": ["eager", "a", "b", "c", "d", "e"], "threads": [1, 2, 4], "cut": [0, 64, 128, 256, 512, 1024]}


def landscape(seed: int, together: float) -> dict[Point, float]:
    """Milliseconds of every point: an effect a value, and one of each pair that is ``together`` as large."""
    draw = random.Random(seed)
    alone = [{v: draw.gauss(0, 0.5) for v in values} for values in AXES.values()]
    pairs = {p: draw.gauss(0, 0.5 * together) for k in (0, 1) for p in itertools.product(*list(AXES.values())[k : k + 2])}
    return {
        p: math.exp(sum(a[v] for a, v in zip(alone, p, strict=True)) + pairs[p[0], p[1]] + pairs[p[1], p[2]])
        for p in itertools.product(*AXES.values())
    }


@pytest.mark.parametrize(("together", "least"), [(0.0, 1.0), (0.1, 0.9)])
def test_a_fifth_of_the_trials_is_enough(together: float, least: float) -> None:
    near = 0
    for seed in range(40):
        times = landscape(seed, together)
        best, trials = explore(AXES, lambda p: (times[p], ""))  # noqa: B023
        assert len(trials) <= 0.2 * len(times) and len({t.point for t in trials}) == len(trials)
        near += times[best] <= 1.05 * min(times.values())
    assert near >= least * 40


def test_noise_of_a_few_percent_does_not_lead_astray() -> None:
    near = 0
    for seed in range(40):
        times, draw = landscape(seed, 0.0), random.Random(seed)
        best, _ = explore(AXES, lambda p: (times[p] * draw.lognormvariate(0, 0.03), ""))  # noqa: B023
        near += times[best] <= 1.10 * min(times.values())
    assert near >= 36


def test_a_failure_is_marked_and_the_search_goes_on() -> None:
    times = landscape(1, 0.0)

    def measure(point: Point) -> Measured:
        if point[0] == "b":
            return None, "no compiler"
        return (None, "out of memory") if point[2] == 0 and point[1] == 4 else (times[point], "")

    best, trials = explore(AXES, measure)
    notes = {t.point: t.note for t in trials if t.ms is None}
    assert notes[("b", 1, 0)] == "no compiler" and set(notes.values()) == {"no compiler", "out of memory"}
    assert sum(t.point[0] == "b" for t in trials) == 1, "an engine that cannot be had is asked once"
    assert times[best] <= 1.05 * min(t for p, t in times.items() if measure(p)[0] is not None)


def test_points_that_make_no_sense_are_not_measured() -> None:
    times = landscape(2, 0.0)
    best, trials = explore(AXES, lambda p: (times[p], ""), skip=lambda p: "too many" if p[1] == 4 else "")
    assert all(t.point[1] != 4 for t in trials) and best[1] != 4


def test_nothing_to_choose_from() -> None:
    with pytest.raises(PlanError, match="threads without a value"):
        explore({"engine": ["eager"], "threads": []}, lambda p: (1.0, ""))
    with pytest.raises(PlanError, match="nothing could be measured: broken"):
        explore({"engine": ["eager"]}, lambda p: (None, "broken"))
