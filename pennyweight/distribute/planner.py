"""Placement over workers: which table is cut how, who holds which block, and why.

Chosen is what fits memory, takes the least predicted time a step (``cost``), and, among what a prediction cannot tell apart
(2 %), costs the least money. The choices for a table are: whole on every worker (data parallel), one owner, cut by row, by
column, or both; for the whole: how many groups of workers hold everything (2D), and which wide dense layers are cut. ``search``
says how the best is found and how its time grows.

TorchRec's planner is the known alternative: it proposes by sharding type and partitions greedily over a like chain of costs. It
knows no dense layers, no price, no data parallelism inside a host only, and has constants where this has measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import numpy as np

from pennyweight.core.budget import size
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.hardware import Topology
from pennyweight.distribute import place, workload  # noqa: F401  (registers its transform for who asks for the planner)
from pennyweight.distribute.cost import Predicted, Setting
from pennyweight.distribute.remedy import too_large
from pennyweight.distribute.search import Search, cheapest, divisors
from pennyweight.distribute.workload import Asked, Update, Workload
from pennyweight.model.bundle import Bundle
from pennyweight.model.placement import Placement, Shard
from pennyweight.model.transform import Env, Transform


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was chosen for one table, and why."""

    path: str
    rows: int
    dim: int
    bytes: int
    lookups: float
    kind: str
    """``whole``, or how it is cut."""
    ranks: tuple[int, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A placement that was not chosen, or the one that was."""

    name: str
    predicted: Predicted


@dataclasses.dataclass(frozen=True)
class Made:
    """What planning found."""

    work: Workload
    topology: Topology
    chosen: Predicted
    decisions: tuple[Decision, ...]
    alternatives: tuple[Alternative, ...]
    """Plain ways to place everything, for comparison; some do not fit."""
    tried: int
    """Placements that were costed."""
    exhaustive: bool
    """Whether that was all of them."""
    why: tuple[str, ...]


def plan(work: Workload, topology: Topology, *, reserve: float = 0.1) -> Made:
    """The placement that fits, takes the least time, and then the least money.

    Args:
        work: what a step asks (``workload.of``).
        topology: the workers, measured (``calibrate.measured``).
        reserve: share of each worker's memory that is left free.

    Raises:
        PlanError: nothing fits; the message says by how much, and names four ways out with their numbers.
    """
    if work.batch < topology.world:
        raise ConfigError(f"a batch of {work.batch} rows over {topology.world} workers; give at least a row each")
    found, tried, every = [], 0, True
    for replicas in divisors(topology):
        search = Search(Setting(work, topology, replicas, reserve))
        found.append(search.best())
        tried, every = tried + search.tried, every and search.every
    fitting = [p for p in found if p.fits]
    if not fitting:
        raise PlanError(too_large(work, topology, min(found, key=lambda p: p.memory), reserve))
    chosen = cheapest(fitting)
    others = alternatives(work, topology, reserve)
    decided = tuple(_decision(t, chosen, Setting(work, topology, chosen.placement.replicas, reserve)) for t in work.tables)
    return Made(work, topology, chosen, decided, others, tried + len(others), every, _why(chosen, others, topology))


# -- alternatives ----------------------------------------------------------------------------------------------------------


def alternatives(work: Workload, topology: Topology, reserve: float = 0.1) -> tuple[Alternative, ...]:
    """The plain ways: everything whole, everything cut one way, and each of these inside a host where there are several."""
    made = []
    for replicas in sorted({1, topology.hosts} - {topology.world}):
        setting = Setting(work, topology, replicas, reserve)
        for kind in ("table-wise", "row-wise", *(("column-wise",) if work.narrow else ())):
            placement = Placement(topology.world, shards=plain(kind, setting), replicas=replicas)
            name = kind if replicas == 1 else f"{kind}, in each host"
            made.append(Alternative(name, setting.predict(placement)))
    alone = Setting(work, topology, topology.world, reserve)
    made.append(Alternative("data parallel", alone.predict(Placement(topology.world, replicas=topology.world))))
    return tuple(made)


def plain(kind: str, setting: Setting) -> dict[str, Shard]:
    """Every table ``whole``, ``table-wise`` (owners by bytes, evenly), ``row-wise`` or ``column-wise`` where it has as many."""
    if kind == "whole":
        return {}
    everyone = tuple(range(setting.group))
    room = np.zeros(setting.group)
    found = {}
    for table in sorted(setting.work.tables, key=lambda t: (-t.bytes, t.path)):
        rows, wide = table.rows >= setting.group, table.dim >= setting.group
        if kind == "row-wise" and table.cuttable and rows:
            found[table.path] = Shard("row", everyone)
        elif kind == "column-wise" and table.cuttable and wide:
            found[table.path] = Shard("column", everyone)
        else:
            owner = int(room.argmin())
            room[owner] += setting.work.kept(table)
            found[table.path] = Shard("table", (owner,))
    return dict(sorted(found.items()))


# -- reasons ---------------------------------------------------------------------------------------------------------------


def _decision(table: Asked, chosen: Predicted, setting: Setting) -> Decision:
    shard = chosen.placement.shards.get(table.path)
    kind, ranks = ("whole", tuple(range(setting.group))) if shard is None else (shard.kind, shard.ranks)
    return Decision(table.path, table.rows, table.dim, table.bytes, table.lookups, kind, ranks, _reason(table, shard, setting))


def _reason(table: Asked, shard: Shard | None, setting: Setting) -> str:
    """Bytes held and sent as chosen, against the opposite."""
    if setting.world == 1:
        return "one worker holds everything"
    whole = Setting(setting.work, setting.topology, setting.replicas, setting.reserve).table(table, None)
    copy, told = float(whole.held.max()), float(whole.sent.sum())
    if shard is None:
        if setting.group == 1:
            return f"every worker has its own: {size(copy)} each, {size(told)} of gradients a step between all in its place"
        cut = setting.table(table, _opposite(table, setting))
        return f"{size(copy)} on each worker; {size(told)} a step, cut it would be {size(float(cut.sent.sum()))}"
    now = setting.table(table, shard)
    held, sent = float(now.held.max()), float(now.sent.sum())
    if copy > setting.limit:
        return (
            f"a whole copy takes {size(copy)}, more than a worker has; {size(held)} on each that holds it, {size(sent)} a step"
        )
    return f"{size(held)} on each that holds it instead of {size(copy)} on all; {size(sent)} a step instead of {size(told)}"


def _opposite(table: Asked, setting: Setting) -> Shard:
    everyone = tuple(range(setting.group))
    return Shard("row", everyone) if table.cuttable and table.rows >= setting.group else Shard("table", (0,))


def _why(chosen: Predicted, others: Sequence[Alternative], topology: Topology) -> tuple[str, ...]:
    step = chosen.step
    parts = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    most = max(parts, key=lambda n: parts[n])
    said = [f"{WORDS[most]} takes most of a step: {parts[most] / step.seconds:.0%} of {step.seconds * 1e3:.3g} ms"]
    mine = chosen.placement  # where all is whole, one group and many are the same
    alike = [
        a for a in others if a.predicted.placement.shards == mine.shards and (not mine.shards or a.predicted.placement == mine)
    ]
    rest = [a for a in others if a.predicted.fits and a not in alike]
    if rest:
        nearest = min(rest, key=lambda a: a.predicted.step.seconds)
        longer, more = nearest.predicted.step.seconds / step.seconds, nearest.predicted.sent / max(1, chosen.sent)
        said.append(
            f"the best plain way that fits is {nearest.name}: a step {longer:.2f} times as long, {more:.2f} times the bytes"
        )
    if without := [a.name for a in others if not a.predicted.fits]:
        said.append(f"do not fit in {size(chosen.limit)} a worker: {', '.join(without)}")
    slowest = max(chosen.ranks, key=lambda r: r.lookup_ms)
    if len(chosen.ranks) > 1 and slowest.lookup_ms > 0:
        least = min(r.lookup_ms for r in chosen.ranks)
        said.append(f"rank {slowest.rank} looks up longest, {slowest.lookup_ms:.3g} ms; the least is {least:.3g} ms")
    return tuple(said)


WORDS: Mapping[str, str] = {
    "lookup": "looking rows up",
    "dense": "dense arithmetic",
    "ids": "sending ids",
    "rows": "sending rows back",
    "gradients": "sending rows' gradients",
    "sums": "summing what is whole on every worker",
}
"""What each part of a step is, for a person."""


# -- the transform ---------------------------------------------------------------------------------------------------------


@named("spread")
@dataclasses.dataclass(frozen=True)
class Spread(Transform):
    """Cut tables over workers as the planner finds best; the topology, measured, comes from ``env``."""

    batch: int = 4096
    """Examples in a step, over all workers."""
    update: Update = "adagrad"
    """How tables are trained (``Recipe.tables``)."""
    reserve: float = 0.1
    """Share of each worker's memory that is left free."""

    family: ClassVar[Literal["distribute"]] = "distribute"
    stage: ClassVar[Literal["placement"]] = "placement"

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.reserve < 1:
            raise ConfigError(f"batch {self.batch} must be 1 or more, and reserve {self.reserve} is from 0 to 1")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with a placement over all workers of the topology; where its tables live on a machine stays.

        Raises:
            PlanError: nothing fits.
        """
        topology = cast(Topology, env.need("topology", self))
        made = plan(workload.of(bundle, self.batch, self.update, env.allow), topology, reserve=self.reserve)
        return bundle.replace(placement=dataclasses.replace(made.chosen.placement, tables=bundle.placement.tables))

    def describe(self) -> str:
        """One plain sentence."""
        return f"cut tables over the workers for steps of {self.batch} rows"
