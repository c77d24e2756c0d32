"""What to do with a model that fits on no placement: by how much it misses, and four ways out, each tried, not estimated.

A remedy is worth a sentence only if it is true. So each number here comes from planning again: with smaller tables, with more
workers, with a smaller batch; and what would go to disk is summed from the placement that came nearest.
"""

from __future__ import annotations

import dataclasses

from pennyweight.core.budget import size
from pennyweight.core.hardware import Topology
from pennyweight.distribute.cost import Predicted, Setting
from pennyweight.distribute.search import Search, divisors
from pennyweight.distribute.workload import Workload

MOST = 1 << 14
"""Workers up to which more are tried."""
FOLDS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""How many times fewer rows are tried."""


def too_large(work: Workload, topology: Topology, nearest: Predicted, reserve: float) -> str:
    """By how much the placement that comes nearest misses, and four ways out with their numbers."""
    worst = max(nearest.ranks, key=lambda r: r.memory)
    ways = (
        f"compress the tables ({_compress(work, topology, reserve)})",
        f"use more workers ({_more(work, topology, reserve)})",
        f"take a smaller batch ({_smaller(work, topology, reserve)})",
        f"offload tables to disk ({_offload(work, nearest)})",
    )
    parts = f"{size(worst.tables)} tables with their optimizer, {size(worst.dense)} dense layers"
    return (
        f"{work.name} does not fit on {topology.world} worker{'s' * (topology.world > 1)}: placed as evenly as can be, "
        f"one holds {size(worst.memory)} ({parts}, {size(worst.activations + worst.buffers)} activations and exchange) and may "
        f"hold {size(nearest.limit)}, {size(worst.memory - nearest.limit)} less. "
        f"Ways out: {', '.join(f'{n}) {way}' for n, way in enumerate(ways, 1))}"
    )


def fits(work: Workload, topology: Topology, reserve: float) -> bool:
    """Whether any placement fits."""
    return any(Search(Setting(work, topology, r, reserve), small=0).best().fits for r in divisors(topology))


def _compress(work: Workload, topology: Topology, reserve: float) -> str:
    """The data types that would do (rows with a scale and a bias each), or how many times fewer rows."""
    said = []
    for name, bits, extra in (("int8", 8, 8), ("int4", 4, 4)):
        smaller = _with_bytes(work, {t.path: min(t.bytes, t.rows * (-(-t.dim * bits // 8) + extra)) for t in work.tables})
        ratio = sum(t.bytes for t in work.tables) / max(1, sum(t.bytes for t in smaller.tables))
        said.append(f"{name}, {ratio:.1f} times smaller, {'fits' if fits(smaller, topology, reserve) else 'does not fit'}")
    for fold in FOLDS:
        tables = [dataclasses.replace(t, bytes=max(1, t.bytes // fold), rows=max(1, t.rows // fold)) for t in work.tables]
        if fits(work.replace(tables=tuple(tables)), topology, reserve):
            return f"{', '.join(said)}; {fold} times fewer rows fit"
    return f"{', '.join(said)}; tables are not what is too large"


def _with_bytes(work: Workload, bytes: dict[str, int]) -> Workload:
    return work.replace(tables=tuple(dataclasses.replace(t, bytes=bytes[t.path]) for t in work.tables))


def _more(work: Workload, topology: Topology, reserve: float) -> str:
    """How many workers do, found by doubling, then by halving the step to a sixteenth."""
    low = high = topology.world

    def at(workers: int) -> bool:
        return fits(work, grown(topology, workers), reserve)

    while high < MOST:
        low, high = high, high * 2
        if work.batch < high:
            return f"not enough: {work.batch} rows a step feed no more than {work.batch} workers"
        if at(high):
            break
    else:
        return "not enough: what every worker holds does not fit"
    while high - low > max(topology.workers, high // 16):
        middle = (low + high) // 2 // topology.workers * topology.workers
        low, high = (low, middle) if at(middle) else (middle, high)
    return f"{high} fit, {topology.world} do not"


def grown(topology: Topology, workers: int) -> Topology:
    """More hosts of the same kind, until there are so many workers; over the link that is known where there is none between."""
    return dataclasses.replace(topology, hosts=-(-workers // topology.workers), between=topology.between or topology.inside)


def _smaller(work: Workload, topology: Topology, reserve: float) -> str:
    """The largest power of two of rows that fits."""
    batch = 1 << (work.batch.bit_length() - 1)
    while batch // 2 >= topology.world:
        batch //= 2
        if fits(work.replace(batch=batch), topology, reserve):
            return f"{batch} rows fit, {work.batch} do not"
    return "not enough: what is held whatever the batch is too large"


def _offload(work: Workload, nearest: Predicted) -> str:
    """Tables with the least traffic for their bytes, until the rest fits."""
    short = sum(max(0, r.memory - nearest.limit) for r in nearest.ranks)
    gone, names = 0.0, []
    for table in sorted(work.tables, key=lambda t: (t.lookups / t.rows, t.path)):
        if gone >= short:
            break
        copies = 1 if table.path in nearest.placement.shards else nearest.placement.group
        gone += work.kept(table) * copies
        names.append(table.path)
    if gone < short:
        return f"not enough: still {size(short - gone)} too much with every table there"
    return f"{', '.join(names)}, {size(gone)} with their optimizer, as mapped files: a page is read for a cold row"
