"""Which model answers: the best one that load permits.

The bundle's variants go from the best to the cheapest. A variant is permitted while the work that waits, done by it, would
take no more than a share of the time that requests have (*pressure*). That test needs no arrival rate, hence no window
to average over: a burst shows in the queue as soon as it is there. Stepping down is immediate. Stepping up is patient: the
better variant must have been permitted, with room to spare, for a while. Between two variants, one too dear and one cheaper
than load asks for, this alternates, and that mixture is what the fluid optimum would do as well.

An arrival-rate test was tried first: with a window of 200 ms and a target utilization of .6 it serves a steady load of twice
the best model's capacity by the cheapest model of three, since the middle one would be used to .65.
"""

from __future__ import annotations

from collections.abc import Sequence


class Ladder:
    """The variant in use, by pressure.

    Args:
        rungs: how many variants there are.
        limit: pressure up to which a variant is permitted.
        room: share of ``limit`` below which a better one may come back.
        patience: seconds that must hold before it does.
    """

    __slots__ = ("_since", "level", "limit", "patience", "room", "rungs")

    def __init__(self, rungs: int, *, limit: float, room: float, patience: float) -> None:
        self.rungs = rungs
        self.limit = limit
        self.room = room
        self.patience = patience
        self.level = 0
        """The variant in use, 0 is the best."""
        self._since: float | None = None

    def step(self, pressures: Sequence[float], now: float) -> int:
        """The variant to use, from the pressure under each (best first): seconds of work over seconds there are."""
        level, last = self.level, self.rungs - 1
        while level < last and pressures[level] > self.limit:
            level += 1
        if level > self.level:
            self.level, self._since = level, None
        elif level and pressures[level - 1] <= self.limit * self.room:
            if self._since is None:
                self._since = now
            if now - self._since >= self.patience:
                self.level, self._since = level - 1, now
        else:
            self._since = None
        return self.level
