"""A trace replayed through the scheduler that is shipped, on workers that are modelled.

Only two things are invented here: how long a forward takes (a true cost curve, times a residual) and how the clock moves
(a heap of events). Who is admitted, batched, split, served by which model is ``Scheduler`` itself, the same object as in the
server, so a setting that is tuned here is the setting that is deployed. Nothing sleeps: an hour of traffic is minutes.

What it does not know: the front process's own time, caches that a neighbour fills, garbage collectors. Quote its figures
where a live run of the same trace agrees.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError, Overloaded
from pennyweight.data.requests import Arrivals
from pennyweight.model.bundle import Policy, Variant
from pennyweight.schedule.balance import HotCold, Oracle, PowerOfTwo, Probe, RoundRobin, Rule
from pennyweight.schedule.queue import Ticket
from pennyweight.schedule.scheduler import PROCESSES, Batch, Knobs, Scheduler

Array = npt.NDArray[np.float64]
Fate = Literal["answered", "late", "full", "quota", "guard", "expired", "poison", "lost"]
FATES: tuple[Fate, ...] = ("answered", "late", "full", "quota", "guard", "expired", "poison", "lost")
"""What became of a request. ``late`` to ``guard`` were refused at arrival, ``expired`` while waiting, ``poison`` after two
deaths; ``lost`` would be a fault of the scheduler's."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that happens to a worker."""

    at: float
    """Seconds from the start."""
    what: Literal["kill", "slow_down", "pause"]
    """It dies; it becomes slower; it takes nothing new, as while it loads another bundle."""
    worker: int = 0
    seconds: float = 1.0
    """Until it is back."""
    factor: float = 3.0
    """How much slower."""


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Workers as they truly are."""

    workers: int = 2
    device: str = "cpu"
    curves: tuple[Curve, ...] = ()
    """What each of the policy's variants truly takes; what the policy says by default."""
    speeds: tuple[float, ...] = ()
    """Each worker's time over the curve's; 1 by default."""
    noise: float | None = None
    """Standard deviation of the logarithm of a forward's time; as the curve's safety factor says by default."""
    residuals: tuple[float, ...] = ()
    """Measured over predicted times to draw from, in place of ``noise``."""
    faults: tuple[Fault, ...] = ()
    overhead_s: float = 0.0
    """Seconds that an answer takes beyond its wait and its forward: the front's part, and the ways. Workers do not wait for it:
    their next batch is there before (``Knobs.ahead``)."""

    def true(self, policy: Policy) -> tuple[Curve, ...]:
        """The curve of each variant.

        Raises:
            ConfigError: neither the fleet nor the policy says what a variant takes.
        """
        if self.curves:
            return self.curves
        missing = [v.name for v in policy.variants if self.device not in v.costs]
        if missing or not policy.variants:
            raise ConfigError(
                f"nothing says what {', '.join(map(repr, missing)) or 'the model'} takes on {self.device!r}; "
                "profile the bundle, or give the fleet curves"
            )
        return tuple(v.costs[self.device] for v in policy.variants)


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """What came of each request of a trace, in its order."""

    trace: Arrivals
    policy: Policy
    workers: int
    fate: npt.NDArray[np.int8]
    """Places in ``FATES``."""
    latency: Array
    """Seconds from when it was due to its answer; infinite without one."""
    deadline: Array
    """Seconds it had."""
    variant: npt.NDArray[np.int8]
    """The policy's variant that answered it; -1 for none."""
    answers: npt.NDArray[np.int8]
    """How often it was answered: 1, or 0 where it was refused."""
    busy_s: float
    """Device-seconds spent."""
    hedged_s: float
    """Device-seconds of work done twice."""
    capacity: float
    """Requests a second that the best variant can do, at this trace's sizes, in full batches."""
    fluid: float
    """Effective quality that no scheduler passes (see ``fluid``)."""

    @property
    def in_time(self) -> npt.NDArray[np.bool_]:
        """Whether each request was answered within its deadline."""
        return self.latency <= self.deadline

    @property
    def on_time(self) -> float:
        """Share of all requests, those refused included."""
        return float(self.in_time.mean())

    @property
    def on_time_items(self) -> float:
        """The same, weighted by items: admission likes small requests, and this shows it."""
        return float((self.in_time * self.trace.items).sum() / self.trace.items.sum())

    @property
    def work_over_capacity(self) -> float:
        """On-time work over what the best variant could do at most in that time."""
        return float((self.in_time * self.trace.items).sum() / (self.capacity * self.trace.items.mean() * self.trace.seconds))

    @property
    def quality(self) -> float:
        """Effective quality, averaged over all requests: 1 less the answering variant's gap if it is on time, else 0."""
        gaps = np.array([*(v.gap for v in self.policy.variants or (Variant(""),)), 1.0])
        return float(((1 - gaps[self.variant]) * self.in_time).mean())

    @property
    def quality_gap(self) -> float:
        """What effective quality lacks of the fluid optimum."""
        return self.fluid - self.quality

    @property
    def sheds(self) -> dict[str, int]:
        """How many were refused, by reason."""
        counts = np.bincount(self.fate, minlength=len(FATES))
        return {name: int(n) for name, n in zip(FATES, counts, strict=True) if n and name != "answered"}

    @property
    def mix(self) -> dict[str, float]:
        """Share of the answers each variant gave."""
        given = self.variant[self.variant >= 0]
        names = [v.name for v in self.policy.variants] or [""]
        return {name: float((given == k).mean()) if len(given) else 0.0 for k, name in enumerate(names)}

    def percentile(self, q: float, *, answered: bool = True) -> float:
        """Milliseconds within which ``q`` percent were answered: of those answered, or of all."""
        times = self.latency[np.isfinite(self.latency)] if answered else self.latency
        return float(1000 * np.percentile(times, q, method="higher")) if len(times) else math.inf

    def by(self, column: Literal["priority", "tenant"]) -> dict[str, float]:
        """On-time share by class or by tenant."""
        names = self.trace.priorities if column == "priority" else self.trace.tenants
        places = getattr(self.trace, column)
        return {name: float(self.in_time[places == k].mean()) for k, name in enumerate(names) if (places == k).any()}

    def by_size(self) -> list[float]:
        """On-time share by quartile of items, the smallest first."""
        order = np.argsort(self.trace.items, kind="stable")
        return [float(self.in_time[part].mean()) for part in np.array_split(order, 4) if len(part)]

    def between(self, start: float, stop: float) -> float:
        """On-time share of the requests due between two moments."""
        within = (self.trace.at >= start) & (self.trace.at < stop)
        return float(self.in_time[within].mean()) if within.any() else 1.0


