"""The best placement of tables over one group of workers.

Where the choices of all tables multiply to at most ``SMALL``, every placement is costed. Else tables are placed one by one, the
heaviest first, each where the step stays shortest, and then moved one at a time while that helps, owners also two at a time;
the same from all tables whole and from all cut by row, since what a first exchange costs no single table pays back.
A table adds to each worker what it adds whatever others do (``cost.Share``), so a move is costed by one subtraction and one
addition of arrays as long as the group; and of workers alike only the least busy are tried, so a table has few choices, some
log2(W) ** 2, however many workers there are. Time grows as tables x log2(workers) ** 2 x workers, times a few passes.

An integer program over tables and workers (SciPy brings HiGHS) was the alternative. Workers that are alike make it try the same
placement under every renaming, and its variables grow as tables x workers; on models that can be enumerated the search here
already finds the best or comes within a few percent (``tests/distribute/test_search.py`` holds it to that).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pennyweight.core.hardware import Topology
from pennyweight.distribute.cost import ALIKE, Predicted, Setting, Share
from pennyweight.distribute.workload import Asked
from pennyweight.model.placement import Cut, Placement, Shard

SMALL = 20_000
"""Placements up to which all are costed."""
PASSES = 8
"""Rounds of improvement at most; most searches end after two."""
NARROW = 4
"""Numbers a row's block has at least: narrower ones cost a row's lookup each and carry nothing."""
MANY = 64
"""Workers of a group above which cuts are tried over every other power of two of them only."""
WIDE = 1 << 20
"""Weights from which a dense layer may be cut."""

Made = dict[str, Shard | None]
"""Table path -> how it is cut; None is whole on every worker."""
Score = tuple[float, float, float]
"""Bytes too much, seconds, bytes held in all: the smaller the better, in this order."""


def divisors(topology: Topology) -> list[int]:
    """Numbers of groups worth trying: one; 2, 4, 8 ... of whole hosts (2D); every worker its own (data parallel)."""
    apart = [n for n in _powers(topology.hosts) if topology.hosts % n == 0]
    return sorted({1, *apart, topology.hosts, topology.world})


def cheapest(found: Sequence[Predicted]) -> Predicted:
    """Of the placements as fast as the fastest, to what a prediction can tell, the one that costs least."""
    fastest = min(p.step.seconds for p in found)
    near = [p for p in found if p.step.seconds <= fastest * (1 + ALIKE)]
    return min(near, key=lambda p: (p.money, p.step.seconds, p.memory))


class Search:
    """The best placement for one number of groups. ``tried`` counts what was costed; ``every`` says whether that was all.

    Args:
        setting: the workload on the topology, for one size of group.
        small: placements up to which all are costed.
    """

    def __init__(self, setting: Setting, small: int = SMALL) -> None:
        self.setting = setting
        self.tried = 0
        self._tables = {t.path: t for t in setting.work.tables}
        self._lists = [every_choice(t, setting.group, setting.work.narrow) for t in setting.work.tables]
        self.every = math.prod(map(len, self._lists)) <= small
        self._known: dict[tuple[str, Shard | None], Share] = {}

    def best(self) -> Predicted:
        """What fits and takes the least time; where nothing fits, what comes nearest."""
        if self.every:
            return self._with_cuts(self._all())
        starts = [self._greedy(), *([self._alike(whole=False)] if self.setting.group > 1 else [])]
        starts += [self._alike(whole=True)] if self.setting.group <= MANY else []  # many workers, much to send to all
        made = min((self._improved(start) for start in starts), key=self._value)
        return self._with_cuts(self._thrifty(made))

    # -- every placement -----------------------------------------------------------------------------------------------------

    def _all(self) -> Made:
        scored = [(self._value(made), made) for made in self.placements()]
        return min(self._near([score for score, _ in scored], [made for _, made in scored]), key=lambda pair: pair[0])[1]

    def placements(self) -> Iterator[Made]:
        """Every combination of the tables' choices; of those that are the same after renaming workers, one."""
        for combination in itertools.product(*self._lists):
            owners = [s.ranks[0] for s in combination if s is not None and s.kind == "table"]
            if all(owner <= max((-1, *owners[:k])) + 1 for k, owner in enumerate(owners)):
                yield dict(zip(self._tables, combination, strict=True))

    def _near(self, scores: Sequence[Score], made: Sequence[Made]) -> list[tuple[tuple[float, float], Made]]:
        """Of those as fast as the fastest, to what a prediction can tell, their money and time."""
        over, fastest, _ = min(scores)
        limit = fastest * (1 + ALIKE)
        return [((self._money(s), s[1]), m) for s, m in zip(scores, made, strict=True) if s[0] <= over and s[1] <= limit]

    # -- one table at a time -------------------------------------------------------------------------------------------------

    def _greedy(self) -> Made:
        made: Made = {}
        total = self.setting.dense()
        for path in self._order():
            table, sharded = self._tables[path], _apart(made)
            scored = [
                (self._score(total + self._share(table, s), sharded or s is not None), s) for s in self._choices(table, total)
            ]
            made[path] = min(scored, key=lambda pair: pair[0])[1]
            total = total + self._share(table, made[path])
        return made

    def _alike(self, whole: bool) -> Made:
        """Every table whole, or cut by row over all workers where it has as many."""
        everyone = tuple(range(self.setting.group))
        cut = {p: t.cuttable and t.rows >= len(everyone) and not whole for p, t in self._tables.items()}
        owner: Shard | None = None if whole else Shard("table", (0,))
        return {path: Shard("row", everyone) if cut[path] else owner for path in self._tables}

    def _improved(self, made: Made) -> Made:
        total = self._total(made)
        now = self._score(total, _apart(made))
        for _ in range(PASSES if self.setting.group <= MANY else 2):
            before = now
            for path in self._order():
                score, shard, moved = self._moved(made, path, total)
                if score < now:
                    made[path], now, total = shard, score, moved
            made, total, now = self._swapped(made, total, now)
            if now == before:
                break
        return made

    def _moved(self, made: Made, path: str, total: Share) -> tuple[Score, Shard | None, Share]:
        """The best choice for one table while the others stay."""
        table = self._tables[path]
        rest = total - self._share(table, made[path])
        others = _apart(made) - (made[path] is not None)
        scored = [(self._score(rest + self._share(table, s), others + (s is not None)), s) for s in self._choices(table, rest)]
        score, shard = min(scored, key=lambda pair: pair[0])
        return score, shard, rest + self._share(table, shard)

    def _swapped(self, made: Made, total: Share, now: Score) -> tuple[Made, Share, Score]:
        """Owners exchanged between the busiest worker and others, where that helps and moving one alone does not."""
        owned = {p: s for p, s in made.items() if s is not None and s.kind == "table"}
        busiest = int(np.argmax(self.setting.busy(total)))
        for mine in [p for p, s in owned.items() if s.ranks == (busiest,)]:
            for theirs in [p for p, s in owned.items() if s.ranks != (busiest,)]:
                a, b = self._tables[mine], self._tables[theirs]
                moved = total - self._share(a, made[mine]) - self._share(b, made[theirs])
                moved = moved + self._share(a, made[theirs]) + self._share(b, made[mine])
                if (value := self._score(moved, _apart(made))) < now:
                    return {**made, mine: made[theirs], theirs: made[mine]}, moved, value
        return made, total, now

    def _thrifty(self, made: Made) -> Made:
        """Where memory has a price: choices that save money and take no more time than a prediction can tell."""
        total = self._total(made)
        now = self._score(total, _apart(made))
        limit = now[1] * (1 + ALIKE)
        for path in self._order() if self.setting.topology.price.gb_hour else ():
            table = self._tables[path]
            rest = total - self._share(table, made[path])
            others = _apart(made) - (made[path] is not None)
            for shard in self._choices(table, rest):
                score = self._score(rest + self._share(table, shard), others + (shard is not None))
                if score[0] <= now[0] and score[1] <= limit and self._money(score) < self._money(now):
                    made[path], now, total = shard, score, rest + self._share(table, shard)
        return made

    # -- dense layers --------------------------------------------------------------------------------------------------------

    def _with_cuts(self, made: Mapping[str, Shard | None]) -> Predicted:
        """The prediction, with those wide dense layers cut that shorten the step or make it fit, the widest first."""
        shards = {path: shard for path, shard in sorted(made.items()) if shard is not None}
        best, group = self._predict(shards, {}), self.setting.group
        wide = [
            la for la in self.setting.work.layers if la.inputs * la.outputs >= WIDE and la.outputs + la.inputs >= 2 * group > 2
        ]
        for layer in sorted(wide, key=lambda la: (-la.bytes, la.path)):
            cut: Cut = "column" if layer.outputs >= layer.inputs else "row"
            tried = self._predict(shards, {**best.placement.dense, layer.path: cut})
            if _order(tried) < _order(best):
                best = tried
        return best

    def _predict(self, shards: Mapping[str, Shard], dense: Mapping[str, Cut]) -> Predicted:
        self.tried += 1
        setting = self.setting
        return setting.predict(Placement(setting.world, shards=shards, dense=dense, replicas=setting.replicas))

    # -- costs ---------------------------------------------------------------------------------------------------------------

    def _order(self) -> list[str]:
        """Tables by how much they matter: bytes to hold over a worker's room, and bytes to move over all tables'."""
        work, limit = self.setting.work, max(1, self.setting.limit)
        moved = {t.path: t.lookups * t.dim for t in work.tables}
        every = max(1e-9, sum(moved.values()))
        return sorted(self._tables, key=lambda p: (-work.kept(self._tables[p]) / limit - moved[p] / every, p))

    def _choices(self, table: Asked, total: Share) -> list[Shard | None]:
        return choices(table, self.setting, total)

    def _share(self, table: Asked, shard: Shard | None) -> Share:
        key = (table.path, shard)
        if key in self._known:
            return self._known[key]
        made = self.setting.table(table, shard)
        if self.setting.group <= MANY:  # else they would take gigabytes
            self._known[key] = made
        return made

    def _total(self, made: Mapping[str, Shard | None]) -> Share:
        total = self.setting.dense()
        for path, shard in made.items():
            total = total + self._share(self._tables[path], shard)
        return total

    def _value(self, made: Made) -> Score:
        return self._score(self._total(made), _apart(made))

    def _score(self, total: Share, apart: int) -> Score:
        self.tried += 1
        over = max(0.0, float(self.setting.memory(total).max()) - self.setting.limit)
        return over, self.setting.step(total, apart).seconds, float(total.held.sum())

    def _money(self, score: Score) -> float:
        return self.setting.price(score[1], score[2])


