"""Which of several machines gets a request, each with a scheduler of its own.

What a balancer knows of a machine is a *probe*, a little old: the seconds of predicted work inside, and the seconds a request
would take there. ``HotCold`` is Prequal's rule (NSDI 2024): machines with more inside than most are hot; of those that are cold
the quickest is taken; the one with the least inside is never hot. Prequal counts requests in flight and looks up the
median latency at that count; our machines predict both in seconds, so one of a thousand items counts as what it is, and a
machine at a third of the speed shows it. Between probes a machine's numbers grow by what was sent there.

``RoundRobin`` and ``PowerOfTwo`` (of two drawn at random, the one with fewer inside) are kept as what to compare with:
with two of eight machines slow, the former diverges and the latter has three times the p99 of knowing everything
(``Oracle``). Utilization counters of a GPU say in which share of the last second any kernel ran, so they are no signal.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Protocol

FRESH_S = 1.0
"""Seconds after which a probe is no longer believed."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a machine says of itself."""

    node: str
    inside_s: float
    """Seconds until it has done what it has now."""
    answer_s: float
    """Seconds until it would answer one more request of a usual size."""
    at: float
    """When it said so, on the balancer's clock."""


class Rule(Protocol):
    """How a machine is chosen."""

    def wanted(self) -> Sequence[str]:
        """Machines to be probed now, as a request comes; the answers may come whenever they do."""

    def heard(self, probe: Probe) -> None:
        """A probe's answer."""

    def pick(self, work_s: float, now: float) -> str:
        """The machine for a request that is predicted to take ``work_s`` seconds."""

    def answered(self, node: str) -> None:
        """A machine has answered a request."""


class HotCold:
    """Prequal's rule over predicted seconds.

    Args:
        nodes: names of the machines.
        seed: of the probes' choice.
        probes: machines probed a request.
        hot: quantile of work inside above which a machine is hot.
    """

    def __init__(self, nodes: Sequence[str], seed: int = 0, *, probes: int = 3, hot: float = 0.84) -> None:
        self.nodes = list(nodes)
        self.probes = min(probes, len(self.nodes))
        self.hot = hot
        self._random = random.Random(seed)
        self._pool: dict[str, Probe] = {}
        self._usual: float | None = None

    def wanted(self) -> Sequence[str]:
        """A few drawn at random."""
        return self._random.sample(self.nodes, self.probes)

    def heard(self, probe: Probe) -> None:
        """Keep the newest of each machine."""
        known = self._pool.get(probe.node)
        if known is None or probe.at >= known.at:
            self._pool[probe.node] = probe

    def pick(self, work_s: float, now: float) -> str:
        """The quickest of the cold ones; any that nobody has heard of lately, if there is no other."""
        pool = [probe for probe in self._pool.values() if now - probe.at <= FRESH_S]
        if not pool:
            return self._random.choice(self.nodes)
        inside = sorted(probe.inside_s for probe in pool)
        limit = inside[min(len(inside) - 1, int(self.hot * len(inside)))]
        cold = [probe for probe in pool if probe.inside_s <= limit]
        self._usual = work_s if self._usual is None else self._usual + 0.02 * (work_s - self._usual)
        times = work_s / self._usual if self._usual else 1.0  # so many usual requests, each at the machine's own speed
        best = min(cold, key=lambda p: p.inside_s + times * (p.answer_s - p.inside_s))
        more = times * (best.answer_s - best.inside_s)
        # until the next probe: it has one more
        self._pool[best.node] = dataclasses.replace(best, inside_s=best.inside_s + more, answer_s=best.answer_s + more)
        return best.node

    def answered(self, node: str) -> None:
        """Nothing: probes tell."""


class PowerOfTwo:
    """Of two machines drawn at random, the one with fewer of this balancer's requests inside (Mitzenmacher 2001)."""

    def __init__(self, nodes: Sequence[str], seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._inside = dict.fromkeys(nodes, 0)
        self._names = list(nodes)

    def wanted(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def heard(self, probe: Probe) -> None:
        """Nothing is asked."""

    def pick(self, work_s: float, now: float) -> str:
        """The one with fewer inside."""
        pair = self._random.sample(self._names, min(2, len(self._names)))
        best = min(pair, key=self._inside.__getitem__)
        self._inside[best] += 1
        return best

    def answered(self, node: str) -> None:
        """One fewer inside."""
        self._inside[node] -= 1


class RoundRobin:
    """One after the other."""

    def __init__(self, nodes: Sequence[str], seed: int = 0) -> None:
        self._names = list(nodes)
        self._turn = -1

    def wanted(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def heard(self, probe: Probe) -> None:
        """Nothing is asked."""

    def pick(self, work_s: float, now: float) -> str:
        """The next one."""
        self._turn = (self._turn + 1) % len(self._names)
        return self._names[self._turn]

    def answered(self, node: str) -> None:
        """It makes no difference."""


class Oracle:
    """The machine that would answer first, from what all of them know this instant: a bound, as nobody can be told at once."""

    def __init__(self, nodes: Sequence[str], ask: Callable[[str, float], float]) -> None:
        self._names, self._ask = list(nodes), ask

    def wanted(self) -> Sequence[str]:
        """Nobody: it knows."""
        return ()

    def heard(self, probe: Probe) -> None:
        """Nothing is asked."""

    def pick(self, work_s: float, now: float) -> str:
        """The one with the earliest finish."""
        return min(self._names, key=lambda node: self._ask(node, work_s))

    def answered(self, node: str) -> None:
        """It knows."""