def capacity(policy: Policy, curves: Sequence[Curve], trace: Arrivals, workers: int, variant: int = 0) -> float:
    """Requests a second that so many workers can do by a variant, in the largest batches that end within the deadline."""
    curve, mean = curves[variant], float(trace.items.mean())
    limit = (policy.variants[variant].batch if policy.variants else 0) or policy.batch
    fits = [n for n in range(1, limit + 1) if n == 1 or curve.ms(n, round(n * mean)) <= policy.deadline_ms]
    return workers * max(1000 * n / (curve.fixed_ms + n * (curve.request_ms + curve.item_ms * mean)) for n in fits)


def fluid(policy: Policy, curves: Sequence[Curve], trace: Arrivals, workers: int) -> float:
    """The effective quality that no scheduler passes: work as a fluid, sizes and the mean rate known, queues for free.

    A linear program: which share of each decile of sizes is answered by which variant, or not at all, with as much device
    time as there is. Being told sizes makes it a higher bound than the one that knows their mean alone, since the small ones
    can then have the best model.
    """
    variants = policy.variants or (Variant(""),)
    parts = [p for p in np.array_split(np.sort(trace.items), 10) if len(p)]
    rate = len(trace) / trace.seconds
    costs, gains = [], []
    for part in parts:
        share = len(part) / len(trace)
        for variant, curve in zip(variants, curves, strict=True):
            batch = variant.batch or policy.batch
            ms = curve.fixed_ms / batch + curve.request_ms + curve.item_ms * float(part.mean())
            costs.append(rate * share * ms / 1000)
            gains.append(share * (1 - variant.gap))
    each = np.kron(np.eye(len(parts)), np.ones(len(variants)))
    limits = np.concatenate([[float(workers)], np.ones(len(parts))])
    solved = linprog(-np.array(gains), A_ub=np.vstack([costs, each]), b_ub=limits, method="highs")
    return float(-solved.fun)


