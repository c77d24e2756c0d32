"""Who runs next, where, by which model, and who is told no: one pure object, the clock handed in.

Everything is decided in one currency, the seconds that work is predicted to take (``core/curve``, learned while serving):

- **Admission** at arrival: what is ahead, done by the cheapest model that may answer, must leave a request its time. What more
  important classes will send meanwhile is ahead of it too, at the rate they send now: the wait is longer by 1 / (1 - the share
  of the workers' time that they take), the delay of a queue with priorities (Cobham 1954). Without it a lower class is let in
  and overtaken until its deadline, and told no only then.
  Dropping what is late by the time it comes up is the usual alternative and collapses under lasting overload: an
  earliest-deadline queue then serves those about to expire, in ever smaller batches.
- **Order**: classes, earliest deadline first, ageing (``queue``). Quotas and the guard are in ``admit``.
- **Model**: the best that the waiting work permits (``adapt``).
- **Batch**: the longest prefix that meets its deadlines, while joining one more still saves something: on a GPU that is many,
  on a CPU, where nearly all time is per item, it is one. Deferring a batch until the last safe moment pays with many models
  on many GPUs; with one model it was worse than starting at once wherever it was tried.
- **Splitting**: one request too long for one worker is cut over idle ones.
- **Death**: what a worker had waits again under its old deadlines. Whoever was there when a worker died runs alone from then
  on, so that a request which kills workers takes no other with it; after two deaths it is refused.

The server and the simulator run this same code. There is no thread and no timer: callers say what happened (``offer``,
``done``, ``died``), ask what to start (``dispatch``) and when to ask again (``due``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from pennyweight.core.curve import Curve, Learned
from pennyweight.core.errors import ConfigError, Overloaded, RequestError
from pennyweight.model.bundle import Policy, Priority, Tenant, Variant
from pennyweight.schedule.adapt import Ladder
from pennyweight.schedule.admit import Bucket, Guard
from pennyweight.schedule.queue import Piece, Queue, Ticket

DEATHS = 2
"""Workers a request may see die before it is refused."""
LESSONS = 32
"""Batches after which curves learn even if nobody calls ``learn``."""
WILD = 3.0
"""Safety factor above which times are not predictable: allowing for more would refuse all; the guard is for those."""
FULL = 0.95
"""Share of the workers' time that more important classes are taken to need at most."""
CALM = 0.1
"""Share of its time within twice of which an answer is no sign of trouble, however little was predicted."""
USUAL_SHARE = 0.01
"""Weight of a new request in what requests usually ask for."""
RETRY_S = 1.0
"""Seconds after which one request is let in to try what predictions say is hopeless, while nothing else is there."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Numbers found in the simulator; a share of a time is of what a request is given, arrival to deadline."""

    stretch: float = 0.4
    """A batch may take this share: whoever comes meanwhile waits as long."""
    gain: float = 0.03
    """A batch grows while a forward's own cost is at least this share of it."""
    pressure: float = 0.35
    """A model is permitted while all that waits would take it this share."""
    room: float = 0.8
    """Share of ``pressure`` below which a better model may come back."""
    patience: float = 0.1
    """For how long that must hold: this many times the first class's time."""
    split: float = 0.3
    """A request longer than this share is cut over idle workers."""
    flow: float = 0.6
    """What more important classes take is averaged over this many times the first class's time."""
    surge: float = 1.25
    """And taken to be this many times as much: what comes in excess of it is told to those who wait, and late."""
    late: float = 1.5
    """A batch is hedged once it has run this many times its safe prediction."""
    ahead: float = 0.0
    """Seconds before a worker is predicted to be free from which on it is handed what it runs next: what the way there takes.
    Later is better for who waits, since more is known; earlier for a worker that would wait for its next batch."""


USUAL = Knobs()
PROCESSES = Knobs(ahead=0.003)
"""Where workers are processes: this is the way to one and back while those who score, the front and its clients share cores."""


