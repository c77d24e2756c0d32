"""Four plain formulas of compression and parallel work, where they hold, and what the calibrated model says instead.

    r = M / m          compression rate: bytes before over bytes after
    C = (N / 2) * c    communication: N workers in N / 2 pairs, each at a cost c
    V = a * b          speed: a workers of speed b
    T = max(t_i)       completion: who ends last

They are what one reckons on paper, and each leaves something out: r what is held beside weights, C that pairs talk at the same
time and that a worker's bytes shrink as workers grow, V what is spent on talking, T that workers wait for each other in the
middle of a step. ``printed`` puts the two next to each other for a plan, so that it is seen when paper is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pennyweight.core.budget import size
from pennyweight.core.errors import ConfigError
from pennyweight.distribute.cost import Predicted, Setting
from pennyweight.distribute.planner import Made, plain
from pennyweight.distribute.scale import sized
from pennyweight.distribute.search import Search
from pennyweight.model.placement import Placement

OFF = 0.2
"""A formula counts as no longer true where it is this far from the model."""
MOST = 1024
"""Workers up to which its end is looked for."""


@dataclasses.dataclass(frozen=True)
class Formula:
    """One formula for a plan at hand."""

    name: str
    text: str
    value: float
    """By the formula, with the plan's numbers."""
    model: float
    """What the calibrated model says instead."""
    said: str
    """Both in a sentence, with their units, and where the formula ends."""

    @property
    def holds(self) -> bool:
        """Whether the two agree here."""
        return abs(self.value - self.model) <= OFF * abs(self.model)


def compression(before: float, after: float) -> float:
    """R = M / m."""
    if before <= 0 or after <= 0:
        raise ConfigError(f"a compression rate is of bytes above 0, got {before:g} and {after:g}")
    return before / after


def communication(workers: int, cost: float) -> float:
    """C = (N / 2) * c: each of N / 2 pairs at a cost c."""
    if workers < 1 or cost < 0:
        raise ConfigError(f"communication is of 1 or more workers at a cost from 0, got {workers} and {cost:g}")
    return workers / 2 * cost


def speed(workers: float, each: float) -> float:
    """V = a * b: a workers that do b each."""
    if workers < 0 or each < 0:
        raise ConfigError(f"a speed is of workers and work from 0, got {workers:g} and {each:g}")
    return workers * each


def completion(times: Sequence[float]) -> float:
    """T = max(t_i)."""
    if not times:
        raise ConfigError("nobody works, so nothing is completed; give the times of one worker or more")
    return max(times)


def printed(made: Made, before: int = 0) -> tuple[Formula, ...]:
    """The four for a plan; ``before`` is what the model weighed before it was compressed, if it was."""
    work, chosen, topology = made.work, made.chosen, made.topology
    setting = Setting(work, topology, chosen.placement.replicas)
    found = [_rate(setting, chosen, before or work.bytes)]
    if topology.world > 1:
        found.append(_talk(setting, chosen))
        found.append(_speed(made))
    found.append(_last(chosen))
    return tuple(found)


def _rate(setting: Setting, chosen: Predicted, before: int) -> Formula:
    work = setting.work
    r = compression(before, work.bytes)
    worst = max(chosen.ranks, key=lambda k: k.memory)
    scale = before / work.bytes
    wide = worst.tables * scale + worst.dense + worst.activations + worst.buffers
    model = compression(wide, worst.memory)
    rest = worst.memory - worst.tables
    return Formula(
        "compression",
        "r = M / m",
        r,
        model,
        f"r = {size(before)} / {size(work.bytes)} = {r:.2f} of weights; of what the fullest worker holds it is {model:.2f}, as "
        f"{size(rest)} of {size(worst.memory)} are no table; true while tables are most of a worker's memory",
    )


def _talk(setting: Setting, chosen: Predicted) -> Formula:
    """C from what a pair would take: a worker's bytes of a step, alone with one other."""
    world = setting.world
    pair = dataclasses.replace(setting.topology, hosts=1, workers=2) if setting.topology.workers > 1 else setting.topology
    two = Search(Setting(setting.work.replace(batch=max(2, setting.work.batch * 2 // world)), pair, 1, 0.0), small=0).best()
    cost = two.step.exchange
    c, model = communication(world, cost), chosen.step.exchange
    said = (
        f"C = ({world} / 2) * {cost * 1e3:.3g} ms = {c * 1e3:.3g} ms if pairs talked in turn; the model: {model * 1e3:.3g} ms"
    )
    return Formula(
        "communication", "C = (N / 2) * c", c, model,
        f"{said}: pairs talk at once, so it is true of one pair, and of N pairs on one shared wire",
    )  # fmt: skip


def _speed(made: Made) -> Formula:
    """V from one worker's speed, and how many workers it takes until it is a fifth too high."""
    work, chosen, topology = made.work, made.chosen, made.topology
    each = 1 / _alone(made) * work.batch / topology.world
    v, model = speed(topology.world, each), work.batch / chosen.step.seconds
    end = next((n for n in _doubling(2, MOST) if _share(made, n) < 1 - OFF), 0)
    where = f"true to a fifth below {end} workers" if end else f"true to a fifth up to {MOST} workers"
    return Formula(
        "speed", "V = a * b", v, model,
        f"V = {topology.world} * {each:,.0f} = {v:,.0f} examples/s; the model says {model:,.0f}, since "
        f"{chosen.step.exchange / chosen.step.seconds:.0%} of a step is exchange; {where} with as many examples each",
    )  # fmt: skip


def _alone(made: Made) -> float:
    """Seconds in which a worker would do its examples if there were nobody to talk to."""
    return made.chosen.step.compute


def _share(made: Made, workers: int) -> float:
    """The share of V that is left with so many workers, each with as many examples as here, by the better of two plain ways."""
    topology = sized(made.topology, workers)
    work = made.work.replace(batch=max(1, made.work.batch // made.topology.world) * topology.world)
    steps = []
    for groups, kind in ((1, "row-wise"), (topology.world, "whole")):
        setting = Setting(work, topology, groups)
        steps.append(setting.predict(Placement(topology.world, shards=plain(kind, setting), replicas=groups)).step)
    best = min(steps, key=lambda s: s.seconds)
    return best.compute / best.seconds


def _doubling(first: int, most: int) -> list[int]:
    found = [first]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def _last(chosen: Predicted) -> Formula:
    lookups = [r.lookup_ms for r in chosen.ranks]
    t, model = completion(lookups), chosen.step.seconds * 1e3
    return Formula(
        "completion", "T = max(t_i)", t, model,
        f"T = max(t_i) = {t:.3g} ms is the slowest worker's lookups; a step takes {model:.3g} ms: workers wait for each other "
        "after lookups, exchanges and dense layers, and each has its own slowest; true for work without a wait inside",
    )  # fmt: skip
