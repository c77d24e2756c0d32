"""Traces through the scheduler that is shipped: nothing lost, near what a fluid could do, the same every time."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError
from pennyweight.data.requests import Arrivals, Load
from pennyweight.model.bundle import Policy, Priority, Tenant, Variant
from pennyweight.schedule.simulate import FATES, Fault, Fleet, Point, Replay, capacity, enough, fluid, simulate, sweep

DEVICE = Policy(batch=16, queue=5000, deadline_ms=200.0, variants=(Variant("one", costs={"cpu": Curve(40.0, 2.0, 0.0)}),))
THREE = Policy(
    batch=16,
    queue=5000,
    deadline_ms=25.0,
    variants=(
        Variant("full", costs={"cpu": Curve(0.12, 0.0, 0.0154)}),
        Variant("mid", gap=0.005, costs={"cpu": Curve(0.12, 0.0, 0.005)}),
        Variant("small", gap=0.03, costs={"cpu": Curve(0.12, 0.0, 0.0012)}),
    ),
)
TWO = Fleet(workers=2, noise=0.05)


def offered(policy: Policy, times: float, seconds: float, workers: int = 2, **load: object) -> Arrivals:
    """A trace of so many times the capacity of the best variant."""
    probe = Load(rate=100.0, seconds=20.0, **{k: v for k, v in load.items() if k in ("sizes", "items")}).draw()  # type: ignore[arg-type]
    curves = [v.costs["cpu"] for v in policy.variants]
    rate = times * capacity(policy, curves, probe, workers)
    return dataclasses.replace(Load(seed=3), rate=rate, seconds=seconds, **load).draw()  # type: ignore[arg-type]


def fates(replay: Replay) -> dict[str, int]:
    return {"answered": int((replay.fate == 0).sum()), **replay.sheds}


@pytest.mark.parametrize(("times", "least"), [(2, 0.97), (4, 0.92), (10, 0.90)])
def test_under_overload_the_devices_keep_doing_work_that_is_in_time(times: float, least: float) -> None:
    replay = simulate(DEVICE, offered(DEVICE, times, 6.0, sizes="fixed"), TWO)
    assert replay.work_over_capacity >= least
    assert replay.percentile(99) <= 200.0
    assert sum(fates(replay).values()) == len(replay.trace) and "lost" not in fates(replay)


@pytest.mark.parametrize(("times", "least"), [(2, 0.99), (4, 0.99), (10, 0.95)])
def test_with_variants_nearly_all_are_in_time_and_quality_is_near_the_fluid_optimum(times: float, least: float) -> None:
    replay = simulate(THREE, offered(THREE, times, 1.5), TWO)
    assert replay.on_time >= least
    assert replay.quality_gap <= 0.015
    assert replay.mix["full"] < 0.5 and sum(replay.mix.values()) == pytest.approx(1)


def test_a_light_load_gets_the_best_model() -> None:
    replay = simulate(THREE, offered(THREE, 0.3, 3.0), TWO)
    assert replay.on_time == 1 and replay.mix["full"] > 0.95


def test_a_pulse_is_shed_from_below() -> None:
    classes = (Priority("page", share=0.9), Priority("feed", share=0.8), Priority("mail", share=0.7))
    policy = dataclasses.replace(THREE, deadline_ms=50.0, variants=THREE.variants[:1], classes=classes)
    trace = offered(policy, 0.6, 4.0, pulse=10.0, pulse_s=1.0, classes={"page": 0.1, "feed": 0.3, "mail": 0.6})
    replay = simulate(policy, trace, TWO)
    within = (trace.at >= 1.5) & (trace.at < 2.5)
    assert replay.in_time[within & (trace.priority == 0)].mean() >= 0.999
    assert replay.in_time[within & (trace.priority == 2)].mean() < 0.2
    assert replay.between(2.6, 4.0) >= 0.98
    assert replay.by("priority")["page"] >= 0.999


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_killed_workers_lose_nothing_and_nobody_is_answered_twice(load: float) -> None:
    policy = dataclasses.replace(THREE, deadline_ms=200.0, variants=THREE.variants[:1])
    faults = tuple(Fault(0.3 + 0.25 * k, "kill", k % 4, 0.2) for k in range(8))
    replay = simulate(policy, offered(policy, load, 3.0, workers=4), Fleet(workers=4, noise=0.05, faults=faults))
    assert (replay.answers <= 1).all() and set(fates(replay)) <= {"answered", "late"}
    assert replay.on_time > 0.97


def test_a_slow_worker_is_hedged() -> None:
    policy = dataclasses.replace(THREE, deadline_ms=100.0, variants=THREE.variants[:1])
    load = offered(policy, 0.4, 4.0, workers=4).load
    assert load is not None
    slow = Fleet(workers=4, noise=0.05, residuals=(*[1.0] * 60, 25.0))
    ratios = []
    for seed in range(5):
        trace = dataclasses.replace(load, seed=seed).draw()
        alone = simulate(policy, trace, slow, seed=seed)
        hedged = simulate(dataclasses.replace(policy, hedge=0.05), trace, slow, seed=seed)
        ratios.append(hedged.percentile(99) / alone.percentile(99))
        assert 0 < hedged.hedged_s <= 0.06 * hedged.busy_s and (hedged.answers <= 1).all()
    assert sorted(ratios)[2] < 0.75


def test_a_paused_worker_is_done_without() -> None:
    policy = dataclasses.replace(THREE, deadline_ms=200.0, variants=THREE.variants[:1])
    faults = tuple(Fault(0.5 + 0.5 * k, "pause", k, 0.4) for k in range(4))
    replay = simulate(policy, offered(policy, 0.6, 3.0, workers=4), Fleet(workers=4, noise=0.05, faults=faults))
    assert replay.on_time == 1


def test_a_slowed_worker_is_learned() -> None:
    policy = dataclasses.replace(THREE, deadline_ms=100.0)
    replay = simulate(
        policy, offered(policy, 0.8, 3.0), dataclasses.replace(TWO, faults=(Fault(0.5, "slow_down", 0, 2.0, 4.0),))
    )
    assert replay.on_time > 0.99 and replay.mix["mid"] > 0


def test_a_tenant_beyond_its_quota_costs_the_others_little() -> None:
    policy = dataclasses.replace(THREE, deadline_ms=50.0, variants=THREE.variants[:1])
    limited = dataclasses.replace(policy, tenants=(Tenant("greedy", 200.0, 0.2), Tenant("*", 2000.0)))
    trace = offered(policy, 1.6, 3.0, tenants={"a": 0.3, "b": 0.3, "greedy": 1.0})
    replay = simulate(limited, trace, TWO).by("tenant")
    assert min(replay["a"], replay["b"]) > 0.99 and replay["greedy"] < 0.4
    without = simulate(policy, trace, TWO).by("tenant")
    assert max(without["a"], without["b"]) < 0.9


def test_unequal_machines() -> None:
    policy = Policy(deadline_ms=1e5, queue=10**6, variants=(Variant("v", costs={"cpu": Curve(0.5, 0.0, 0.066)}),))
    fleets = [Fleet(workers=1, noise=0.05, speeds=(3.0 if k < 2 else 1.0,)) for k in range(8)]
    trace = offered(policy, 0.85 * (6 + 2 / 3), 6.0, workers=1)
    p99 = {rule: simulate(policy, trace, fleets, rule=rule).percentile(99) for rule in ("oracle", "hot-cold", "power-of-two")}  # type: ignore[arg-type]
    assert p99["hot-cold"] <= 1.3 * p99["oracle"] < p99["power-of-two"] / 1.5


def test_the_same_twice() -> None:
    trace = offered(THREE, 1.5, 0.5, kind="bursts")
    one, two, other = (simulate(THREE, trace, TWO, seed=seed) for seed in (1, 1, 2))
    assert (one.latency == two.latency).all() and (one.latency != other.latency).any()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["poisson", "gamma", "bursts", "diurnal"]),
    st.floats(0.2, 12.0),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0.0, 0.3), st.sampled_from(["kill", "slow_down", "pause"]), st.integers(0, 3)), max_size=5),
    st.integers(0, 5),
)
def test_nothing_is_lost_whatever_happens(kind: str, times: float, workers: int, what: list, seed: int) -> None:  # type: ignore[type-arg]
    faults = tuple(Fault(at, do, worker % workers, 0.1) for at, do, worker in what)
    trace = offered(THREE, times, 0.25, workers, kind=kind, seed=seed)
    replay = simulate(
        dataclasses.replace(THREE, hedge=0.05), trace, Fleet(workers=workers, noise=0.3, faults=faults), seed=seed
    )
    assert "lost" not in fates(replay) and (replay.answers == (replay.fate == 0)).all()
    assert (np.isfinite(replay.latency) == (replay.fate == 0)).all()


# -- figures -------------------------------------------------------------------------------------------------------------


def test_capacity_and_the_fluid_optimum() -> None:
    trace = Load(rate=888.0, seconds=10.0, sizes="fixed").draw()
    curves = [Curve(40.0, 2.0, 0.0)]
    assert capacity(DEVICE, curves, trace, 2) == pytest.approx(2 * 16 / 0.072)
    assert fluid(DEVICE, curves, trace, 2) == pytest.approx(444.4 / (len(trace) / 10), rel=1e-3)


def test_with_one_size_the_fluid_mixes_two_variants() -> None:
    fixed = Load(rate=1000.0, seconds=10.0, sizes="fixed", items=100).draw()
    rate = len(fixed) / 10
    policy = Policy(
        variants=(
            Variant("a", costs={"cpu": Curve(0.0, 0.0, 2000 / rate / 100)}),
            Variant("b", gap=0.1, costs={"cpu": Curve(0.0, 0.0, 500 / rate / 100)}),
        )
    )
    curves = [v.costs["cpu"] for v in policy.variants]
    assert fluid(policy, curves, fixed, 1) == pytest.approx(1 / 3 + 2 / 3 * 0.9), "2 x + .5 (1 - x) = 1"


def test_reports_by_size_class_and_items() -> None:
    policy = dataclasses.replace(THREE, variants=THREE.variants[:1], classes=(Priority("page"), Priority("mail", share=0.2)))
    replay = simulate(policy, offered(policy, 1.5, 2.0, classes={"page": 0.5, "mail": 0.5}), TWO)
    assert replay.on_time_items < replay.on_time, "admission likes small requests, and this says so"
    assert replay.by_size()[0] > replay.by_size()[3]
    assert replay.by("priority")["page"] > replay.by("priority")["mail"]
    assert set(replay.sheds) <= set(FATES) and replay.percentile(99, answered=False) == math.inf


def test_how_many_workers() -> None:
    points = sweep(THREE, offered(THREE, 1.0, 1.0), range(1, 5), TWO)
    found = enough(points, p99_ms=10.0, on_time=0.99)
    assert found is not None and 1 <= found.workers <= 3
    assert enough(points, p99_ms=0.01, on_time=0.99) is None
    bumpy = [dataclasses.replace(points[0], workers=n, on_time=share) for n, share in ((1, 1.0), (2, 0.5), (3, 1.0))]
    assert enough(bumpy, math.inf, 0.99) == bumpy[2], "one that meets it among those that do not was luck"
    assert isinstance(points[0], Point) and points[0].busy > points[3].busy


@pytest.mark.parametrize(
    ("policy", "fleet", "said"),
    [
        (Policy(), TWO, "nothing says what the model takes on 'cpu'"),
        (THREE, Fleet(device="cuda"), "nothing says what 'full', 'mid', 'small' takes on 'cuda'"),
        (THREE, Fleet(workers=0), "a fleet of 0 workers"),
        (THREE, Fleet(workers=1, faults=(Fault(0.0, "kill", 1),)), r"faults at \[1\]"),
    ],
)
def test_bad_input(policy: Policy, fleet: Fleet, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(policy, Load(seconds=0.1).draw(), fleet)


def test_a_class_the_policy_does_not_know() -> None:
    with pytest.raises(ConfigError, match="the trace has class 'x'; the policy knows no classes"):
        simulate(THREE, Load(seconds=0.1, classes={"x": 1.0}).draw(), TWO)