def simulate(
    policy: Policy,
    trace: Arrivals,
    fleet: Fleet | Sequence[Fleet],
    *,
    seed: int = 0,
    knobs: Knobs = PROCESSES,
    rule: Rule | Literal["hot-cold", "power-of-two", "round-robin", "oracle"] = "hot-cold",
    probe_s: float = 0.0005,
) -> Replay:
    """Replay a trace.

    Args:
        policy: as in the bundle; its variants' costs are what the scheduler starts from.
        trace: when requests come.
        fleet: the workers as they truly are; several fleets are several machines, each with a scheduler.
        seed: of the residuals, and of the rule.
        knobs: how the scheduler weighs; as in the service by default.
        rule: which machine gets a request, where there are several.
        probe_s: seconds until a machine's answer to a probe is there.

    Raises:
        ConfigError: nothing says what a variant takes, a fault names a worker that is not there, or the trace a class
            that the policy does not know.
    """
    return _Run(policy, trace, [fleet] if isinstance(fleet, Fleet) else list(fleet), seed, knobs, rule, probe_s).run()


@dataclasses.dataclass(frozen=True)
class Point:
    """A trace on so many workers."""

    workers: int
    on_time: float
    """Share of all requests, those refused included."""
    on_time_items: float
    """The same, weighted by items."""
    p50_ms: float
    p99_ms: float
    """Of those answered."""
    refused: float
    """Share refused, at arrival or while waiting."""
    quality: float
    """Effective quality, and below what a fluid would reach."""
    fluid: float
    busy: float
    """Share of the workers' time spent."""
    mix: Mapping[str, float]
    """Share of the answers each variant gave."""
    classes: Mapping[str, float]
    """On-time share by class."""
    sizes: tuple[float, ...]
    """On-time share by quartile of items, the smallest first."""

    @classmethod
    def of(cls, replay: Replay) -> Point:
        """The figures of a replay."""
        refused = 1 - float((replay.fate == 0).mean())
        busy = replay.busy_s / (replay.workers * replay.trace.seconds)
        return cls(
            replay.workers, replay.on_time, replay.on_time_items, replay.percentile(50), replay.percentile(99), refused,
            replay.quality, replay.fluid, busy, replay.mix, replay.by("priority"), tuple(replay.by_size()),
        )  # fmt: skip

    def meets(self, p99_ms: float, on_time: float) -> bool:
        """Whether enough are on time, and those answered are answered soon enough."""
        return self.on_time >= on_time and self.p99_ms <= p99_ms


def sweep(policy: Policy, trace: Arrivals, workers: Sequence[int], fleet: Fleet, *, seed: int = 0) -> list[Point]:
    """The trace on each number of workers."""
    return [Point.of(simulate(policy, trace, dataclasses.replace(fleet, workers=n), seed=seed)) for n in workers]


def enough(points: Sequence[Point], p99_ms: float, on_time: float) -> Point | None:
    """The fewest workers from which on every larger number tried meets the objective; None if even the most do not."""
    found = None
    for point in sorted(points, key=lambda p: -p.workers):
        if not point.meets(p99_ms, on_time):
            break
        found = point
    return found