class Cost:
    """What one variant takes on one device, in seconds, kept as plain numbers for the decision path."""

    __slots__ = ("a", "b", "learned", "m", "r")

    def __init__(self, curve: Curve | None) -> None:
        self.a = self.r = self.b = 0.0
        self.m = 1.0
        """Safety factor: what 95 % of such work ended within, over the prediction."""
        self.learned = None if curve is None else Learned(curve)
        self.settle()

    def learn(self, requests: int, items: int, seconds: float) -> None:
        """Learn from one batch; the first one, where no profile was given, is taken for mostly its items' work."""
        if self.learned is None:
            if seconds <= 0:
                return
            ms = 1000 * seconds
            self.learned = Learned(Curve(0.2 * ms, 0.1 * ms / requests, 0.7 * ms / max(1, items)))
        else:
            self.learned.observe(requests, items, 1000 * seconds)

    def settle(self) -> None:
        """Predict by what was learned."""
        if self.learned is not None:
            curve = self.learned.curve
            self.a, self.r, self.b = curve.fixed_ms / 1000, curve.request_ms / 1000, curve.item_ms / 1000
            self.m = min(curve.safety, WILD)


class Flow:
    """Seconds of work that come a second, averaged over about the last ``over`` seconds."""

    __slots__ = ("_at", "_sum", "over")

    def __init__(self, over: float) -> None:
        self.over, self._sum, self._at = over, 0.0, 0.0

    def add(self, seconds: float, now: float) -> None:
        """So much came."""
        self._sum, self._at = self._sum * math.exp((self._at - now) / self.over) + seconds, now

    def rate(self, now: float) -> float:
        """Seconds a second, which is workers' worth."""
        return self._sum * math.exp((self._at - now) / self.over) / self.over


class Worker:
    """Something that runs one batch at a time."""

    __slots__ = ("batch", "device", "following", "name", "paused", "speed", "until")

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device
        self.batch: Batch | None = None
        self.following: Batch | None = None
        """What it runs next, already there (``Knobs.ahead``)."""
        self.until = 0.0
        """When it is predicted to be free."""
        self.speed = 1.0
        """Its time over what its device's curve says, smoothed; 1 is the geometric mean of a device's workers."""
        self.paused = False
        """It gets nothing new, as while it loads another bundle."""

    def busy(self, now: float) -> float:
        """Seconds until it is free; one that is overdue by a time is expected to take as long again."""
        left = 0.0 if self.batch is None else abs(self.until - now)
        return left if self.following is None else left + self.following.expected


class Batch:
    """Pieces scored in one forward."""

    __slots__ = ("again", "cost", "expected", "items", "pieces", "start", "variant", "worker")

    def __init__(self, worker: Worker, pieces: list[Piece], variant: int, cost: Cost, start: float, again: bool) -> None:
        self.worker = worker
        self.pieces = pieces
        self.variant = variant
        """Place in the policy's variants."""
        self.cost = cost
        self.start = start
        self.items = sum(piece.items for piece in pieces)
        self.expected = (cost.a + cost.r * len(pieces) + cost.b * self.items) * worker.speed
        """Seconds predicted."""
        self.again = again
        """Whether this is the second copy of another batch, or has one."""

    @property
    def moot(self) -> bool:
        """Whether nobody needs its answers any more: a hedge was faster, or all clients have left."""
        return all(piece.state in ("done", "gone") for piece in self.pieces)


