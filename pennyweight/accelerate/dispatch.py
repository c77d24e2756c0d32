"""Work to the device that will have finished it first, and large requests in parts where that ends sooner.

Each lane (a variant on a device: a GPU, a core, another engine) has a cost curve T = a + r * requests + b * items that is
learned while serving (``core.curve``). A piece goes where the predicted milliseconds outstanding plus its own are least.
Utilization counters, the usual signal, say how busy a device was, not when it will be free; queue lengths take a request
of ten items for one of two thousand.

A large request is spread over lanes so that all end at once: with more lanes each pays its fixed cost once more, so lanes are
taken in the order in which they could start, as long as one more brings the end forward. It is split only where the
predicted end is sooner by a tenth, since a prediction is off by about that. Parts are joined in order.

``Board`` decides, with a clock handed in and no thread; ``Dispatcher`` runs what it decides, a thread a lane. A device that
fails (lost, out of memory) is left alone for a while and its piece goes to the next best; an input that fails everywhere
is the input's fault, and no device's.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pennyweight.accelerate.runner import Runner
from pennyweight.core.curve import Curve, Learned
from pennyweight.core.errors import ConfigError, DeviceError, PennyweightError
from pennyweight.model.bundle import Bundle
from pennyweight.model.layers import height
from pennyweight.model.spec import Batch

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Work = Callable[[Batch], Floats]

GUESS = Curve(1.0, 0.1, 0.002)
"""What a lane costs before anything is known."""
SOONER = 0.9
"""A split must be predicted to end within this share of the time of the best single lane."""
LEAST = 32
"""Items a part has at least."""
REST_S = 1.0
"""How long a lane that failed is left alone, doubled at each failure in a row."""
REST_MOST_S = 60.0


@dataclasses.dataclass
class Lane:
    """One place that works off its pieces one after the other."""

    name: str
    learned: Learned
    free_ms: float = 0.0
    """When it will have worked off what it was given, on the board's clock, as predicted."""
    waiting_ms: float = 0.0
    """Predicted milliseconds it was given and has not finished."""
    failures: int = 0
    """In a row."""
    down_until_ms: float = 0.0


@dataclasses.dataclass(frozen=True)
class Part:
    """Items ``start`` to ``stop`` of a request, on a lane."""

    lane: str
    start: int
    stop: int
    ms: float
    """Predicted."""


