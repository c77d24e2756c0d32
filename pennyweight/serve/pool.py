"""Worker processes behind one front: who gets which batch, what a death costs, how one bundle takes another's place.

The scheduler that is shipped and simulated is the one brain, and lives here; a worker runs what it is handed and says how long
it took. Nothing that was accepted is lost: a worker that dies, or does not answer any more and is ended for it, has its
requests wait again under their old deadlines, and a spare that has loaded everything already takes its place at once, since
starting Python and PyTorch anew takes longer than most deadlines. A request that two workers died with is refused.

Another bundle is loaded by new processes beside the old ones, at low priority. Requests that are answered are then scored by
one of them too, on the same candidates; if the scores agree the new ones take over, each old one leaving after its batch,
and if they do not the new ones go. Memory is needed twice meanwhile; loading into workers that serve would save that and take
their time, which at a high load is time that requests do not have.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pennyweight.core import errors, hardware
from pennyweight.core.curve import TAIL, Curve
from pennyweight.core.errors import Conflict, DeviceError, Overloaded, PennyweightError, Poison
from pennyweight.model.bundle import Policy, Variant
from pennyweight.schedule.batcher import Desk, Seat, settle, settle_all
from pennyweight.schedule.queue import Ticket
from pennyweight.schedule.scheduler import PROCESSES, Batch, Scheduler
from pennyweight.serve.child import GO, LENGTH, RAN, RUN, Failed, Measure, Measured, Ready, Start, encode, tells
from pennyweight.serve.engine import Answer
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.shadow import Difference, Shadow
from pennyweight.serve.slot import Outcome, Packed, Part, Slot, read_answers, write_queries
from pennyweight.serve.worker import Query, Ranked

log = logging.getLogger("pennyweight.serve")

START_S = 300.0
"""Seconds a worker has to load its bundles."""
STALL_S = 10.0
"""Seconds a batch may take beyond twenty times its prediction before its worker counts as dead."""
STOP_S = 5.0
"""Seconds a worker has to end when it is told to."""
MEASURE_S = 0.3
"""Seconds that variants without a profile are timed for when the service starts."""
State = Literal["loading", "spare", "serving", "leaving", "dead"]


@dataclasses.dataclass(frozen=True)
class Edition:
    """A bundle as it is served: its folder and its policy. The next bundle is another edition."""

    folder: Path
    policy: Policy

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Its variants; the bundle alone where the policy names none."""
        return self.policy.variants or (Variant("", batch=self.policy.batch),)

    def having(self, curves: Sequence[Curve | None], device: str) -> Edition:
        """The same with these costs of its variants, where it does not say them itself."""
        variants = tuple(
            v if device in v.costs or curve is None else dataclasses.replace(v, costs={**v.costs, device: curve})
            for v, curve in zip(self.variants, curves, strict=True)
        )
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, variants=variants))


@dataclasses.dataclass(frozen=True)
class Flight:
    """A batch under way, or a shadow's request."""

    number: int
    slot: Slot
    parts: Sequence[Part]
    at: int
    """Where its answers are."""
    batch: Batch | None = None
    done: asyncio.Future[list[Outcome]] | None = None


class Waiting:
    """A request whose parts come in."""

    __slots__ = ("by", "packed", "parts")

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.parts: dict[int, Outcome] = {}
        self.by: set[Variant] = set()