class _Node:
    """A machine: its scheduler, and its workers as they are."""

    def __init__(self, run: _Run, place: int, fleet: Fleet, knobs: Knobs, seed: int) -> None:
        if fleet.workers < 1 or any(not 0 <= f.worker < fleet.workers for f in fleet.faults):
            raise ConfigError(f"a fleet of {fleet.workers} workers, faults at {[f.worker for f in fleet.faults]}; count from 0")
        self.run, self.name, self.fleet = run, str(place), fleet
        self.curves = fleet.true(run.policy)
        self.scheduler = Scheduler(run.policy, lambda: run.now, knobs)
        self.rng = np.random.default_rng((seed, place))
        self.factors: list[float] = []
        self.slow = list(fleet.speeds or [1.0] * fleet.workers)
        self.alarm = math.inf
        for worker in range(fleet.workers):
            self.scheduler.join(str(worker), fleet.device)
        for fault in fleet.faults:
            run.at(fault.at, getattr(self, fault.what), fault)

    def pump(self) -> None:
        """Do what is due now."""
        run, scheduler = self.run, self.scheduler
        for batch in scheduler.dispatch():
            if batch.worker.batch is batch:
                self._run(batch)
        for ticket in scheduler.late():
            run.ended(self, ticket, "expired")
        due = scheduler.due()
        if due is not None and due < self.alarm:
            self.alarm = max(due, run.now)
            run.at(self.alarm, self.tick, None)

    def _run(self, batch: Batch) -> None:
        """A worker begins a batch."""
        took = self._takes(batch)
        self.run.at(self.run.now + took, self.done, (batch, took))

    def ask(self, work_s: float) -> float:
        """Seconds until it would truly have done one more: its own prediction, at its true speed."""
        return self.scheduler.drain + work_s * min(self.slow)

    def probe(self) -> Probe:
        """What it says of itself."""
        inside = self.scheduler.drain
        return Probe(self.name, inside, inside + self.scheduler.usual(self.run.mean), self.run.now)

    def _takes(self, batch: Batch) -> float:
        """Seconds a batch truly takes."""
        if not self.factors:
            fleet = self.fleet
            noise = math.log(self.curves[0].safety) / 1.645 if fleet.noise is None else fleet.noise
            drawn = self.rng.choice(fleet.residuals, 4096) if fleet.residuals else self.rng.lognormal(0, noise, 4096)
            self.factors = drawn.tolist()
        ms = self.curves[batch.variant].ms(len(batch.pieces), batch.items)
        return ms / 1000 * self.factors.pop() * self.slow[int(batch.worker.name)]

    # -- events --------------------------------------------------------------------------------------------------------------

    def tick(self, _: None) -> None:
        """The clock alone gave something to do."""
        self.alarm = math.inf
        self.pump()

    def done(self, value: tuple[Batch, float]) -> None:
        """A batch has ended."""
        batch, took = value
        if batch.worker.batch is not batch:
            return  # it died with its worker
        self.run.busy += took
        for ticket in self.scheduler.done(batch, took):
            self.run.ended(self, ticket, "answered")
        if batch.worker.batch is not None:  # it was handed ahead
            self._run(batch.worker.batch)
        self.pump()

    def kill(self, fault: Fault) -> None:
        """A worker dies, and is there again later."""
        name = str(fault.worker)
        if name in self.scheduler.workers:
            for ticket in self.scheduler.died(name):
                self.run.ended(self, ticket, "poison")
            self.run.at(self.run.now + fault.seconds, self._back, name)
            self.pump()

    def _back(self, name: str) -> None:
        self.scheduler.join(name, self.fleet.device)
        self.pump()

    def slow_down(self, fault: Fault) -> None:
        """A worker becomes slower for a while."""
        self.slow[fault.worker] *= fault.factor
        self.run.at(self.run.now + fault.seconds, self._recover, fault)

    def _recover(self, fault: Fault) -> None:
        self.slow[fault.worker] /= fault.factor

    def pause(self, fault: Fault) -> None:
        """A worker takes nothing new for a while."""
        if str(fault.worker) in self.scheduler.workers:
            self.scheduler.pause(str(fault.worker))
            self.run.at(self.run.now + fault.seconds, self._resume, fault)

    def _resume(self, fault: Fault) -> None:
        if str(fault.worker) in self.scheduler.workers:
            self.scheduler.resume(str(fault.worker))
            self.pump()


