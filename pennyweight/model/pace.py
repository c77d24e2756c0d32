"""Which batch size, and how many threads, train the fastest: found by training a little with each, inside the memory there is.

Rows a second rise with the batch until the layers are wide enough to keep the processor busy, and memory rises with it to
the end; where the two meet depends on the model and the machine, so it is measured. Batches grow by two from ``SMALLEST``
while they pay; of those within ``CLOSE`` of the best the smallest is taken, since a larger one makes fewer steps of the same
rows.

Nothing runs out of memory. What a batch will need is foretold from those before it, and one that would pass ``SHARE`` of
what is free is not run; should one need more than foretold, a limit on the process turns what would be a kill into an error.
Either way that point is marked and the search goes on. Doubling until it fails, as is common, leaves no head-room and, on a
CPU, no process.

The module is as it was afterwards: steps are made at a learning rate of 0, norms' statistics are put back. What it costs is
about ten steps a point.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from torch import nn

from pennyweight.core import hardware, memory
from pennyweight.core.errors import DeviceError
from pennyweight.data.dataset import Dataset
from pennyweight.model.train import Learner, Recipe, loss_of

SMALLEST, STEPS = 256, 64
"""Of batches tried, and steps that an epoch keeps at least."""
SHARE = 0.8
"""Of the memory that is free: the rest is head-room."""
CLOSE = 0.95
"""Of the best pace, which a smaller batch may have to be taken."""
TRIES = 6


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting that was tried."""

    batch: int
    threads: int
    rows_per_s: float = 0.0
    """0 where it could not be run."""
    bytes: int = 0
    """What the process grew by."""
    note: str = ""
    """Why it was not run, or what stopped it."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """What came of the search."""

    best: Point
    points: tuple[Point, ...]
    """All that were tried, in order."""


def search(
    module: nn.Module,
    train: Dataset,
    recipe: Recipe,
    *,
    inputs: Sequence[str] = (),
    room: int | None = None,
    hear: Callable[[Point], None] | None = None,
) -> Pace:
    """The fastest batch size and number of threads for a training by this recipe, whose ``batch`` is not read.

    Args:
        module: what would be trained; it is left as it was found.
        train: rows like those it would be trained on; batches of at least ``STEPS`` an epoch are tried.
        recipe: how.
        inputs: columns handed to ``forward`` one by one; empty for the whole batch.
        room: bytes it may take; by default a share of what is free.
        hear: called with each point.

    Raises:
        DeviceError: there is no memory for the smallest batch.
    """
    room = int(SHARE * memory.free()) if room is None else room
    points: list[Point] = []
    before = torch.get_num_threads()

    def tried(batch: int, threads: int) -> Point:
        point = _foretold(points, batch, threads, room) or _run(module, train, recipe, inputs, batch, threads, room)
        points.append(point)
        if hear is not None:
            hear(point)
        return point

    try:
        cores = hardware.limits()[0]
        best = _grown(lambda batch: tried(batch, cores), len(train))
        for threads in itertools.takewhile(lambda n: n < cores, (2**k for k in range(10))):
            one = tried(best.batch, threads)
            best = max(best, one, key=lambda p: p.rows_per_s)
    finally:
        torch.set_num_threads(before)
    return Pace(best, tuple(points))


def _grown(tried: Callable[[int], Point], rows: int) -> Point:
    """The smallest batch that is close to the fastest; sizes grow until two in a row do not pay or one cannot be run."""
    found: list[Point] = []
    for batch in _sizes(rows):
        point = tried(batch)
        if not point.rows_per_s:
            break
        found.append(point)
        top = max(found, key=lambda p: p.rows_per_s)
        if len(found) - found.index(top) > 2:
            break
    if not found:
        raise DeviceError(
            f"no memory to train on {point.batch} rows at once ({point.note}); free some, or make the model smaller"
        )
    return next(p for p in found if p.rows_per_s >= CLOSE * top.rows_per_s)


def _sizes(rows: int) -> Iterator[int]:
    """Batches to try, rising."""
    size = min(SMALLEST, max(2, rows))
    yield size
    while 2 * size * STEPS <= rows:
        size *= 2
        yield size


def _foretold(points: Sequence[Point], batch: int, threads: int, room: int) -> Point | None:
    """The point of a batch that would not fit, by what the last two need; None if it would."""
    ran = [p for p in points if p.rows_per_s and p.batch < batch]
    if len(ran) < 2:
        return None
    one, two = ran[-2:]
    slope = max(0.0, (two.bytes - one.bytes) / (two.batch - one.batch))
    need = int(two.bytes + slope * (batch - two.batch))
    return (
        Point(batch, threads, 0.0, need, f"not tried: it would take {need:,} bytes, {room:,} may be") if need > room else None
    )


def _run(
    module: nn.Module, train: Dataset, recipe: Recipe, inputs: Sequence[str], batch: int, threads: int, room: int
) -> Point:
    """Some steps of one setting."""
    torch.set_num_threads(threads)
    recipe = dataclasses.replace(recipe, batch=batch)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    was, took, most, start = module.training, [], 0, _held()
    try:
        with torch.random.fork_rng(devices=[]), memory.kept(), memory.guarded(room):
            loss = loss_of(module, train, recipe, inputs)
            with Learner(module, loss, recipe) as learner:
                module.train()
                for rows in itertools.islice(train.batches(batch, shuffle=True, drop_last=True), TRIES):
                    began = time.perf_counter()
                    learner.learn(rows, 0.0)
                    took.append(time.perf_counter() - began)
                    most = max(most, _held() - start)
    except (RuntimeError, MemoryError) as error:
        if not memory.short(error):
            raise
        return Point(batch, threads, 0.0, most, "out of memory")
    finally:
        module.train(was)
        for p in module.parameters():
            p.grad = None
        for name, b in module.named_buffers():
            b.copy_(buffers[name])
    return Point(batch, threads, batch / statistics.median(took[1:] or took), most)


def _held() -> int:
    return int(psutil.Process().memory_info().rss)