def _apart(made: Mapping[str, Shard | None]) -> int:
    """How many tables are cut."""
    return sum(shard is not None for shard in made.values())


def _order(predicted: Predicted) -> tuple[float, float]:
    return max(0, predicted.memory - predicted.limit), predicted.step.seconds


def choices(table: Asked, setting: Setting, total: Share) -> list[Shard | None]:
    """Ways to place a table beside others that do ``total``: of workers alike, the least busy and the emptiest are named."""
    group = setting.group
    if group == 1:
        return [None]
    busy = setting.busy(total)
    orders = np.lexsort((total.held, busy)), np.lexsort((busy, total.held))
    found: list[Shard | None] = [None]
    for order in orders:
        found.append(Shard("table", (int(order[0]),)))
        for parts in _sizes(group) if table.cuttable else ():
            found += _blocks(table, tuple(sorted(int(k) for k in order[:parts])), setting.work.narrow)
    return list(dict.fromkeys(found))


def every_choice(table: Asked, group: int, narrow: bool = True) -> list[Shard | None]:
    """Every owner by name, and the cuts over all workers."""
    if group == 1:
        return [None]
    owners: list[Shard | None] = [Shard("table", (rank,)) for rank in range(group)]
    return [None, *owners, *(_blocks(table, tuple(range(group)), narrow) if table.cuttable else ())]


def _blocks(table: Asked, ranks: tuple[int, ...], narrow: bool) -> list[Shard]:
    """The cuts of a table over these workers that leave nobody without a row or with too narrow ones.

    ``narrow`` is False where rows must stay whole: row-wise Adagrad has one number for a row.
    """
    parts = len(ranks)
    found = [Shard("row", ranks)] if table.rows >= parts else []
    if not narrow:
        return found
    found += [Shard("column", ranks)] if table.dim >= NARROW * parts else []
    fair = [c for c in _sizes(parts // 2) if parts % c == 0 and table.dim >= NARROW * c and table.rows >= parts // c]
    return [*found, *(Shard("grid", ranks, c) for c in fair)]


def _powers(most: int) -> list[int]:
    """2, 4, 8 ... up to ``most``, and ``most`` itself."""
    found = [2**k for k in range(1, most.bit_length()) if 2**k <= most]
    return found if most in found or most < 2 else [*found, most]


def _sizes(most: int) -> list[int]:
    """The powers, or of many every other one."""
    found = _powers(most)
    return found if most <= MANY else [*found[:-1:2], found[-1]]