class _Run:
    """The clock, the events, and what is written down."""

    def __init__(
        self, policy: Policy, trace: Arrivals, fleets: list[Fleet], seed: int, knobs: Knobs, rule: Rule | str, probe_s: float
    ) -> None:
        self.policy, self.trace, self.fleets, self.probe_s = policy, trace, fleets, probe_s
        self.mean = round(float(trace.items.mean()))
        self.now, self.busy, self._count = 0.0, 0.0, 0
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.nodes = {str(k): _Node(self, k, fleet, knobs, seed) for k, fleet in enumerate(fleets)}
        self.rule = _rule(rule, self.nodes, seed) if isinstance(rule, str) else rule
        known = {c.name for c in policy.classes}
        for name in trace.priorities:
            if name and name not in known:
                raise ConfigError(f"the trace has class {name!r}; the policy knows {', '.join(sorted(known)) or 'no classes'}")
        n = len(trace)
        self.fate = np.full(n, FATES.index("lost"), np.int8)
        self.latency = np.full(n, math.inf)
        self.variant = np.full(n, -1, np.int8)
        self.answers = np.zeros(n, np.int8)

    def run(self) -> Replay:
        """Until every event is over."""
        trace, names = self.trace, list(self.nodes)
        at, items = trace.at.tolist(), trace.items.tolist()
        ranks, tenants = trace.priority.tolist(), trace.tenant.tolist()
        place, total = 0, len(at)
        while place < total or self.events:
            if place < total and (not self.events or at[place] <= self.events[0][0]):
                self.now = at[place]
                node = self.nodes[names[0] if len(names) == 1 else self._picked(items[place])]
                try:
                    asked = {"priority": trace.priorities[ranks[place]], "tenant": trace.tenants[tenants[place]]}
                    node.scheduler.offer(place, items[place], **asked)
                    node.pump()
                except Overloaded as refused:
                    self.fate[place] = FATES.index(refused.reason)
                    self.rule.answered(node.name)
                place += 1
            else:
                self.now, _, act, value = heapq.heappop(self.events)
                act(value)
        return self._replay()

    def at(self, time: float, act: Callable[[Any], None], value: Any) -> None:
        """Something that happens later."""
        self._count += 1
        heapq.heappush(self.events, (time, self._count, act, value))

    def ended(self, node: _Node, ticket: Ticket, fate: Fate) -> None:
        """Write down what became of a request."""
        place = ticket.value
        self.fate[place] = FATES.index(fate)
        self.rule.answered(node.name)
        if fate == "answered":
            self.latency[place] = self.now - ticket.arrived + node.fleet.overhead_s
            self.variant[place] = ticket.level
            self.answers[place] += 1

    def _picked(self, items: int) -> str:
        for name in self.rule.wanted():
            self.at(self.now + self.probe_s, self.rule.heard, self.nodes[name].probe())
        fleet = self.fleets[0]
        return self.rule.pick(fleet.true(self.policy)[0].ms(1, items) / 1000, self.now)

    def _replay(self) -> Replay:
        policy, trace = self.policy, self.trace
        curves, workers = self.fleets[0].true(policy), sum(fleet.workers for fleet in self.fleets)
        known = {c.name: (c.deadline_ms or policy.deadline_ms) / 1000 for c in policy.classes}
        first = next(iter(known.values()), policy.deadline_ms / 1000)
        deadline = np.array([known.get(name, first) for name in trace.priorities])[trace.priority]
        return Replay(
            trace, policy, workers, self.fate, self.latency, deadline, self.variant, self.answers, self.busy,
            sum(node.scheduler.hedged for node in self.nodes.values()), capacity(policy, curves, trace, workers),
            fluid(policy, curves, trace, workers),
        )  # fmt: skip


def _rule(name: str, nodes: Mapping[str, _Node], seed: int) -> Rule:
    if name == "oracle":
        return Oracle(list(nodes), lambda node, work_s: nodes[node].ask(work_s))
    rules: dict[str, Callable[[list[str], int], Rule]]
    rules = {"hot-cold": HotCold, "power-of-two": PowerOfTwo, "round-robin": RoundRobin}
    return rules[name](list(nodes), seed)