class Board:
    """Who gets what. Nothing here waits or runs: times are milliseconds on ``clock``."""

    def __init__(self, priors: Mapping[str, Curve], clock: Callable[[], float]) -> None:
        if not priors:
            raise ConfigError("a dispatcher needs at least one lane")
        self.lanes = {name: Lane(name, Learned(prior)) for name, prior in priors.items()}
        self.clock = clock

    def live(self, but: Sequence[str] = ()) -> list[Lane]:
        """Lanes that may be given work; all of them where every one is resting, since somebody must try."""
        now = self.clock()
        some = [lane for lane in self.lanes.values() if lane.name not in but]
        return [lane for lane in some if lane.down_until_ms <= now] or some

    def place(self, requests: int, items: int, but: Sequence[str] = ()) -> Part:
        """The whole on the lane that will have finished it first.

        Raises:
            DeviceError: every lane is in ``but``.
        """
        now = self.clock()
        ends = {lane.name: max(now, lane.free_ms) + lane.learned.ms(requests, items) for lane in self.live(but)}
        if not ends:
            raise DeviceError(f"no device is left to run this: {', '.join(but)} failed; see the log for the reasons")
        name = min(ends, key=ends.__getitem__)
        return Part(name, 0, items, self.lanes[name].learned.ms(requests, items))

    def split(self, requests: int, items: int) -> list[Part]:
        """Parts that together end soonest, in the order of their items; one part where splitting does not pay."""
        now, whole = self.clock(), self.place(requests, items)
        alone = max(now, self.lanes[whole.lane].free_ms) + whole.ms - now
        ready = sorted(
            ((max(now, lane.free_ms) - now + lane.learned.ms(requests, 0), lane) for lane in self.live()), key=lambda r: r[0]
        )
        best, end = [whole], SOONER * alone
        for count in range(2, min(len(ready), items // LEAST) + 1):
            sizes, ends = _level([(start, lane.learned.curve.item_ms) for start, lane in ready[:count]], items)
            if min(sizes) >= LEAST and ends < end:
                edges = np.cumsum([0, *sizes]).tolist()
                parts = zip(edges, edges[1:], ready, strict=False)
                best = [Part(r[1].name, a, b, r[1].learned.ms(requests, b - a)) for a, b, r in parts]
                end = ends
        return best

    def give(self, part: Part) -> None:
        """Count a part as outstanding."""
        lane = self.lanes[part.lane]
        lane.free_ms = max(self.clock(), lane.free_ms) + part.ms
        lane.waiting_ms += part.ms

    def done(self, part: Part, requests: int, ms: float) -> None:
        """A part took ``ms`` from when its lane turned to it: learn, and set right when the lane will be free."""
        lane = self._over(part)
        lane.failures = 0
        lane.down_until_ms = 0.0
        lane.learned.observe(requests, part.stop - part.start, ms)

    def failed(self, part: Part, *, device: bool) -> None:
        """A part failed; where it is the device's fault the lane rests."""
        lane = self._over(part)
        if device:
            rest = min(REST_MOST_S, REST_S * 2**lane.failures)
            lane.failures += 1
            lane.down_until_ms = self.clock() + rest * 1e3

    def _over(self, part: Part) -> Lane:
        lane = self.lanes[part.lane]
        lane.waiting_ms = max(0.0, lane.waiting_ms - part.ms)
        lane.free_ms = self.clock() + lane.waiting_ms
        return lane


def _level(lanes: Sequence[tuple[float, float]], items: int) -> tuple[list[int], float]:
    """Items for each lane of (ready at, ms an item) so that all end at once, and when that is."""
    rates = [1 / max(each, 1e-9) for _, each in lanes]
    end = (items + sum(start * rate for (start, _), rate in zip(lanes, rates, strict=True))) / sum(rates)
    exact = [max(0.0, (end - start) * rate) for (start, _), rate in zip(lanes, rates, strict=True)]
    edges = np.rint(np.cumsum([0.0, *exact]) * items / sum(exact)).astype(int)
    sizes = np.diff(edges).tolist()
    return sizes, max(start + n * each for n, (start, each) in zip(sizes, lanes, strict=True))


class Dispatcher:
    """Runs batches on lanes, a thread each; safe to call from several threads.

    Args:
        lanes: a function from a batch to its logits for each name.
        priors: a profile of each where there is one (``core.curve.Curve.fit``).
    """

    def __init__(self, lanes: Mapping[str, Work], priors: Mapping[str, Curve] | None = None) -> None:
        known = priors or {}
        self._lanes = dict(lanes)
        self._lock = threading.Lock()
        self.board = Board({name: known.get(name, GUESS) for name in lanes}, lambda: time.perf_counter() * 1e3)
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"lane-{name}") for name in lanes}

    def score(self, batch: Batch, requests: int = 1) -> Floats:
        """Logits [B] of a batch, wherever and in however many parts that is soonest.

        Raises:
            DeviceError: no device is left that can run it.
        """
        items = height(batch)
        with self._lock:
            parts = self.board.split(requests, items)
            for part in parts:
                self.board.give(part)
        running = [self._threads[p.lane].submit(self._run, p, _rows(batch, p, items), requests) for p in parts]
        outcomes = [self._finished(f, p, _rows(batch, p, items), requests) for f, p in zip(running, parts, strict=True)]
        return outcomes[0] if len(outcomes) == 1 else np.concatenate(outcomes)

    def close(self) -> None:
        """End the threads; what runs is finished."""
        for pool in self._threads.values():
            pool.shutdown()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, part: Part, batch: Batch, requests: int) -> Floats:
        start = time.perf_counter()
        out = self._lanes[part.lane](batch)
        with self._lock:
            self.board.done(part, requests, (time.perf_counter() - start) * 1e3)
        return out

    def _finished(self, running: Future[Floats], part: Part, batch: Batch, requests: int) -> Floats:
        """The part's result, from another lane where its own fails."""
        failed: dict[str, Exception] = {}
        now = part
        while True:
            try:
                out = running.result()
                for name, error in failed.items():  # it ran elsewhere, so the fault is theirs
                    log.warning("lane %s failed and rests: %s: %s", name, type(error).__name__, error)
                    self._blame(name)
                return out
            except Exception as error:
                with self._lock:
                    self.board.failed(now, device=isinstance(error, DeviceError))
                    failed[now.lane] = error
                    if isinstance(error, PennyweightError) and not isinstance(error, DeviceError):
                        raise  # the input is wrong, and would be anywhere
                    if len(failed) == len(self._lanes):
                        if all(isinstance(e, DeviceError) for e in failed.values()):
                            raise DeviceError(f"no device is left to run this: {', '.join(failed)} failed: {error}") from error
                        raise
                    now = self.board.place(requests, part.stop - part.start, tuple(failed))
                    self.board.give(now)
                running = self._threads[now.lane].submit(self._run, now, batch, requests)

    def _blame(self, name: str) -> None:
        with self._lock:
            lane = self.board.lanes[name]
            if lane.down_until_ms <= self.board.clock():
                self.board.failed(Part(name, 0, 0, 0.0), device=True)


def _rows(batch: Batch, part: Part, items: int) -> Batch:
    return batch if part.stop - part.start == items else {n: t[part.start : part.stop] for n, t in batch.items()}


def cores(bundle: Bundle, count: int, allow: Sequence[str] = (), probe: Batch | None = None) -> dict[str, Work]:
    """So many lanes over one bundle, a runner of one thread each: parts of one request on several cores."""
    runtime = dataclasses.replace(bundle.runtime, threads=1)
    made = [Runner(bundle.replace(runtime=runtime), allow, probe=probe, fallback=True) for _ in range(count)]
    return {f"core{k}": runner.score for k, runner in enumerate(made)}
