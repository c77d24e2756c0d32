"""Times are compared in turns, and a busy machine is seen."""

import gc
import os
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pennyweight.core import measure
from pennyweight.core.errors import DeviceError
from pennyweight.core.measure import Foreign, Latency, foreign_cpu, interleaved, latency, over, peak_memory, quiet


class Clock:
    """A clock that only the measured calls move, so that a measured time is exact."""

    def __init__(self) -> None:
        self.ns = 0

    def taking(self, ms: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.ns += round(ms() * 1e6)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    fake = types.SimpleNamespace(
        perf_counter=lambda: made.ns / 1e9,
        perf_counter_ns=lambda: made.ns,
        monotonic=lambda: made.ns / 1e9,
        sleep=lambda s: setattr(made, "ns", made.ns + round(s * 1e9)),
    )
    monkeypatch.setattr(measure, "time", fake)
    return made


def test_percentiles(clock: Clock) -> None:
    turns = iter([0.0] * 10 + [float(k) for k in range(1, 102)])
    taken = latency(clock.taking(lambda: next(turns)), rounds=101, warmup=10)
    assert (taken.p50_ms, taken.p99_ms, taken.best_ms, taken.n) == (51.0, 100.0, 1.0, 101)
    assert taken.low < taken.p99_ms <= taken.high == 101.0
    assert (taken.ratio, taken.ratio_low, taken.ratio_high) == (1.0, 1.0, 1.0)


def test_a_ratio_survives_a_machine_that_slows_down(clock: Clock) -> None:
    """Ten times slower half-way: medians of separate runs would say anything, the rounds say 3."""
    pace = lambda: 1.0 if clock.ns < 400e6 else 10.0  # noqa: E731
    first, second = interleaved([clock.taking(pace), clock.taking(lambda: 3 * pace())], rounds=200, warmup=0)
    assert first.ratio == 1.0
    assert second.ratio == pytest.approx(3.0)
    assert second.ratio_low == pytest.approx(3.0) and second.ratio_high == pytest.approx(3.0)


def test_the_same_seed_gives_the_same_interval(clock: Clock) -> None:
    def taken(seed: int) -> Latency:
        rng = np.random.default_rng(3)
        return latency(clock.taking(lambda: rng.exponential()), rounds=300, seed=seed)

    assert taken(0) == taken(0)
    assert taken(0) != taken(1)


def test_calls_take_turns_and_each_begins_a_round(clock: Clock) -> None:
    order: list[str] = []
    interleaved([lambda n=n: order.append(n) for n in "abc"], rounds=3, warmup=1)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_seconds_end_the_rounds_but_three_are_done(clock: Clock) -> None:
    assert latency(clock.taking(lambda: 100.0), rounds=1000, warmup=0, seconds=1.0).n == 10
    assert latency(clock.taking(lambda: 5000.0), rounds=1000, warmup=10, seconds=1.0).n == 3


def test_the_collector_is_off_only_while_timing() -> None:
    seen = []
    latency(lambda: seen.append(gc.isenabled()), rounds=3, warmup=0)
    assert seen == [False] * 3
    with pytest.raises(ZeroDivisionError):
        latency(lambda: 1 // 0, warmup=0)
    assert gc.isenabled()


def test_over_goes_round() -> None:
    seen: list[int] = []
    call = over(seen.append, [1, 2, 3])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_foreign_is_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.psutil, "cpu_count", lambda: 2)
    readings: Iterator[tuple[float, float, float]] = iter([(0.0, 100.0, 10.0), (10.0, 115.0, 19.0)])
    monkeypatch.setattr(measure, "_clocks", lambda: next(readings))
    with Foreign() as foreign:
        pass
    assert foreign.share == pytest.approx((15 - 9) / (10 * 2))


def test_our_own_work_is_counted_as_ours() -> None:
    before = measure._clocks()
    while measure._clocks()[2] - before[2] < 0.05:
        sum(range(10_000))
    after = measure._clocks()
    assert after[1] - before[1] >= 0, "the machine's busy time does not run backwards"
    assert 0 <= foreign_cpu(0.05) <= 1


def test_quiet_waits_and_then_refuses(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.4, 0.1])

    def foreign(seconds: float) -> float:
        clock.ns += round(seconds * 1e9)
        return next(shares)

    monkeypatch.setattr(measure, "foreign_cpu", foreign)
    assert quiet(wait_s=10) == 0.1
    shares = iter([0.5] * 100)
    with pytest.raises(DeviceError, match=r"50% of the processor and 15% is allowed.*waited 3 s"):
        quiet(wait_s=3)


def test_peak_memory_is_that_of_the_call() -> None:
    taken = peak_memory(np.ones, 50_000_000 // 8)
    assert 49_000_000 <= taken.added < 70_000_000, "of 50 MB, pages that were there before are used first"


def test_errors_of_the_child_come_back() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        peak_memory(int, "three")
    with pytest.raises(DeviceError, match="_exit was killed"):
        peak_memory(os._exit, 9)
