"""A model on two to thousands of workers, on paper: the planner's own code over topologies that grow.

Either each worker keeps as many examples as before (weak scaling), or a step's are parted among more and more (strong). At
every size the planner chooses again, among placements in one group, in groups of hosts (2D) and data parallel, so that a curve
bends where no placement helps and not where a fixed one ends. What limits is told from the step's parts: where exchange takes
more than compute, more workers mostly talk.

A prediction at thousands of workers is an extrapolation: rates are those of this machine and links those that were given. It
has no stragglers, no shared switches and no failures, all of which only make it worse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pennyweight.core.errors import ConfigError
from pennyweight.core.hardware import Topology
from pennyweight.distribute.cost import Predicted, Setting, Step
from pennyweight.distribute.search import Search, cheapest, divisors
from pennyweight.distribute.workload import Workload

WORKERS = tuple(2**k for k in range(1, 13))
"""2 to 4,096."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A model on so many workers."""

    workers: int
    groups: int
    kinds: tuple[tuple[str, int], ...]
    """How many tables are whole and cut each way."""
    step: Step
    rate: float
    """Examples a second of all workers."""
    efficiency: float
    """Of a worker's speed, against one that has nobody to talk to."""
    memory: int
    """Bytes held by the fullest worker."""
    sent: int
    """Bytes a worker sends in a step, the busiest."""
    fits: bool


def simulate(
    work: Workload,
    topology: Topology,
    workers: Sequence[int] = WORKERS,
    *,
    groups: Sequence[int] | None = None,
    strong: bool = False,
) -> tuple[Point, ...]:
    """The best placement at each number of workers; ``work.batch`` is one worker's, or with ``strong`` that of all.

    Args:
        work: what a step asks.
        topology: a full host with its workers, and the link between hosts.
        workers: how many; up to a host's they share one host's link, above that hosts are added.
        groups: numbers of groups to choose from; by default all the planner tries.
        strong: whether the examples of a step are parted among more workers.
    """
    if topology.between is None:
        raise ConfigError("scaling over hosts needs the link between them; give the topology one (between)")
    return tuple(_point(work if strong else work.replace(batch=work.batch * n), sized(topology, n), groups) for n in workers)


def linked(topology: Topology) -> Topology:
    """With the link inside a host between hosts too, where no other is known."""
    return dataclasses.replace(topology, between=topology.between or topology.inside)


def sized(topology: Topology, workers: int) -> Topology:
    """So many workers: a part of a host that has as much for each, or several hosts."""
    if workers <= topology.workers:  # on one host
        share = workers / topology.workers
        cpu = topology.cpu
        part = dataclasses.replace(cpu, cores=max(1, int(cpu.cores * share)), memory_bytes=int(cpu.memory_bytes * share))
        return dataclasses.replace(topology, devices=(part, *topology.gpus[:workers]), hosts=1, workers=workers)
    if workers % topology.workers:
        raise ConfigError(f"{workers} workers are no whole number of hosts with {topology.workers} each")
    return dataclasses.replace(topology, hosts=workers // topology.workers, between=topology.between or topology.inside)


def _point(work: Workload, topology: Topology, groups: Sequence[int] | None) -> Point:
    tried = [g for g in (groups or divisors(topology)) if topology.world % g == 0]
    found = [Search(Setting(work, topology, g), small=0).best() for g in tried]
    best = cheapest([p for p in found if p.fits] or [min(found, key=lambda p: p.memory)])
    return Point(
        workers=topology.world,
        groups=best.placement.replicas,
        kinds=_kinds(work, best),
        step=best.step,
        rate=work.batch / best.step.seconds,
        efficiency=best.step.compute / best.step.seconds,
        memory=best.memory,
        sent=max(r.sent for r in best.ranks),
        fits=best.fits,
    )


def _kinds(work: Workload, best: Predicted) -> tuple[tuple[str, int], ...]:
    shards = best.placement.shards
    kinds = [shards[t.path].kind if t.path in shards else "whole" for t in work.tables]
    return tuple(sorted({k: kinds.count(k) for k in set(kinds)}.items()))


def crossing(points: Sequence[Point]) -> float:
    """Workers at which exchange takes as long as compute, between two sizes by their logarithms; infinite where it never is."""
    before: Point | None = None
    for point in points:
        ratio = point.step.exchange / point.step.compute
        if ratio >= 1:
            if before is None:
                return float(point.workers)
            low, high = math.log(before.step.exchange / before.step.compute), math.log(ratio)
            share = -low / (high - low) if high > low else 1.0
            return float(before.workers * (point.workers / before.workers) ** min(1.0, max(0.0, share)))
        before = point
    return math.inf
