"""What a placement will cost: bytes each worker holds, bytes each sends, and the time of a step, before anything runs.

A step is a chain that all workers walk together (``shard``), since every exchange waits for the last: ids to the workers that
hold their rows, rows back, dense layers forward and backward, gradients to the rows, and sums of what several workers hold
whole. So its time is the sum over the chain's links of the slowest worker's time in each: T = max(t_i), link by link. Bytes
follow from the placement alone, seconds from bytes and counts by the topology's measured rates. A table adds to each worker
what it adds whatever other tables do (``Share``), which is what lets a search change one table at a time.

The known alternative is a learned cost model over measured plans; it needs the runs that a prediction is there to save.
TorchRec's estimator has the same chain with constants of one GPU of 2018. What is left out here: overlap of exchange and
compute (on CPUs both use the same cores, so there is little), caches, and stragglers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pennyweight.core.errors import ConfigError
from pennyweight.core.hardware import Topology
from pennyweight.distribute.workload import Asked, Layer, Workload
from pennyweight.model.placement import Cut, Placement, Shard

Floats = NDArray[np.float64]

ID, NUMBER = 4, 4
"""Bytes on the wire of an id and of a number."""
BUCKET = 1 << 20
"""Bytes of dense gradients that are summed at once (``reduce.BUCKET``)."""
ROUNDS: Mapping[str, int] = {"ids": 2, "rows": 1, "gradients": 1}
"""Exchanges inside a group in a step: counts and ids, rows, gradients (whose ids the holder still knows)."""
SPREAD = 3
"""Exchanges for what several workers hold alike: counts, ids, gradients."""
MESSAGE = 0.1
"""What posting one more message takes, over the latency of a link: a message's handling, not its way."""
ASKING = 1.5
"""Sorts of a worker's ids that asking others for their rows takes: once for the distinct ones, and a search for each."""
HANDLED = 12
"""Operations that a table costs each worker besides its rows, and a norm each way, where workers share the work."""
BACKWARD = 2.0
"""Operations of a dense layer's backward over its forward's: gradients of inputs and of weights."""
TOUCHES = 4.0
"""How often a row that is looked up is read or written: forward, gradient summed, optimizer's read and write."""
HELD = 4
"""Copies of dense weights while they are trained: weights, gradients, and Adam's two moments."""
KEPT = 2.0
"""Memory of activations over what a forward leaves: gradients of them live beside them."""
ALIKE = 0.02
"""Step times that differ by less are the same as far as a prediction can tell; then money decides."""

Exchange = Literal["ids", "rows", "gradients", "sums"]
"""Exchanges of a step: ids to holders, rows back, gradients to holders, and sums of what is held whole."""
EXCHANGES: tuple[Exchange, ...] = ("ids", "rows", "gradients", "sums")


@dataclasses.dataclass(frozen=True)
class Share:
    """What one table (or layer) adds to each worker of a group in a step; arrays are ``[group]``."""

    held: Floats
    """Bytes of weights and optimizer state."""
    found: Floats
    """Rows looked up, for others too."""
    moved: Floats
    """Bytes of rows read and written."""
    sorted: Floats
    """Ids sorted: to find the distinct ones, and to add up what belongs to the same row."""
    sent: Floats
    """Bytes sent in each exchange, ``[4, group]``, as ``EXCHANGES`` names them."""
    received: Floats
    """Bytes received, ``[4, group]``."""

    def __add__(self, other: Share) -> Share:
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Share)))

    def __sub__(self, other: Share) -> Share:
        return Share(*(getattr(self, f.name) - getattr(other, f.name) for f in dataclasses.fields(Share)))

    @classmethod
    def nothing(cls, group: int) -> Share:
        """Of no table at all."""
        one, four = np.zeros(group), np.zeros((4, group))
        return cls(one, one, one, one, four, four)


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the time of a step goes, in seconds."""

    lookup: float
    """Rows found, read and written by the busiest worker, ids sorted."""
    dense: float
    ids: float
    rows: float
    gradients: float
    sums: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return float(sum(dataclasses.astuple(self)))

    @property
    def exchange(self) -> float:
        """The part that waits for the network."""
        return self.ids + self.rows + self.gradients + self.sums

    @property
    def compute(self) -> float:
        """The part that does not."""
        return self.lookup + self.dense


@dataclasses.dataclass(frozen=True)
class Rank:
    """One worker of a group: bytes it holds by what they are for, and what it does in a step."""

    rank: int
    tables: int
    dense: int
    activations: int
    buffers: int
    sent: int
    """Bytes it sends in a step."""
    received: int
    lookup_ms: float

    @property
    def memory(self) -> int:
        """Bytes held at the most."""
        return self.tables + self.dense + self.activations + self.buffers


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What a placement costs; ranks of one group stand for those of all."""

    placement: Placement
    step: Step
    ranks: tuple[Rank, ...]
    limit: int
    """Bytes one worker may hold."""
    money: float
    """For a million examples."""

    @property
    def memory(self) -> int:
        """Bytes held by the fullest worker."""
        return max(r.memory for r in self.ranks)

    @property
    def sent(self) -> int:
        """Bytes all workers of all groups send in a step."""
        return sum(r.sent for r in self.ranks) * self.placement.replicas

    @property
    def fits(self) -> bool:
        """Whether every worker has room."""
        return self.memory <= self.limit