class Scheduler:
    """A policy at work over some workers.

    Args:
        policy: of the bundle that is served.
        clock: seconds, never going back.
        knobs: how it weighs.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic, knobs: Knobs = USUAL) -> None:
        self.clock = clock
        self.knobs = knobs
        self.classes = policy.classes or (Priority("", share=0.9),)
        spans = [(c.deadline_ms or policy.deadline_ms) / 1000 for c in self.classes]
        self._spans = spans
        self._ranks = {c.name: rank for rank, c in enumerate(self.classes)}
        age = policy.age_ms / 1000 or max(spans)
        self.queue = Queue([rank * age for rank in range(len(spans))])
        self.workers: dict[str, Worker] = {}
        self.inside = 0
        """Requests accepted and not answered yet."""
        self.guard = Guard(policy.queue)
        self.hedged = 0.0
        """Seconds of work done a second time."""
        self.worked = 0.0
        """Seconds of work in all."""
        self._items = 1.0
        """Items a request asks for, smoothed."""
        self._devices: list[str] = []
        self._follow(policy)
        self._quotas = {tenant.name: tenant for tenant in policy.tenants}
        self._buckets: dict[str, Bucket] = {}
        self._idle: list[Worker] = []
        self._flows = [Flow(knobs.flow * spans[0]) for _ in spans]
        self._tried = -math.inf
        self._hopeless: list[Ticket] = []
        self._lessons: list[tuple[Cost, int, int, float]] = []

    def _follow(self, policy: Policy) -> None:
        self.policy = policy
        self.variants = policy.variants or (Variant("", batch=policy.batch),)
        devices = {worker.device for worker in self.workers.values()}
        self._costs = [{device: Cost(v.costs.get(device)) for device in devices} for v in self.variants]
        self._limits = [variant.batch or policy.batch for variant in self.variants]
        self._within = [variant.within for variant in self.variants]
        self._floor = (max(i for i, ok in enumerate(self._within) if ok), len(self.variants) - 1)
        knobs = self.knobs
        self._find_least()
        patience = knobs.patience * self._spans[0]
        self._ladder = Ladder(len(self.variants), limit=knobs.pressure, room=knobs.room, patience=patience)

    def adopt(self, policy: Policy) -> None:
        """Follow another bundle's variants from now on: what waits stays, what runs ends as it was started.

        Raises:
            ConfigError: its classes or tenants are others; those are changed by a new start.
        """
        self.check(policy)
        self.learn()
        self._follow(policy)
        for piece in self.queue:
            ticket = piece.ticket
            if ticket.variant is not None:  # a part of it was scored before: the same place, as near as there is
                ticket.variant = min(ticket.variant, self._floor[ticket.degrade])

    def check(self, policy: Policy) -> None:
        """Whether another policy could be adopted.

        Raises:
            ConfigError: as for ``adopt``.
        """
        if (policy.classes, policy.tenants) != (self.policy.classes, self.policy.tenants):
            raise ConfigError(
                "the other bundle's policy has other classes or tenants; give it the same, or start the service anew"
            )

    def curves(self) -> list[dict[str, Curve]]:
        """What has been learned of each variant on each device."""
        self.learn()
        return [{d: c.learned.curve for d, c in costs.items() if c.learned is not None} for costs in self._costs]

    # -- workers -------------------------------------------------------------------------------------------------------------

    def join(self, name: str, device: str = "cpu") -> Worker:
        """A worker is there and idle."""
        assert name not in self.workers, f"worker {name} has joined already"
        worker = self.workers[name] = Worker(name, device)
        for variant, costs in zip(self.variants, self._costs, strict=True):
            if device not in costs:
                costs[device] = Cost(variant.costs.get(device))
        self._idle.append(worker)
        self._settle_devices()
        return worker

    def pause(self, name: str) -> None:
        """Give a worker nothing new; what it runs goes on."""
        worker = self.workers[name]
        worker.paused = True
        if worker in self._idle:
            self._idle.remove(worker)

    def resume(self, name: str) -> None:
        """Give a worker work again."""
        worker = self.workers[name]
        worker.paused = False
        if worker.batch is None and worker not in self._idle:
            self._idle.append(worker)

    def died(self, name: str) -> list[Ticket]:
        """A worker is gone: what it had waits again. Those who have now seen too many die, whom the caller refuses."""
        worker = self.workers.pop(name)
        if worker in self._idle:
            self._idle.remove(worker)
        self._settle_devices()
        poison: list[Ticket] = []
        batch, following, worker.batch, worker.following = worker.batch, worker.following, None, None
        seen: set[int] = set()
        for piece in (*(batch.pieces if batch else ()), *(following.pieces if following else ())):
            piece.running -= 1
            ticket = piece.ticket
            if piece.state != "running":
                continue
            ticket.expires = ticket.deadline + ticket.span
            if batch is not None and id(ticket) not in seen and piece in batch.pieces:  # what was not begun killed nobody
                seen.add(id(ticket))
                ticket.deaths += 1
            if ticket.deaths >= DEATHS:
                if ticket not in poison:
                    poison.append(ticket)
            elif not piece.running:
                self.queue.push(piece)
        for ticket in poison:
            self.drop(ticket)
        return poison

    def _settle_devices(self) -> None:
        """The devices there are, and what the cheapest variants cost on them, for predictions over all workers."""
        self._devices = list(dict.fromkeys(worker.device for worker in self.workers.values()))
        self._find_least()

    def _find_least(self) -> None:
        """The variant that takes least at full load, without unproven ones and with them: what admission predicts by.

        Learned, not the last one: that may cost more a forward, or was measured when cold and never since. A model nobody uses
        keeps a curve that nobody corrects; if admission went by it alone, it would refuse what the models in use could do.
        """

        def takes(variant: int) -> float:
            cost = self._cheapest(variant)
            each = cost.r + cost.b * self._items
            return math.inf if cost.learned is None else cost.m * (cost.a / self._fit(cost, variant, each) + each)

        proven, every = (min(range(floor, -1, -1), key=takes) for floor in self._floor)
        self._least = proven, every

    # -- requests ------------------------------------------------------------------------------------------------------------

    def offer(
        self,
        value: Any,
        items: int = 1,
        *,
        priority: str = "",
        tenant: str = "",
        deadline_s: float | None = None,
        degrade: bool | None = None,
    ) -> Ticket:
        """Let a request in, or refuse it at once.

        Args:
            value: whatever the caller needs to know it by.
            items: how many it asks to be scored.
            priority: its class; the first one by default.
            tenant: who asks.
            deadline_s: seconds it is given, at most what its class has.
            degrade: whether variants outside the margin may answer; as its class says by default.

        Raises:
            Overloaded: it would not be done in time, the queue is full, or the tenant's quota is spent.
            RequestError: no such class or tenant, or a deadline that is not above 0.
        """
        now = self.clock()
        rank = self._rank(priority)
        span = self._spans[rank]
        if deadline_s is not None:
            if not deadline_s > 0:
                raise RequestError(f"a deadline of {deadline_s:g} s from now; give one above 0")
            span = min(span, deadline_s)
        allowed = self.classes[rank].degrade if degrade is None else degrade
        self._items += USUAL_SHARE * (items - self._items)
        ticket = Ticket(value, items, rank, tenant, now, now + span, allowed)
        piece = ticket.pieces[0]
        self._room()
        cost = self._cheapest(self._least[allowed])
        piece.floor = cost.r + cost.b * items
        limit = self.classes[rank].share * span
        if self._at_most(piece, cost, now) > limit and (wait := self._predict(piece, cost, now)) > limit:
            if not self._try(now):
                raise self._hopeful(ticket, wait)
            ticket.expires = math.inf
        if self._quotas:
            self._charge(ticket, now)
        self.inside += 1
        self.queue.push(piece)
        if rank + 1 < len(self._flows):
            self._flows[rank].add(cost.m * (cost.a / self._joined(cost, self._least[allowed]) + piece.floor), now)
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Forget a request whose client has left, or that is refused; what runs of it runs on for nothing."""
        if not ticket.pieces:
            return
        self.inside -= 1
        for piece in ticket.pieces:
            if piece.state == "waiting":
                self.queue.remove(piece)
            else:
                piece.state = "gone"
        ticket.pieces = []

    def late(self) -> list[Ticket]:
        """Requests whose deadline passed while they waited, forgotten; the caller refuses them."""
        expired = self.queue.late(self.clock())
        for ticket in expired:
            self.inside -= 1
            for piece in ticket.pieces:
                piece.state = "gone"
            ticket.pieces = []
        found, self._hopeless = self._hopeless + expired, []
        return found

    def refusal(self, ticket: Ticket) -> Overloaded:
        """What one who was late is told."""
        wait = self.drain
        text = f"not started within {1000 * ticket.span:.4g} ms, the deadline; try again in {wait:.3g} s"
        return Overloaded(text, wait, "late")

    @property
    def drain(self) -> float:
        """Seconds until those who wait now have been answered, by the cheapest model that may."""
        return self._start_of(self.queue.size, sum(self.queue.loads), self.clock(), self._least[0])[0]

    def usual(self, items: int) -> float:
        """Seconds one request of so many items takes, by the model in use."""
        cost = self._cheapest(self._ladder.level)
        return cost.a + cost.r + cost.b * items

    def _rank(self, priority: str) -> int:
        if not priority:
            return 0
        rank = self._ranks.get(priority)
        if rank is None:
            raise RequestError(f"no class {priority!r}; known: {', '.join(self._ranks)}")
        return rank

    def _room(self) -> None:
        waiting = self.queue.size
        if waiting >= self.policy.queue:
            wait = self.drain
            raise Overloaded(
                f"{waiting} requests wait, and the queue holds {self.policy.queue}; try again in {wait:.3g} s", wait, "full"
            )
        if self.inside >= self.guard.limit + len(self.workers) and waiting:
            wait = self.drain
            raise Overloaded(
                f"{self.inside} requests are inside and take longer than predicted; try again in {wait:.3g} s", wait, "guard"
            )

    def _hopeful(self, ticket: Ticket, wait: float) -> Overloaded:
        """What one is told who would be late."""
        after = wait - self.classes[ticket.rank].share * ticket.span
        wait_ms, span_ms = 1000 * wait, 1000 * ticket.span
        return Overloaded(
            f"{ticket.items} items would be done in {wait_ms:.3g} ms, and the deadline is {span_ms:.4g} ms; "
            f"try again in {after:.3g} s",
            after,
            "late",
        )

    def _try(self, now: float) -> bool:
        """Whether to let one in against the prediction, to see whether it is true: a curve nobody tests stays wrong."""
        if self.inside or not self._idle or now - self._tried < RETRY_S:
            return False
        self._tried = now
        return True

    def _charge(self, ticket: Ticket, now: float) -> None:
        quota = self._quotas.get(ticket.tenant) or self._quotas.get("*")
        if quota is None:
            raise RequestError(f"no tenant {ticket.tenant!r}; the policy names {', '.join(self._quotas)}")
        bucket = self._buckets.get(ticket.tenant)
        if bucket is None:
            bucket = self._bucket(ticket.tenant, quota, now)
        cost = self._cheapest(self._ladder.level)
        ms = 1000 * (cost.r + cost.b * ticket.items)
        wait = bucket.wait(ms, now)
        if wait > 0:
            raise Overloaded(
                f"the quota of tenant {ticket.tenant!r} is spent ({quota.quota:g} ms of device time a second); "
                f"try again in {wait:.3g} s", wait, "quota",
            )  # fmt: skip
        bucket.spend(ms)
        ticket.charged = ms

    def _bucket(self, tenant: str, quota: Tenant, now: float) -> Bucket:
        """A bucket for a tenant; full ones of others are forgotten first where there are many, so names cost no memory."""
        if len(self._buckets) >= 10_000:
            self._buckets = {name: b for name, b in self._buckets.items() if b.wait(b.limit, now) > 0}
        bucket = self._buckets[tenant] = Bucket(quota.quota, quota.burst_s, now)
        return bucket

    # -- predictions ---------------------------------------------------------------------------------------------------------

    def _cheapest(self, variant: int) -> Cost:
        """The variant's cost on the device where it is least: there is mostly one kind of device."""
        costs = self._costs[variant]
        devices = self._devices
        if len(devices) == 1:
            return costs[devices[0]]
        return min((costs[d] for d in devices), key=lambda c: c.a + c.r + c.b, default=NOTHING)

    def _busy(self, now: float) -> float:
        """Seconds of work that workers have."""
        return sum(worker.busy(now) for worker in self.workers.values())

    def _waits(self, now: float) -> list[float]:
        """Seconds until each worker that takes new work is free."""
        return [worker.busy(now) for worker in self.workers.values() if not worker.paused]

    def _start_of(self, count: int, load: float, now: float, variant: int) -> tuple[float, float]:
        """Seconds until a request behind ``count`` others (``load`` seconds, forwards aside) starts, and what its batch shares.

        Batches of one length on workers that become free one after the other: the next one starts on the worker whose turn
        it is. Where the workers' times lie further apart than a batch is long, work is taken as a fluid instead.
        """
        cost = self._cheapest(variant)
        free = self._waits(now)
        workers = len(free)
        if not workers:
            return RETRY_S, 0.0  # one is on its way, or nobody will ever be answered
        joined = self._joined(cost, variant)
        ahead, with_it = divmod(count, joined)
        each = load / count if count else 0.0
        long = cost.m * (cost.a + each * joined)
        if workers > 1:
            free.sort()
        rounds, turn = divmod(ahead, workers)
        even = free[-1] - free[0] <= long
        start = free[turn] + rounds * long if even else (sum(free) + ahead * long) / workers
        # where whole batches wait, its own will be full too: those who come later will fill it
        return start, each * (joined - 1 if ahead else with_it)

    def _joined(self, cost: Cost, variant: int) -> int:
        """Requests of the size that waits which one forward would join at most."""
        limit = self._limits[variant]
        if limit == 1 or not self.queue.size:
            return limit
        return self._fit(cost, variant, cost.r + cost.b * self.queue.items / self.queue.size)

    def _fit(self, cost: Cost, variant: int, each: float) -> int:
        """Requests that one forward would join at most where each adds so much."""
        limit = self._limits[variant]
        return limit if each <= 0 else max(1, min(limit, int(cost.a * (1 / self.knobs.gain - 1) / each)))

    def _at_most(self, piece: Piece, cost: Cost, now: float) -> float:
        """What ``_predict`` does not exceed: one worker did all there is, in turns. Most are let in by this."""
        if piece.ticket.rank:
            return math.inf
        free, count, load = self._waits(now), self.queue.counts[0], self.queue.loads[0]
        return sum(free) + cost.m * (cost.a * (count + 1) + 2 * load + piece.floor) if free else math.inf

    def _predict(self, piece: Piece, cost: Cost, now: float) -> float:
        """Seconds until a new request would be answered, by the cheapest variant it may have."""
        ticket = piece.ticket
        count, load = 0, 0.0
        for rank in range(ticket.rank + 1):
            count += self.queue.counts[rank]
            load += self.queue.loads[rank]
        start, shared = self._start_of(count, load, now, self._least[ticket.degrade])
        if ticket.rank and start:
            taken = sum(flow.rate(now) for flow in self._flows[: ticket.rank]) / max(1, len(self.workers))
            start /= 1 - min(self.knobs.surge * taken, FULL)
        return start + cost.m * (cost.a + shared + piece.floor)

    def _pressure(self, now: float, span: float) -> list[float]:
        """For each variant: what runs and waits would take by it, over the time there is."""
        busy, size, items = self._busy(now), self.queue.size, self.queue.items
        share = 1 / (max(1, sum(not worker.paused for worker in self.workers.values())) * span)
        found = []
        for variant in range(len(self.variants)):
            cost = self._cheapest(variant)
            work = cost.r * size + cost.b * items + cost.a * math.ceil(size / self._joined(cost, variant))
            found.append((busy + work) * share)
        return found

    # -- what to start -------------------------------------------------------------------------------------------------------

    def dispatch(self, *, hurry: bool = False) -> list[Batch]:
        """Batches to start now, each on its worker. ``hurry`` waits for nobody to join, as when the service stops."""
        started: list[Batch] = []
        now = self.clock()
        while self._idle and self.queue.size:
            self._give_up(now)
            batches = self._form(now, hurry)
            if not batches:
                break
            started += batches
        if self.knobs.ahead and self.queue.size and not self._idle:
            started += self._ahead(now, hurry)
        if self.policy.hedge and self._idle and not self.queue.size:
            started += self._hedges(now)
        return started

    def due(self) -> float | None:
        """When to call ``late`` and ``dispatch`` again, unless something happens before; None if only that can help."""
        times = [self.queue.expires()]
        if self._idle and self.queue.size:
            times.append(self._held())
        if self.policy.hedge and self._idle:
            now = self.clock()  # one that is overdue and has no copy has none for a reason that time alone does not change
            overdue = (self._overdue(w.batch) for w in self.workers.values() if w.batch and not w.batch.again)
            times += [time for time in overdue if time > now]
        known = [time for time in times if time is not None]
        return min(known) if known else None

    def _held(self) -> float | None:
        """When the head has waited long enough for others."""
        head = self.queue.head()
        return None if head is None else head.ticket.arrived + self.policy.wait_ms / 1000

    def _give_up(self, now: float) -> None:
        """Take out heads that could not be answered in time even alone and by the cheapest model."""
        while (head := self.queue.head()) is not None:
            ticket = head.ticket
            cost = self._cheapest(self._floor[ticket.degrade])
            if now + cost.a + cost.r + cost.b * head.items <= ticket.expires and not self._dear(ticket, cost, now):
                return
            self._hopeless.append(ticket)
            self.drop(ticket)

    def _dear(self, ticket: Ticket, cost: Cost, now: float) -> bool:
        """Whether answering the head in time would cost others more: its little time is for a small batch alone.

        Where whole batches wait, each forward that is not full leaves somebody late. Serving whoever is about to expire
        first, in batches that are small for that, keeps everybody about to expire (the domino effect of deadlines).
        """
        variant = self._least[ticket.degrade]
        joined = self._joined(cost, variant)
        each = sum(self.queue.loads) / self.queue.size
        if joined == 1 or self.queue.size <= joined or each <= 0 or ticket.expires > ticket.deadline:
            return False
        full = cost.a + each * joined
        left = (ticket.deadline - now) / cost.m
        if left >= full:
            return False
        few = (left - cost.a) / each
        return joined * left / full - few > 1

    def _ahead(self, now: float, hurry: bool) -> list[Batch]:
        """Batches for workers that are about to be free."""
        started: list[Batch] = []
        for worker in self.workers.values():
            batch = worker.batch
            if batch is None or worker.following is not None or worker.paused or worker.until - now > self.knobs.ahead:
                continue
            if now < self._overdue(batch):  # who is much too late may never end
                self._give_up(now)
                started += self._form(max(now, worker.until), hurry, worker)
        return started

    def _form(self, now: float, hurry: bool, worker: Worker | None = None) -> list[Batch]:
        """What starts at ``now`` on the best idle worker, or on one that is free by then."""
        head = self.queue.head()
        if head is None:
            return []
        ticket = head.ticket
        if worker is None:
            worker = self._idle[0] if len(self._idle) == 1 else min(self._idle, key=lambda w: w.speed)
        variant = self._choose(ticket, worker, now)
        if self.policy.wait_ms and not hurry and not ticket.deaths:
            full = self.queue.size >= self._limits[variant] or self._limits[variant] == 1
            if not full and ticket.arrived + self.policy.wait_ms / 1000 > now:
                return []
        cost = self._costs[variant][worker.device]
        alone = (cost.a + cost.r + cost.b * head.items) * worker.speed
        if len(self._idle) > 1 and alone > self.knobs.split * ticket.span and ticket.deaths == 0:
            parts = self._split(head, alone, variant)
            if len(parts) > 1:
                return [self._start(w, [p], variant, now) for w, p in zip(self._idle[: len(parts)], parts, strict=True)]
        return [self._start(worker, self._prefix(head, worker, variant, cost, now), variant, now)]

    def _choose(self, ticket: Ticket, worker: Worker, now: float) -> int:
        """The variant for the head of the queue: what load permits, what its caller allows, what its deadline needs."""
        last = self._floor[ticket.degrade]
        if ticket.variant is not None:
            return ticket.variant
        level = self._ladder.step(self._pressure(now, ticket.span), now) if last else 0
        while level < last:
            cost = self._costs[level][worker.device]
            takes = cost.m * worker.speed * (cost.a + cost.r + cost.b * ticket.items)
            if now + takes <= ticket.deadline and (takes <= self.knobs.split * ticket.span or len(self._idle) > 1):
                break
            level += 1
        return min(level, last)

    def _prefix(self, head: Piece, worker: Worker, variant: int, cost: Cost, now: float) -> list[Piece]:
        """The head and those after it who can be scored with it in time."""
        queue, ticket = self.queue, head.ticket
        queue.take(head)
        pieces, items = [head], head.items
        limit = self._limits[variant]
        if len(self._idle) > 1:
            limit = min(limit, 1 + queue.size // len(self._idle))  # others are idle too: leave them their share
        if limit == 1 or ticket.deaths:
            return pieces
        factor = cost.m * worker.speed
        latest = min(ticket.deadline, now + self.knobs.stretch * ticket.span)
        least = cost.a / self.knobs.gain
        requests = 1
        while requests < limit and (following := queue.head()) is not None:
            takes = cost.a + cost.r * (requests + 1) + cost.b * (items + following.items)
            other = following.ticket
            if takes > least or now + factor * takes > min(latest, other.deadline):
                break
            if other.deaths or not (variant == other.variant if other.variant is not None else self._may(other, variant)):
                break
            queue.take(following)
            pieces.append(following)
            latest = min(latest, other.deadline)
            requests, items = requests + 1, items + following.items
        return pieces

    def _may(self, ticket: Ticket, variant: int) -> bool:
        return ticket.degrade or self._within[variant]

    def _split(self, piece: Piece, alone: float, variant: int) -> list[Piece]:
        """The piece cut for idle workers that nobody else waits for."""
        ticket = piece.ticket
        spare = max(1, len(self._idle) - self.queue.size + 1)
        parts = min(spare, math.ceil(alone / (self.knobs.split / 2 * ticket.span)), piece.items)
        if parts < 2:
            return [piece]
        cuts = [piece.start + piece.items * k // parts for k in range(parts + 1)]
        self.queue.take(piece)
        ticket.variant = variant
        made = [Piece(ticket, start, stop) for start, stop in itertools.pairwise(cuts)]
        for part in made:
            part.floor = piece.floor * part.items / piece.items
            part.state = "running"
        ticket.pieces = [p for p in ticket.pieces if p is not piece] + made
        return made

    def _start(self, worker: Worker, pieces: list[Piece], variant: int, now: float, again: bool = False) -> Batch:
        batch = Batch(worker, pieces, variant, self._costs[variant][worker.device], now, again)
        for piece in pieces:
            piece.running += 1
        if worker.batch is not None:
            worker.following = batch
            return batch
        worker.batch = batch
        worker.until = now + batch.expected
        self._idle.remove(worker)
        return batch

    def _overdue(self, batch: Batch) -> float:
        """When a batch is later than it should ever be."""
        return batch.start + self.knobs.late * batch.cost.m * batch.expected

    def _hedges(self, now: float) -> list[Batch]:
        """Second copies of batches that are much too late, on idle workers, as long as the budget of work lasts."""
        started: list[Batch] = []
        for worker in list(self.workers.values()):
            batch = worker.batch
            if batch is None or batch.again or not self._idle or now < self._overdue(batch) or batch.moot:
                continue
            if batch.cost is not self._costs[batch.variant][worker.device] or any(p.ticket.deaths for p in batch.pieces):
                continue
            if self.hedged + batch.expected > self.policy.hedge * (self.worked + batch.expected):
                break
            batch.again = True
            self.hedged += batch.expected
            started.append(self._start(self._idle[0], batch.pieces, batch.variant, now, again=True))
        return started

    # -- what came of it -----------------------------------------------------------------------------------------------------

    def done(self, batch: Batch, seconds: float | None = None) -> list[Ticket]:
        """A batch was scored: the requests that are answered by it.

        Args:
            batch: as ``dispatch`` gave it.
            seconds: what it took on its worker; since it was started by default.
        """
        now = self.clock()
        took = now - batch.start if seconds is None else seconds
        self._free(batch)
        self._note(batch, took)
        answered: list[Ticket] = []
        share = 1000 * took / max(1, batch.items)
        for piece in batch.pieces:
            piece.running -= 1
            if piece.state != "running":
                continue  # its hedge was faster, or its client has left
            piece.state = "done"
            ticket = piece.ticket
            bucket = self._buckets.get(ticket.tenant)
            if bucket is not None:  # what it took, in place of what was predicted
                bucket.spend(share * piece.items - ticket.charged * piece.items / max(1, ticket.items))
            ticket.level = ticket.variant = batch.variant
            if len(ticket.pieces) == 1 or ticket.answered:
                answered.append(ticket)
                ticket.pieces = []
                self.inside -= 1
                promised = max(batch.start + batch.expected - ticket.arrived, CALM * ticket.span)
                self.guard.answered(promised, now - ticket.arrived, self.inside)
        return answered

    def failed(self, batch: Batch) -> list[Ticket]:
        """A batch ended in an error, its worker is well: the requests in it, forgotten; the caller tells them."""
        self._free(batch)
        found: list[Ticket] = []
        for piece in batch.pieces:
            piece.running -= 1
            if piece.state == "running" and not piece.running and piece.ticket not in found:
                found.append(piece.ticket)
        for ticket in found:
            self.drop(ticket)
        return found

    def _free(self, batch: Batch) -> None:
        worker = batch.worker
        if worker.following is batch:  # it never got there
            worker.following = None
            return
        assert worker.batch is batch, f"worker {worker.name} does not run this batch"
        worker.batch, worker.following = worker.following, None
        if worker.batch is not None:
            worker.batch.start = self.clock()
            worker.until = worker.batch.start + worker.batch.expected
        elif not worker.paused:
            self._idle.append(worker)

    def _note(self, batch: Batch, took: float) -> None:
        worker, requests, cost = batch.worker, len(batch.pieces), batch.cost
        self.worked += took
        if len(self.workers) > 1 and batch.expected > 0 and took > 0:
            ratio = min(4.0, max(0.25, took / batch.expected))
            worker.speed *= ratio**0.05
        self._lessons.append((cost, requests, batch.items, took / worker.speed if len(self.workers) > 1 else took))
        if len(self._lessons) >= LESSONS or cost.learned is None:
            self.learn()

    def learn(self) -> None:
        """Let the curves learn from what was done: apart from ``done``, so that the next batch is on its way before."""
        for cost, requests, items, took in self._lessons:
            cost.learn(requests, items, took)
        for cost in {lesson[0] for lesson in self._lessons}:
            cost.settle()
        self._lessons.clear()
        for device in self._devices:
            self._even(device)
        self._find_least()

    def _even(self, device: str) -> None:
        """Leave what a device's workers have in common to its curves.

        Speeds and curves say the same otherwise, and drift apart, each the other's inverse, until the curves that admission
        reads have nothing to do with what work takes.
        """
        alike = [worker for worker in self.workers.values() if worker.device == device]
        common = math.exp(sum(math.log(worker.speed) for worker in alike) / len(alike))
        for worker in alike:
            worker.speed /= common


NOTHING = Cost(None)
