"""Time, memory and quiet: how every number Pennyweight prints about cost is taken.

On a shared machine the same call differs by half from one minute to the next, so two candidates timed one after the other
are not comparable. ``interleaved`` calls them in turns, starting with another one each round, and compares round by round:
what slows the machine slows all of them, and the ratio stays. Percentiles come with a bootstrap interval, since the p99 of
300 calls rests on three of them. The alternative, repeating a block of calls and taking the fastest (``timeit``), answers
another question: what the machine could do, not what a user will wait for.

The cyclic garbage collector is off while a call is timed. Whether other programs were busy is measured, not hoped for:
``Foreign`` says what share of the processor they took.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import psutil

from pennyweight.core.errors import DeviceError

T = TypeVar("T")
Call = Callable[[], object]

LOUD = 0.15
"""Share of the processor used by others above which a benchmark is refused: such a pass once halved every peer."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds, and how it compares with the first of those it was measured with."""

    p50_ms: float
    p99_ms: float
    low: float
    """Lower end of the p99's 95 % bootstrap interval."""
    high: float
    """Its upper end."""
    n: int
    """Calls that were timed."""
    best_ms: float = 0.0
    """The fastest call: what the machine does when it is left alone."""
    ratio: float = 1.0
    """Median over rounds of this call's time / the first call's time."""
    ratio_low: float = 1.0
    """Lower end of the ratio's 95 % bootstrap interval."""
    ratio_high: float = 1.0
    """Its upper end."""


def latency(call: Call, *, rounds: int = 300, warmup: int = 10, seconds: float | None = None, seed: int = 0) -> Latency:
    """Time a call ``rounds`` times after ``warmup`` calls, or fewer when ``seconds`` are over first."""
    return interleaved([call], rounds=rounds, warmup=warmup, seconds=seconds, seed=seed)[0]


def interleaved(
    calls: Sequence[Call], *, rounds: int = 300, warmup: int = 10, seconds: float | None = None, seed: int = 0
) -> list[Latency]:
    """Time several calls in turns, each once a round; ``seconds`` cuts the rounds (warm-up included), at least 3 are done."""
    end = None if seconds is None else time.perf_counter() + seconds
    for call in itertools.chain.from_iterable(itertools.repeat(calls, warmup)):
        call()
        if end is not None and time.perf_counter() > end:
            break
    times = _rounds(calls, rounds, end)
    return [_latency(times[:, k], times[:, 0], seed) for k in range(len(calls))]


def _rounds(calls: Sequence[Call], rounds: int, end: float | None) -> npt.NDArray[np.float64]:
    """Milliseconds [rounds, calls]."""
    times: list[list[float]] = []
    with _collector_off():
        while len(times) < max(3, rounds) and (len(times) < 3 or end is None or time.perf_counter() < end):
            row = [0.0] * len(calls)
            for k in range(len(calls)):
                turn = (k + len(times)) % len(calls)
                start = time.perf_counter_ns()
                calls[turn]()
                row[turn] = (time.perf_counter_ns() - start) / 1e6
            times.append(row)
    return np.asarray(times)


def _latency(times: npt.NDArray[np.float64], first: npt.NDArray[np.float64], seed: int, draws: int = 200) -> Latency:
    again = np.random.default_rng(seed).integers(0, len(times), (draws, len(times)))
    p50, p99 = np.percentile(times, [50, 99])
    low, high = np.percentile(np.percentile(times[again], 99, axis=1), [2.5, 97.5])
    ratios = times / np.maximum(first, 1e-6)
    below, above = np.percentile(np.median(ratios[again], axis=1), [2.5, 97.5])
    interval = {"low": float(low), "high": float(high), "ratio_low": float(below), "ratio_high": float(above)}
    best, ratio = float(times.min()), float(np.median(ratios))
    return Latency(float(p50), float(p99), n=len(times), best_ms=best, ratio=ratio, **interval)


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def over(function: Callable[[T], object], values: Iterable[T]) -> Call:
    """A call that takes the next of ``values`` each time, round and round: a trace of requests to be timed."""
    turns = itertools.cycle(values)
    return lambda: function(next(turns))


class Foreign:
    """In a ``with``: the share (0 to 1) of the whole processor that other processes used, in ``share`` afterwards.

    Children count as this process once it has waited for them. One that ignores what becomes of its own children loses their
    time, which the kernel then adds to nobody's: who knows of it adds it to ``lost_s``.
    """

    share: float = 0.0
    lost_s: ClassVar[float] = 0.0
    """Seconds of processes that are ours and count as nobody's, since this process began."""

    def __enter__(self) -> Foreign:
        self._start = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (after - before for after, before in zip(_clocks(), self._start, strict=True))
        self.share = min(1.0, max(0.0, (busy - own) / max(1e-9, wall * (psutil.cpu_count() or 1))))


def _clocks() -> tuple[float, float, float]:
    """Seconds: of the wall, of the busy processor over all cores, and of this process with its finished children."""
    cpu, own = psutil.cpu_times(), os.times()
    idle = cpu.idle + getattr(cpu, "iowait", 0.0)
    guests = getattr(cpu, "guest", 0.0) + getattr(cpu, "guest_nice", 0.0)  # counted in user and nice already
    return time.monotonic(), sum(cpu) - idle - guests, sum(own[:4]) + Foreign.lost_s


def foreign_cpu(seconds: float = 1.0) -> float:
    """The share of the processor that other processes use, watched for some seconds (clock ticks are 10 ms)."""
    with Foreign() as foreign:
        time.sleep(seconds)
    return foreign.share


def quiet(limit: float = LOUD, wait_s: float = 60.0, window_s: float = 1.0) -> float:
    """Wait for a quiet machine and give the share others use.

    Raises:
        DeviceError: others still use more than ``limit`` when ``wait_s`` are over.
    """
    end = time.monotonic() + wait_s
    while (share := foreign_cpu(window_s)) > limit:
        if time.monotonic() >= end:
            raise DeviceError(
                f"other programs use {share:.0%} of the processor and {limit:.0%} is allowed for a benchmark; "
                f"waited {wait_s:g} s: stop them, or run this when the machine is idle"
            )
    return share


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident memory of a child process around one call, in bytes."""

    before: int
    """After imports, before the call."""
    peak: int
    """The highest during the call."""

    @property
    def added(self) -> int:
        """What the call needed at its highest."""
        return max(0, self.peak - self.before)


def peak_memory(function: Callable[..., object], *args: Any) -> Memory:
    """Peak memory of ``function(*args)`` in a fresh child process, where nothing that was freed before can hide it.

    The function must be importable by name and its arguments must pickle; its own errors are raised here.

    Raises:
        DeviceError: the child was killed, most likely for its memory.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_watched, function, args).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            name = getattr(function, "__qualname__", function)
            raise DeviceError(
                f"the process that ran {name} was killed, most likely for its memory; use smaller input"
            ) from error


def _watched(function: Callable[..., object], args: tuple[Any, ...]) -> Memory:
    before = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # lets the kernel's high-water mark start anew
    function(*args)
    return Memory(before, _high_water())


def _high_water() -> int:
    """The highest resident memory since the mark was cleared; ``getrusage`` would add the parent's at the fork."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