@dataclasses.dataclass(frozen=True)
class Setting:
    """A workload on a topology, for one size of group: what a cost is worked out from."""

    work: Workload
    topology: Topology
    replicas: int
    reserve: float = 0.1
    """Share of a worker's memory that is left free."""

    def __post_init__(self) -> None:
        if self.topology.rates is None or self.topology.inside is None:
            raise ConfigError("this topology was not measured: it has no rates or no link; see distribute.calibrate")
        if self.topology.hosts > 1 and self.topology.between is None:
            raise ConfigError(f"{self.topology.hosts} hosts and no link between them; give the topology one (between)")
        if self.world % self.replicas:
            raise ConfigError(f"{self.replicas} replicas do not divide {self.world} workers")

    @property
    def world(self) -> int:
        """Workers in all."""
        return self.topology.world

    @property
    def group(self) -> int:
        """Workers that hold everything once."""
        return self.world // self.replicas

    @property
    def rows(self) -> float:
        """Examples a worker has of its own in a step."""
        return self.work.batch / self.world

    @property
    def limit(self) -> int:
        """Bytes a worker may hold."""
        return int(self.topology.worker_bytes * (1 - self.reserve))

    # -- what each part adds -------------------------------------------------------------------------------------------------

    def table(self, table: Asked, shard: Shard | None) -> Share:
        """What a table adds to each worker, cut as ``shard`` says or whole on each.

        What travels is distinct rows: each worker asks once for the distinct ids of its examples and sends one gradient each.
        """
        ids = self.rows * table.lookups
        rows = table.distinct(ids)
        wide = NUMBER * table.dim
        held, found, moved = np.zeros(self.group), np.zeros(self.group), np.zeros(self.group)
        # One worker sorts its ids too where it trains touched rows; a timed step has that in it.
        own = ids if self.work.timed is None or self.work.update == "dense" else 0.0
        sorts = np.full(self.group, own)
        sent, received = np.zeros((4, self.group)), np.zeros((4, self.group))
        if shard is None:
            entry = rows * (ID + wide)
            sent[3] = received[3] = (self.world - 1) * entry
            held[:] = self.work.kept(table)
            found[:] = rows * self.world if self.work.update != "dense" else table.rows
            moved[:] = (2 * rows + 2 * found) * wide
            sorts += rows * self.world * (self.world > 1)
            return Share(held, found, moved, sorts, sent, received)
        down, across = shard.blocks
        others = self.group - 1
        holders = list(shard.ranks)
        part = rows / down  # of a worker's distinct rows, those in one block
        ask = part * ID
        give = part * wide / across
        sent[0] += across * down * ask
        received[1] += across * down * give
        sent[2] += across * down * give
        sent[0, holders] -= ask
        received[1, holders] -= give
        sent[2, holders] -= give
        received[0, holders] += others * ask
        sent[1, holders] += others * give
        received[2, holders] += others * give
        held[holders] = self.work.kept(table) / len(holders)
        looked = min(self.group * part, table.rows / down) if self.work.update != "dense" else table.rows / down
        found[holders] = self.group * part
        sorts += ASKING * ids
        sorts[holders] += 2 * self.group * part
        moved[holders] = (self.group * part * (TOUCHES / 2) + looked * (TOUCHES / 2)) * wide / across
        if self.replicas > 1:  # the same block lives in every group: its touched rows are summed across
            entry = looked * (ID + wide / across)
            sent[3, holders] += (self.replicas - 1) * entry
            received[3, holders] += (self.replicas - 1) * entry
        return Share(held, found, moved, sorts, sent, received)

    def dense(self, cuts: Mapping[str, Cut] | None = None) -> Share:
        """What the dense layers add: weights, and their gradients summed over all workers but for those that are cut."""
        cut = self.wide(cuts)
        inside = sum(layer.bytes for layer in cut)
        whole = self.work.dense_bytes - inside
        g, rows = self.group, self.rows
        summed = 2 * (self.world - 1) / self.world * whole
        summed += 2 * (self.replicas - 1) / self.replicas * inside / g
        # By outputs: inputs of all rows are gathered, outputs dealt home. By inputs: those are dealt, sums of outputs added up.
        gathered = 0.0
        for layer in cut:
            everywhere, dealt = layer.inputs, layer.outputs
            if (cuts or {})[layer.path] == "row":
                everywhere, dealt = dealt, everywhere
            gathered += rows * NUMBER * (g - 1) * (everywhere + dealt / g)
        sent = np.zeros((4, g))
        sent[3] = summed
        sent[1] = sent[2] = gathered
        held = np.full(g, HELD * (whole + inside / g))
        none = np.zeros(g)
        return Share(held, none, none, none, sent, sent.copy())

    def memory(self, total: Share) -> Floats:
        """Bytes each worker holds at the most while it does ``total``: weights, activations, and the largest exchange."""
        buffers: Floats = np.maximum(total.sent.max(0), total.received.max(0))
        return total.held + KEPT * self.work.activations * self.rows + buffers

    def wide(self, cuts: Mapping[str, Cut] | None) -> list[Layer]:
        """The layers that are cut."""
        return [layer for layer in self.work.layers if layer.path in (cuts or {})]

    # -- seconds -------------------------------------------------------------------------------------------------------------

    def busy(self, total: Share) -> Floats:
        """Seconds each worker looks up, with a core to itself."""
        rates = self.topology.rates
        assert rates is not None
        found: Floats = total.found / rates.rows + total.moved / rates.bytes + total.sorted / rates.ids
        return found

    def step(self, total: Share, apart: int, cut: Sequence[Layer] = ()) -> Step:
        """Seconds of a step in which the workers do ``total``, with so many tables cut."""
        rates, crowd, work = self.topology.rates, self.topology.crowding, self.work
        assert rates is not None
        handled = HANDLED * (len(work.tables) + 2 * work.norms) * rates.call_us / 1e6 if self.world > 1 else 0.0
        lookup = (float(self.busy(total).max()) + handled) * crowd
        times = dict.fromkeys(EXCHANGES, 0.0)
        for k, name in enumerate(EXCHANGES[:3]):
            if self.group > 1 and (apart or (cut and k)):
                rounds = ROUNDS[name] * bool(apart) + len(cut) * bool(k)
                times[name] = self._seconds(_most(total, k), self.group, rounds, False)
        if self.world > 1:
            whole = len(work.tables) - apart
            buckets = math.ceil((work.dense_bytes - sum(la.bytes for la in cut)) / BUCKET)
            rounds = SPREAD * (bool(whole) + (bool(apart) and self.replicas > 1)) + work.norms
            steps = buckets + work.norms + 1  # and what workers tell each other of a step
            times["sums"] = self._seconds(_most(total, 3), self.world, rounds, False) + self._seconds(
                0, self.world, steps, True
            )
        return Step(lookup, self._dense(cut), *times.values())

    def _dense(self, cut: Sequence[Layer]) -> float:
        """Seconds of the dense layers: as they were timed on one worker, else by their operations and what they leave."""
        rates, work = self.topology.rates, self.work
        assert rates is not None
        crowd = self.topology.crowding
        spared = HELD * sum(layer.bytes for layer in cut) * (1 - 1 / self.group)
        if work.timed is not None:
            return (max(0.0, work.timed.fixed - spared / rates.bytes) + work.timed.row * self.rows) * crowd
        flops = (1 + BACKWARD) * work.flops * self.rows
        calls = work.calls * (1 + BACKWARD) + 2 * len(cut)
        weights = HELD * work.dense_bytes - spared
        activations = 2 * KEPT * work.activations * self.rows
        return (flops / rates.flops + calls * rates.call_us / 1e6 + (weights + activations) / rates.bytes) * crowd

    def _seconds(self, bytes: float, over: int, rounds: float, summing: bool) -> float:
        """Seconds of so many exchanges between ``over`` workers in which the busiest moves ``bytes`` in all."""
        top = self.topology
        assert top.inside is not None
        here = min(over, top.workers)
        away = (over - here) / max(1, over - 1)
        inside = top.inside.seconds(bytes * (1 - away), rounds * _steps(here, summing)) * top.crowding
        if not away:
            return inside
        assert top.between is not None
        return max(inside, top.between.seconds(bytes * away, rounds * _steps(over, summing)))

    # -- all of it -----------------------------------------------------------------------------------------------------------

    def predict(self, placement: Placement, total: Share | None = None) -> Predicted:
        """What a placement costs; ``total`` where it is already known."""
        if placement.world_size != self.world or placement.replicas != self.replicas:
            raise ConfigError(
                f"a placement of {placement.world_size} workers in {placement.replicas} replicas, a topology of {self.world} "
                f"workers in {self.replicas}; plan it again for this one"
            )
        known = {t.path for t in self.work.tables}
        if unknown := [p for p in placement.shards if p not in known]:
            raise ConfigError(f"the placement names {', '.join(unknown)}, which {self.work.name} does not have; plan it again")
        dense = self.dense(placement.dense)
        cut = self.wide(placement.dense)
        if total is None:
            total = dense
            for table in self.work.tables:
                total = total + self.table(table, placement.shards.get(table.path))
        step = self.step(total, len(placement.shards), cut)
        busy = self.busy(total)
        activations = int(KEPT * self.work.activations * self.rows)
        ranks = tuple(
            Rank(
                rank=k,
                tables=int(total.held[k] - dense.held[k]),
                dense=int(dense.held[k]),
                activations=activations,
                buffers=int(max(total.sent[:, k].max(), total.received[:, k].max())),
                sent=int(total.sent[:, k].sum()),
                received=int(total.received[:, k].sum()),
                lookup_ms=float(busy[k]) * self.topology.crowding * 1e3,
            )
            for k in range(self.group)
        )
        held = float(sum(r.memory for r in ranks))
        return Predicted(placement, step, ranks, self.limit, self.price(step.seconds, held))

    def price(self, seconds: float, held: float) -> float:
        """Money for a million examples: hosts for as long as they take, and the bytes a group holds meanwhile."""
        hours = seconds * 1e6 / self.work.batch / 3600
        price = self.topology.price
        return hours * (self.topology.hosts * price.host_hour + held * self.replicas / 1e9 * price.gb_hour)


def _most(total: Share, k: int) -> float:
    """Bytes the busiest worker sends or receives in an exchange."""
    return float(max(total.sent[k].max(), total.received[k].max()))


def _steps(over: int, summing: bool) -> float:
    """How many times the link's latency an exchange between so many workers takes.

    Messages to all others are posted at once: the first takes the latency, each further one ``MESSAGE`` of it. A sum is a ring
    of 2 (n - 1) steps or recursive halving and doubling of 2 log2 n (Thakur, Rabenseifner and Gropp 2005), whichever is less.
    """
    if summing:
        return min(2 * (over - 1), 2 * math.ceil(math.log2(max(2, over))))
    return 1 + MESSAGE * max(0, over - 2)
