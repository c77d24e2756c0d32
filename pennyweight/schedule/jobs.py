"""Long work on unequal workers: trials of a search, trainings, compressions. What counts is when the last one ends.

Whenever something happens, what is left is planned anew: jobs by priority, then the longest first, each where it would
finish earliest (LPT with earliest finish time, within a few percent of the best on workers of different speeds). Only the
start of the plan is carried out, so durations that were wrong, workers that slow down and workers that vanish change the
next plan and nothing else. A queue that hands the next job to whoever is free, the usual pool, gives the last long job to the
slowest worker; a plan made once is wrong by as much as its durations are.

When nothing waits any more, an idle worker starts a second copy of a job it would finish clearly sooner (backup tasks, as in
MapReduce): the first to finish counts.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from pennyweight.core.errors import ConfigError

SOONER = 0.8
"""A second copy is started if it is predicted to need at most this share of what the first still needs."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to be done once."""

    name: str
    work_s: float
    """Seconds it is predicted to take on a worker of speed 1."""
    priority: int = 0
    """Higher goes first."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A job to be started on a worker now."""

    worker: str
    job: Job
    backup: bool = False


class _Worker:
    """A worker's speed and what it runs."""

    __slots__ = ("job", "name", "since", "speed")

    def __init__(self, name: str, speed: float) -> None:
        self.name, self.speed = name, speed
        self.job: Job | None = None
        self.since = 0.0

    def left(self, now: float) -> float:
        """Seconds until it is free; one overdue is expected to need a tenth of its time again, or as long as it is overdue."""
        if self.job is None:
            return 0.0
        whole = self.job.work_s / self.speed
        rest = self.since + whole - now
        return rest if rest > 0 else max(0.1 * whole, -rest)


class Jobs:
    """Jobs over workers; times are seconds, handed in."""

    def __init__(self, *, backups: bool = True) -> None:
        self.backups = backups
        self.waiting: dict[str, Job] = {}
        self.finished: set[str] = set()
        self._workers: dict[str, _Worker] = {}

    def add(self, job: Job) -> None:
        """One more job.

        Raises:
            ConfigError: there is one of that name, or its work is not above 0.
        """
        known = {*self.waiting, *self.finished, *(w.job.name for w in self._workers.values() if w.job)}
        if job.name in known or not job.work_s > 0:
            raise ConfigError(f"job {job.name!r} of {job.work_s:g} s: give a new name and a time above 0")
        self.waiting[job.name] = job

    def join(self, worker: str, speed: float = 1.0) -> None:
        """A worker is there; its speed is what it does of a job's work in a second, at first."""
        if worker in self._workers or not speed > 0:
            raise ConfigError(f"worker {worker!r} of speed {speed:g}: give a new name and a speed above 0")
        self._workers[worker] = _Worker(worker, speed)

    def died(self, worker: str) -> None:
        """A worker is gone; what it ran waits again, unless a copy runs elsewhere."""
        job = self._workers.pop(worker).job
        if job is not None and job.name not in self.finished and not self._copies(job):
            self.waiting[job.name] = job

    def done(self, worker: str, now: float) -> list[str]:
        """A worker has finished its job: other workers whose copy of it may stop, and are free."""
        held = self._workers[worker]
        job = held.job
        assert job is not None, f"worker {worker} runs nothing"
        held.job = None
        took = now - held.since
        if took > 0:  # the speed it showed, half believed: a job's prediction may be what was wrong
            held.speed *= min(4.0, max(0.25, job.work_s / held.speed / took)) ** 0.25
        self.finished.add(job.name)
        losers = self._copies(job)
        for loser in losers:
            loser.job = None
        return [loser.name for loser in losers]

    def start(self, now: float) -> list[Start]:
        """What to start now."""
        started = self._planned(now)
        if self.backups and not self.waiting:
            started += self._backed(now)
        return started

    @property
    def over(self) -> bool:
        """Whether all is done."""
        return not self.waiting and all(worker.job is None for worker in self._workers.values())

    def _copies(self, job: Job) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.job is job]

    def _planned(self, now: float) -> list[Start]:
        free = {worker.name: worker.left(now) for worker in self._workers.values()}
        idle = {worker.name for worker in self._workers.values() if worker.job is None}
        started: list[Start] = []
        for job in sorted(self.waiting.values(), key=lambda j: (-j.priority, -j.work_s, j.name)):
            if not idle:
                break
            best = min(self._workers.values(), key=lambda w: (free[w.name] + job.work_s / w.speed, -w.speed, w.name))
            free[best.name] += job.work_s / best.speed
            if best.name in idle:
                idle.remove(best.name)
                started.append(self._go(best, job, now))
        return started

    def _backed(self, now: float) -> list[Start]:
        started: list[Start] = []
        idle = sorted((w for w in self._workers.values() if w.job is None), key=lambda w: -w.speed)
        for worker in idle:
            running = [w for w in self._workers.values() if w.job is not None and len(self._copies(w.job)) == 1]
            late = max(running, key=lambda w: w.left(now), default=None)
            if late is None or late.job is None or late.job.work_s / worker.speed > SOONER * late.left(now):
                break
            started.append(self._go(worker, late.job, now, backup=True))
        return started

    def _go(self, worker: _Worker, job: Job, now: float, *, backup: bool = False) -> Start:
        self.waiting.pop(job.name, None)
        worker.job, worker.since = job, now
        return Start(worker.name, job, backup)


def lower_bound(works: Sequence[float], speeds: Sequence[float]) -> float:
    """Seconds below which no schedule ends: the k longest jobs run on k workers at most, for every k up to all of them."""
    longest, fastest = sorted(works, reverse=True), sorted(speeds, reverse=True)
    bound = sum(longest) / sum(fastest)
    for k in range(1, min(len(longest), len(fastest))):
        bound = max(bound, sum(longest[:k]) / sum(fastest[:k]))
    return bound


def makespan(
    works: Sequence[float], predicted: Sequence[float], speeds: Sequence[float], *, backups: bool = True,
    deaths: Sequence[tuple[float, int]] = (), priorities: Sequence[int] = (),
) -> float:  # fmt: skip
    """Seconds until all jobs are done, replayed: true and predicted work of each, true speed of each worker.

    Infinite if no worker is left to do them.

    Args:
        works: seconds each job truly takes at speed 1.
        predicted: what is predicted.
        speeds: of the workers, as they truly are and as they are announced.
        backups: whether second copies are allowed.
        deaths: when which worker vanishes for good.
        priorities: of the jobs, 0 by default.
    """
    jobs = Jobs(backups=backups)
    true = {}
    for k, (work, guess) in enumerate(zip(works, predicted, strict=True)):
        jobs.add(Job(str(k), guess, priorities[k] if priorities else 0))
        true[str(k)] = work
    for w, speed in enumerate(speeds):
        jobs.join(str(w), speed)
    events: list[tuple[float, int, int, Job | None]] = [(at, -1, worker, None) for at, worker in deaths]
    heapq.heapify(events)
    now, count, running = 0.0, 0, dict[str, int]()
    while True:
        for begun in jobs.start(now):
            count += 1
            running[begun.worker] = count
            heapq.heappush(
                events, (now + true[begun.job.name] / speeds[int(begun.worker)], count, int(begun.worker), begun.job)
            )
        if jobs.over or not events:
            return now if jobs.over else math.inf
        at, number, place, job = heapq.heappop(events)
        if job is None:
            jobs.died(str(place))
            running.pop(str(place), None)
            now = at
        elif running.get(str(place)) == number:
            now = at
            running.pop(str(place))
            for loser in jobs.done(str(place), now):
                running.pop(loser, None)
