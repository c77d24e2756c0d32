"""Requests that wait: by class, the earliest deadline first, no class overtaken for ever.

Each class is a heap by deadline. Between classes the head goes first whose deadline, plus the class's *age*, is earliest:
a class lower by one counts as due that much later, so a more important request overtakes it only if its own deadline is less
than ``age`` behind. Strict priority starves whoever is below a busy class; weights need tuning to a load; this is one number
that reads as a promise. The textbook alternative, one queue with priorities that grow while waiting, is the same order and
has to be sorted anew as time goes by.

Removing from the middle is lazy: what was taken or has left is skipped when it comes to the top. A request may wait in
several *pieces*, ranges of its items that different workers score; it is answered when the last of them is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, Literal

State = Literal["waiting", "running", "done", "gone"]


class Ticket:
    """One request that was accepted; times are seconds on the scheduler's clock."""

    __slots__ = (
        "arrived", "charged", "deadline", "deaths", "degrade", "expires", "items", "level", "pieces", "rank",
        "tenant", "value", "variant",
    )  # fmt: skip

    def __init__(self, value: Any, items: int, rank: int, tenant: str, arrived: float, deadline: float, degrade: bool) -> None:
        self.value = value
        self.items = items
        self.rank = rank
        """Place of its class in the policy; 0 is the most important."""
        self.tenant = tenant
        self.arrived = arrived
        self.deadline = deadline
        self.expires = deadline
        """When it is refused if it still waits: its deadline, or later once a worker died with it."""
        self.degrade = degrade
        self.variant: int | None = None
        """The variant that must score all of it, once a piece was scored."""
        self.level = 0
        """The variant that answered it."""
        self.deaths = 0
        """Workers that died while they had it."""
        self.charged = 0.0
        """Milliseconds its tenant's quota was charged."""
        self.pieces = [Piece(self, 0, items)]
        """What it is scored in; none once it has ended, so that both are freed at once and not by the collector of cycles."""

    @property
    def span(self) -> float:
        """Seconds it was given."""
        return self.deadline - self.arrived

    @property
    def answered(self) -> bool:
        """Whether every piece has been scored."""
        return all(piece.state == "done" for piece in self.pieces)


class Piece:
    """Items ``start`` to ``stop`` of a request."""

    __slots__ = ("floor", "running", "start", "state", "stop", "ticket")

    def __init__(self, ticket: Ticket, start: int, stop: int) -> None:
        self.ticket = ticket
        self.start = start
        self.stop = stop
        self.state: State = "waiting"
        self.running = 0
        """Workers that have it: two while it is hedged."""
        self.floor = 0.0
        """Seconds it takes at least, beyond a forward's own: what it adds to a queue."""

    @property
    def items(self) -> int:
        """How many."""
        return self.stop - self.start


Entry = tuple[float, int, Piece]


class Queue:
    """Waiting pieces, with running sums of what they hold, so that nobody has to look at each of them.

    Args:
        ages: seconds that each class's deadlines count as later, the most important class first.
    """

    def __init__(self, ages: Sequence[float] = (0.0,)) -> None:
        self.ages = tuple(ages)
        self.counts = [0] * len(ages)
        """Pieces waiting, by class."""
        self.loads = [0.0] * len(ages)
        """Their seconds at least (``Piece.floor``), by class."""
        self.items = 0
        """Items waiting, in all."""
        self.size = 0
        """Pieces waiting, in all."""
        self._heaps: list[list[Entry]] = [[] for _ in ages]
        self._number = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Piece]:
        return (entry[2] for heap in self._heaps for entry in heap if entry[2].state == "waiting")

    def push(self, piece: Piece) -> None:
        """Let a piece wait."""
        ticket = piece.ticket
        piece.state = "waiting"
        self._number += 1
        heapq.heappush(self._heaps[ticket.rank], (ticket.deadline, self._number, piece))
        self.counts[ticket.rank] += 1
        self.loads[ticket.rank] += piece.floor
        self.items += piece.stop - piece.start
        self.size += 1

    def head(self) -> Piece | None:
        """Who goes first; it stays."""
        best, first = 0.0, None
        for rank, heap in enumerate(self._heaps):
            while heap and heap[0][2].state != "waiting":
                heapq.heappop(heap)
            if heap and (first is None or heap[0][0] + self.ages[rank] < best):
                best, first = heap[0][0] + self.ages[rank], heap[0][2]
        return first

    def take(self, piece: Piece) -> None:
        """Give a waiting piece to a worker."""
        piece.state = "running"
        self._forget(piece)

    def remove(self, piece: Piece) -> None:
        """Forget a waiting piece; one that is not here any more is no matter."""
        if piece.state == "waiting":
            piece.state = "gone"
            self._forget(piece)

    def late(self, now: float) -> list[Ticket]:
        """Requests that expired while they waited, forgotten with all their pieces."""
        found = []
        for heap in self._heaps:
            kept: list[Entry] = []
            while heap and (heap[0][0] <= now or heap[0][2].state != "waiting"):
                entry = heapq.heappop(heap)
                ticket = entry[2].ticket
                if entry[2].state != "waiting":
                    continue
                if ticket.expires > now:  # a worker died with it: it has longer
                    kept.append(entry)
                    continue
                found.append(ticket)
                for piece in ticket.pieces:
                    self.remove(piece)
            for entry in kept:
                heapq.heappush(heap, entry)
        return found

    def expires(self) -> float | None:
        """When the next waiting request expires; None while none waits."""
        times = []
        for heap in self._heaps:
            while heap and heap[0][2].state != "waiting":
                heapq.heappop(heap)
            if heap:
                times.append(heap[0][2].ticket.expires)
        return min(times) if times else None

    def _forget(self, piece: Piece) -> None:
        rank = piece.ticket.rank
        self.counts[rank] -= 1
        self.size -= 1
        self.items -= piece.stop - piece.start
        # sums of floats drift by what is added and taken away again; an empty class starts from nothing
        self.loads[rank] = self.loads[rank] - piece.floor if self.counts[rank] else 0.0