class Member:
    """A worker process as the front sees it."""

    def __init__(
        self, name: str, edition: Edition, process: subprocess.Popen[bytes], control: socket.socket, slots: Sequence[Slot]
    ) -> None:
        self.name, self.edition, self.process, self.control, self.slots = name, edition, process, control, slots
        self.state: State = "loading"
        self.flights: collections.deque[Flight] = collections.deque()
        """What it runs, and what it was handed to run after that: each in a slot of its own, in turns."""
        self.turn = 0
        self.inbox = bytearray()
        self.loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.measured: asyncio.Future[Measured] | None = None

    def send(self, message: bytes) -> None:
        """Tell it something; one that is dead is found out by its end of the socket."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.sendall(LENGTH.pack(len(message)) + message)

    def messages(self) -> Iterator[bytes]:
        """What has arrived whole."""
        while len(self.inbox) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.inbox)[0]
            if len(self.inbox) < end:
                return
            message = bytes(self.inbox[LENGTH.size : end])
            del self.inbox[:end]
            yield message


class Pool:
    """Worker processes that answer queries, each with every variant of the bundle.

    Args:
        folder: of the bundle; its variants' folders are seen from here.
        policy: how requests are scheduled.
        workers: processes that serve.
        metrics: what is counted in.
        spares: processes more that have loaded all and take a dead one's place.
        allow: import paths of factories that may be loaded.
        device: what workers compute on, ``cpu`` or ``cuda``: then each has a GPU of its own.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        workers: int,
        metrics: Metrics,
        *,
        spares: int = 1,
        allow: Sequence[str] = (),
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.edition = Edition(folder, policy)
        self.scheduler = Scheduler(policy, clock, PROCESSES)
        self._desk = Desk(self.scheduler, self._go)
        self._wanted, self._spares, self._allow, self._device = workers, spares, list(allow), device
        self._metrics = metrics
        self._members: dict[str, Member] = {}
        self._about: Ready | None = None
        self._numbers = 0
        self._started = 0
        self._failures = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._refill: asyncio.TimerHandle | None = None
        self._shadow: Shadow | None = None
        self._recent: collections.deque[tuple[Query, Ranked, str]] = collections.deque(maxlen=64)
        metrics.follow(self.scheduler)

    @property
    def about(self) -> Ready:
        """What is loaded."""
        assert self._about is not None, "start the pool first"
        return self._about

    @property
    def members(self) -> Sequence[Member]:
        """The processes there are, spares too."""
        return list(self._members.values())

    # -- starting and stopping -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers; back when all of them can answer.

        Raises:
            BundleError, ConfigError: the bundle cannot be served.
            DeviceError: a worker ended, or was not ready in time.
        """
        try:
            first = [self._spawn(self.edition) for _ in range(self._wanted)]
            ready = await self._ready(first)
            self._about = ready[0]
            for note in dict.fromkeys(note for one in ready for note in one.notes):
                log.warning(note)
            self.edition = await self._profile(first[0])
            self.scheduler.adopt(self.edition.policy)
            for member in first:
                member.edition = self.edition
                self._join(member)
        except BaseException:
            await self._end(self.members)
            raise
        self._watch = asyncio.get_running_loop().call_later(1.0, self._watched)
        self._fill()

    def hurry(self) -> None:
        """As ``Engine.hurry`` says."""
        self._desk.hurry()

    async def close(self) -> None:
        """Answer what was accepted, then end the workers."""
        await self._desk.close()
        self._stopping = True
        for timer in (self._watch, self._refill):
            if timer is not None:
                timer.cancel()
        await self._end(self.members)
        for task in list(self._tasks):
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _ready(self, members: Sequence[Member]) -> list[Ready]:
        try:
            async with asyncio.timeout(START_S):
                return list(await asyncio.gather(*(m.loaded for m in members)))
        except TimeoutError as error:
            raise DeviceError(
                f"workers had not loaded {members[0].edition.folder} after {START_S:g} s; look at their output, or start fewer"
            ) from error

    def _spawn(self, edition: Edition, gentle: bool = False) -> Member:
        """Start a process and tell it what to load."""
        self._started += 1
        ours, theirs = socket.socketpair()
        slots = [Slot.made() for _ in range(2)]
        threads = max(1, hardware.limits()[0] // self._wanted)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if self._device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str((self._started - 1) % self._wanted)
        descriptors = (theirs.fileno(), *(slot.descriptor for slot in slots))
        command = [sys.executable, "-m", "pennyweight.serve.child", *map(str, descriptors)]
        process = subprocess.Popen(command, pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        ours.setblocking(False)
        member = Member(f"w{self._started}", edition, process, ours, slots)
        self._members[member.name] = member
        asyncio.get_running_loop().add_reader(ours, self._heard, member)
        folders = [str(edition.folder / v.folder) if v.folder else str(edition.folder) for v in edition.variants]
        member.send(encode(Start(folders, self._allow, threads, gentle)))
        return member

    async def _profile(self, member: Member) -> Edition:
        """The edition with curves, timed where no profile gives them, so that the first requests are not let in blindly."""
        edition, variants = member.edition, member.edition.variants
        if all(self._device in v.costs for v in variants):
            return edition
        member.measured = asyncio.get_running_loop().create_future()
        member.send(encode(Measure(edition.policy.batch, edition.policy.candidates, MEASURE_S)))
        try:
            async with asyncio.timeout(START_S):
                samples = (await member.measured).samples
        except TimeoutError as error:
            raise DeviceError(f"the bundle could not be timed within {START_S:g} s; give its variants costs") from error
        return edition.having([_curve(s) for s in samples], self._device)

    async def _end(self, members: Sequence[Member]) -> None:
        await asyncio.gather(*(self._bury(m, patient=True) for m in members))

    async def _bury(self, member: Member, *, patient: bool = False) -> None:
        """Close the socket, which ends the process; one that does not is ended."""
        if member.state != "dead":
            self._forget(member)
        wait = asyncio.get_running_loop().run_in_executor
        try:
            await wait(None, member.process.wait, STOP_S if patient else 0.0)
        except subprocess.TimeoutExpired:
            member.process.kill()
            await wait(None, member.process.wait)

    def _forget(self, member: Member) -> None:
        member.state = "dead"
        self._members.pop(member.name, None)
        asyncio.get_running_loop().remove_reader(member.control)
        member.control.close()
        for slot in member.slots:
            slot.close()
        gone = DeviceError(f"worker {member.name} ended before it could answer; its output says why")
        for future in (member.loaded, member.measured, *(flight.done for flight in member.flights)):
            if future is not None and not future.done():
                future.set_exception(gone)
                future.exception()  # nobody need ask for it
        if member.name in self.scheduler.workers and not self.scheduler.workers[member.name].batch:
            self.scheduler.died(member.name)

    # -- how many there are --------------------------------------------------------------------------------------------------

    def _join(self, member: Member) -> None:
        member.state = "serving"
        self.scheduler.join(member.name, self._device)

    def _count(self, *states: State) -> int:
        return sum(m.state in states and m.edition is self.edition for m in self._members.values())

    def _fill(self) -> None:
        """Start what is missing of workers and spares."""
        if self._stopping:
            return
        for member in self.members:
            if member.state == "spare" and member.edition is self.edition and self._count("serving") < self._wanted:
                self._join(member)
        for _ in range(self._wanted + self._spares - self._count("serving", "spare", "loading")):
            member = self._spawn(self.edition, gentle=self._count("serving") >= self._wanted)
            self._do(self._welcome(member))
        self._desk.pump()

    async def _welcome(self, member: Member) -> None:
        """Let a process that was started while serving take its place, or try again later if it cannot."""
        try:
            await self._ready([member])
        except PennyweightError as error:
            if self._stopping or member.edition is not self.edition:
                return
            self._failures += 1
            pause = min(30.0, 0.5 * 2.0**self._failures)
            log.error("a worker could not be started (%s); the next try is in %g s", error, pause)
            self._refill = asyncio.get_running_loop().call_later(pause, self._fill)
            await self._bury(member)
            return
        self._failures = 0
        member.state = "spare"
        if member.edition is not self.edition:
            await self._bury(member, patient=True)
        self._fill()

    def _do(self, work: collections.abc.Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _watched(self) -> None:
        """Workers that have not answered for far too long are ended; what they had goes to others."""
        now = self.scheduler.clock()
        for member in self.members:
            batch = member.flights[0].batch if member.flights else None
            if batch is not None and now - batch.start > STALL_S + 20 * batch.expected:
                log.error("worker %s has not answered for %.0f s and is ended", member.name, now - batch.start)
                member.process.kill()
        self._watch = asyncio.get_running_loop().call_later(1.0, self._watched)

    # -- requests ------------------------------------------------------------------------------------------------------------

    def place(self, query: Query, seat: Seat, items: int, **asked: Any) -> Ticket:
        """As ``Engine.place`` says."""
        return self._desk.place(Waiting(Packed.of(query)), seat, items, **asked)

    def leave(self, ticket: Ticket) -> None:
        """As ``Engine.leave`` says."""
        self._desk.leave(ticket)

    def _go(self, batch: Batch) -> None:
        """Hand a batch to its worker."""
        member = self._members[batch.worker.name]
        parts: list[Part] = []
        for piece in batch.pieces:
            ticket = piece.ticket
            stop = None if piece.stop == ticket.items else piece.stop
            parts.append((ticket.value[0].packed, piece.start, stop))
        try:
            self._fly(member, parts, batch.variant, batch)
        except OSError as error:  # no memory for a larger slot
            asyncio.get_running_loop().call_soon(self._grounded, batch, error)

    def _grounded(self, batch: Batch, error: OSError) -> None:
        """A batch could not be handed over; its worker is well."""
        settle_all(self.scheduler.failed(batch), error)
        self._desk.pump()

    def _fly(
        self,
        member: Member,
        parts: Sequence[Part],
        variant: int,
        batch: Batch | None = None,
        done: asyncio.Future[list[Outcome]] | None = None,
    ) -> None:
        self._numbers = (self._numbers + 1) & 0xFFFFFFFF
        slot = member.slots[member.turn]
        at = write_queries(slot, parts)
        member.flights.append(Flight(self._numbers, slot, parts, at, batch, done))
        member.send(RUN.pack(GO, member.turn, self._numbers, variant, len(parts), at, slot.size))
        member.turn = 1 - member.turn

    def _heard(self, member: Member) -> None:
        """Something came from a worker, or its end."""
        try:
            data = member.control.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            return self._lost(member)
        member.inbox += data
        for message in member.messages():
            if message[0] == GO and len(message) == RAN.size:
                self._ran(member, *RAN.unpack(message)[1:])
            else:
                self._told(member, tells.decode(message))

    def _told(self, member: Member, message: Ready | Measured | Failed) -> None:
        if isinstance(message, Ready):
            if not member.loaded.done():
                member.loaded.set_result(message)
        elif isinstance(message, Measured):
            if member.measured is not None and not member.measured.done():
                member.measured.set_result(message)
        elif message.batch >= 0:
            self._failed(member, message)
        elif not member.loaded.done():
            kind = getattr(errors, message.kind, None)
            ours = isinstance(kind, type) and issubclass(kind, PennyweightError) and kind is not errors.Infeasible
            member.loaded.set_exception(kind(message.text) if ours else DeviceError(f"{message.kind}: {message.text}"))  # type: ignore[misc]
            member.loaded.exception()

    def _ran(self, member: Member, number: int, seconds: float) -> None:
        """A batch was scored."""
        if not member.flights or member.flights[0].number != number:
            return
        flight = member.flights.popleft()
        answers = read_answers(flight.slot, flight.at, flight.parts)
        if flight.done is not None:
            if not flight.done.done():
                flight.done.set_result(answers)
            return
        batch = flight.batch
        assert batch is not None
        variant = member.edition.variants[batch.variant]
        for piece, answer in zip(batch.pieces, answers, strict=True):
            waiting: Waiting = piece.ticket.value[0]
            if piece.state == "running":
                waiting.parts[piece.start] = answer
                waiting.by.add(variant)
        tickets = self.scheduler.done(batch)
        took = self.scheduler.clock() - batch.start
        self._left(member)
        self._desk.pump()  # the next batch is on its way before these are told
        for ticket in tickets:
            self._answer(ticket)
        self._metrics.batch(len(batch.pieces), batch.expected, took, variant.name, seconds)

    def _answer(self, ticket: Ticket) -> None:
        """Join a request's parts and hand them over."""
        waiting: Waiting = ticket.value[0]
        parts = [waiting.parts[start] for start in sorted(waiting.parts)]
        wrong = next((p for p in parts if isinstance(p, Exception)), None)
        if wrong is not None:
            return settle(ticket, wrong)
        if len(waiting.by) > 1:  # parts on both sides of an exchange: scores that cannot be compared
            return settle(ticket, Overloaded("the bundle was exchanged meanwhile; try again now", 0.1, "swap"))
        query, variant = waiting.packed.query, next(iter(waiting.by))
        ranked = _joined([p for p in parts if isinstance(p, Ranked)], query.k)
        if query.by == "model":
            self._recent.append((query, ranked, variant.name))
            if self._shadow is not None:
                self._shadow.feed(query, ranked, variant.name)
        settle(ticket, Answer(ranked, variant.name, variant.gap))

    def _failed(self, member: Member, message: Failed) -> None:
        """A batch ended in an error, its worker is well."""
        if not member.flights or member.flights[0].number != message.batch:
            return
        flight = member.flights.popleft()
        error = RuntimeError(f"worker {member.name}: {message.kind}: {message.text}")
        if flight.batch is None:
            if flight.done is not None and not flight.done.done():
                flight.done.set_exception(error)
            return
        settle_all(self.scheduler.failed(flight.batch), error)
        self._left(member)
        self._desk.pump()

    def _lost(self, member: Member) -> None:
        """A worker's process has ended without being told to."""
        serving = member.name in self.scheduler.workers
        had = [flight.batch for flight in member.flights if flight.batch is not None] if serving else []
        before = {id(p.ticket) for batch in had for p in batch.pieces if p.state == "running"}
        poison = self.scheduler.died(member.name) if serving else []
        was = member.state
        self._forget(member)
        self._do(self._bury(member))
        if serving:
            log.error("worker %s ended; %d requests wait again", member.name, len(before) - len(poison))
            self._metrics.death(len(before) - len(poison), len(poison))
        settle_all(
            poison, Poison("two workers died while they had this request; do not send it again, and report what it holds")
        )
        if was in ("serving", "spare"):
            self._fill()
        else:
            self._desk.pump()

    def _left(self, member: Member) -> None:
        """One whose edition is over goes after its last batch."""
        if member.state == "leaving" and not member.flights:
            self._do(self._bury(member, patient=True))

    # -- another bundle ------------------------------------------------------------------------------------------------------

    async def swap(self, folder: Path, policy: Policy, *, tolerance: float, requests: int, seconds: float) -> Difference:
        """Serve another bundle from now on, if its scores agree with this one's; one exchange at a time.

        Args:
            folder: of the other bundle.
            policy: its policy.
            tolerance: largest difference of scores that is agreement (see ``Difference``); infinite takes any finite scores.
            requests: of live traffic that are scored by both.
            seconds: to wait for these; with fewer, those that came decide.

        Raises:
            BundleError, ConfigError, DeviceError: it cannot be loaded or served.
            Conflict: the scores differ; this bundle goes on serving.
        """
        other = Edition(folder, policy)
        known = {
            v.name: curves.get(self._device) for v, curves in zip(self.edition.variants, self.scheduler.curves(), strict=True)
        }
        other = other.having([known.get(v.name) for v in other.variants], self._device)
        new: list[Member] = []
        try:
            self.scheduler.check(policy)
            new = [self._spawn(other, gentle=True) for _ in range(self._wanted)]
            about = (await self._ready(new))[0]
            for member in new:
                member.state = "spare"
            found = await self._compared(new[0], requests, seconds)
            if not found.within(tolerance):
                raise Conflict(f"{found}, and {tolerance:g} is allowed; the old bundle goes on serving")
            if any(m.state == "dead" for m in new):
                raise DeviceError("a worker of the other bundle ended; its output says why")
            self._flip(other, new, about)
            return found
        except BaseException:
            await self._end([m for m in new if m.state != "serving"])
            raise

    async def _compared(self, member: Member, requests: int, seconds: float) -> Difference:
        """Score what is answered by the other bundle too."""
        names = {v.name: place for place, v in enumerate(member.edition.variants)}

        async def score(query: Query, variant: str) -> Ranked:
            if member.state == "dead":
                raise DeviceError("a worker of the other bundle ended; its output says why")
            done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
            self._fly(member, [(Packed.of(query), 0, None)], names.get(variant, 0), done=done)
            (outcome,) = await done
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        self._shadow = Shadow(score, requests)
        for query, ranked, variant in self._recent:
            self._shadow.feed(query, ranked, variant)
        try:
            return await self._shadow.judged(seconds)
        finally:
            self._shadow = None

    def _flip(self, other: Edition, new: Sequence[Member], about: Ready) -> None:
        """The new workers take over: nothing more goes to the old ones."""
        old = [m for m in self._members.values() if m.edition is self.edition]
        for member in old:
            if member.state == "serving":
                self.scheduler.pause(member.name)
        self.scheduler.adopt(other.policy)
        self.edition, self._about = other, about
        self._recent.clear()
        for member in new:
            self._join(member)
        for member in old:
            idle = not member.flights
            if member.state == "serving":
                member.state = "leaving"
            if idle:
                self._do(self._bury(member, patient=True))
        self._fill()


def _curve(samples: Sequence[tuple[int, int, float]]) -> Curve:
    curve = Curve.fit(samples)
    ratios = [ms / curve.ms(requests, items) for requests, items, ms in samples]
    return dataclasses.replace(curve, safety=max(1.0, float(np.quantile(ratios, TAIL))))


def _joined(parts: Sequence[Ranked], k: int) -> Ranked:
    """The parts of one answer, in the order of their candidates; the best ``k`` of them where so many were asked for."""
    if len(parts) == 1:
        return parts[0]
    whole = Ranked(np.concatenate([p.items for p in parts]), np.concatenate([p.scores for p in parts]))
    return whole.top(k) if k else whole
