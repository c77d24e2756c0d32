"""Which rows of a batch this process computes: all of them, or its part where workers train one model together.

A training is the same at any number of workers: every worker reads its rows of each batch, and all that a batch has in common
(its random numbers, its mean loss, the number of its pairs) is that of the whole batch. So what would depend on how many there
are asks here: dropout draws for all rows and keeps its own, a loss is a worker's share of the mean. A process alone, which most
are, has no part, and every question costs a comparison.

Known data parallel trainings give each worker a batch, a seed and a mean of its own, and average; with batch norm, dropout or
random negatives that is another training for each number of workers, which nobody can check against one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the rows that all workers have together, as runs in order."""

    spans: tuple[tuple[int, int], ...]
    total: int
    """Rows of all workers."""

    @property
    def rows(self) -> int:
        """How many are here."""
        return sum(stop - start for start, stop in self.spans)

    def of(self, whole: Tensor) -> Tensor:
        """The rows here of a tensor of all rows [total, ...]."""
        parts = [whole[start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def cut(self, start: int, stop: int) -> Part:
        """Of the rows here those from ``start`` to ``stop``."""
        spans, at = [], 0
        for first, last in self.spans:
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                spans.append((first + low, first + high))
            at += last - first
        return Part(tuple(spans) or ((0, 0),), self.total)

    def twice(self) -> Part:
        """The part of all rows followed by as many more, of which the same are here."""
        return Part((*self.spans, *((a + self.total, b + self.total) for a, b in self.spans)), 2 * self.total)


class Team(Protocol):
    """The workers of a training, as seen from one of them."""

    rank: int
    size: int

    def share(self, n: int) -> tuple[int, int]:
        """Which of ``n`` things are this worker's: the first and the one after the last."""

    def counted(self, n: int) -> Part:
        """The part that ``n`` rows here are of the rows of all workers, in the order of ranks."""

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all workers in the order of ranks; no gradient flows through."""


_team: Team | None = None
_part: Part | None = None


def share(n: int) -> tuple[int, int]:
    """Which of ``n`` things are this worker's: the first and the one after the last."""
    return (0, n) if _team is None else _team.share(n)


def part() -> Part | None:
    """The rows that are computed now; None where they are all."""
    return _part


def counted(n: int) -> Part:
    """The part that ``n`` rows here are of all workers'; of a process alone, or of what all compute alike, all."""
    return Part(((0, n),), n) if _team is None or _part is None else _team.counted(n)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all workers, in order."""
    return rows if _team is None else _team.gathered(rows)


def mean(loss: Tensor, rows: int) -> Tensor:
    """This worker's share of a mean over all rows, from the mean over its ``rows``: the shares of all add up to it."""
    if _part is None:
        return loss
    return loss * (rows / _part.total) if rows else loss.nan_to_num() * 0.0


def drawn(n: int, draw: Callable[[int], Tensor]) -> Tensor:
    """``n`` random things, a row each, drawn with those of all workers."""
    if _part is None:
        return draw(n)
    mine = counted(n)
    return mine.of(draw(mine.total))


@contextlib.contextmanager
def computing(rows: Part | None) -> Iterator[None]:
    """Inside, these rows are what is computed; with None the same on all workers."""
    global _part
    before, _part = _part, rows if _team is not None else None
    try:
        yield
    finally:
        _part = before


@contextlib.contextmanager
def working(team: Team | None) -> Iterator[None]:
    """Inside, this process is one of a team; alone with None."""
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before
