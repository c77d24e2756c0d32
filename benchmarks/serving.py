"""Does every request get its answer in time, or a refusal at once? Live over a socket, simulated, or pure computation.

Rows whose note begins with "simulated" replay seeded traces through the scheduler that is shipped, on modelled workers: two
unless the note says otherwise, forwards' times with 5 % of noise, three seeds. ``CPU`` is the measured profile of a DLRM in
three sizes on one thread of a processor (15.4, 5 and 1.2 µs an item); its gaps are examples. ``DEVICE`` has the 40 ms and
2 ms a request that servers were compared on. Rows without ``sim/`` are measured live (``benchmarks/live``), but for
``nodes`` and those whose note says pure computation.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import harness, live
from benchmarks.harness import Options, Row
from benchmarks.live import seeds, spread
from pennyweight.core.curve import Curve
from pennyweight.data.requests import Arrivals, Load
from pennyweight.model.bundle import Policy, Priority, Tenant, Variant
from pennyweight.schedule.jobs import lower_bound, makespan
from pennyweight.schedule.scheduler import Batch, Scheduler
from pennyweight.schedule.simulate import Fleet, Replay, capacity, simulate

CPU = Policy(
    batch=16,
    queue=10_000,
    deadline_ms=25.0,
    variants=(
        Variant("full", costs={"cpu": Curve(0.12, 0.0, 0.0154)}),
        Variant("mid", gap=0.005, costs={"cpu": Curve(0.12, 0.0, 0.005)}),
        Variant("small", gap=0.03, costs={"cpu": Curve(0.12, 0.0, 0.0012)}),
    ),
)
ONE = dataclasses.replace(CPU, variants=CPU.variants[:1], deadline_ms=50.0)
DEVICE = Policy(batch=16, queue=10_000, deadline_ms=200.0, variants=(Variant("one", costs={"cpu": Curve(40.0, 2.0, 0.0)}),))
FLEET = Fleet(workers=2, noise=0.05)
UNEQUAL = [Fleet(workers=1, noise=0.05, speeds=(3.0 if k < 2 else 1.0,)) for k in range(8)]


def offered(policy: Policy, times: float, seconds: float, seed: int, workers: float = 2, **load: object) -> Arrivals:
    """A trace of so many times the capacity of the best variant."""
    sizes = {k: v for k, v in load.items() if k in ("sizes", "items")}
    probe = Load(rate=200.0, seconds=50.0, **sizes).draw()  # type: ignore[arg-type]
    rate = times * capacity(policy, [v.costs["cpu"] for v in policy.variants], probe, 1) * workers
    return Load(rate=rate, seconds=seconds, seed=seed, **load).draw()  # type: ignore[arg-type]


def told(replays: Sequence[Replay]) -> str:
    """What a share on time hides."""
    quartiles = np.mean([r.by_size() for r in replays], 0)
    mix = {name: np.mean([r.mix[name] for r in replays]) for name in replays[0].mix}
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mix.items())
    every, items = np.mean([r.on_time for r in replays]), np.mean([r.on_time_items for r in replays])
    sizes, p99 = " / ".join(f"{q:.1%}" for q in quartiles), max(r.percentile(99) for r in replays)
    shares = f"answered by {shares}; p99 {p99:.3g} ms"
    return f"on time {every:.2%}, weighted by items {items:.2%}, by quartile of size {sizes}; {shares}"


def overload(times: float, bar: float) -> Callable[[Options], Row]:
    """One variant, more requests than it can do: on-time work over the device's capacity."""

    def measure(options: Options) -> Row:
        seconds = 2.0 if options.quick else 20.0
        replays = [simulate(DEVICE, offered(DEVICE, times, seconds, s, sizes="fixed"), FLEET, seed=s) for s in seeds(options)]
        note = f"simulated: 40 ms + 2 ms a request, SLO 200 ms, Poisson, {replays[0].capacity:.0f} requests a second at most"
        return spread(f"sim/overload/{times:g}x", "work_over_capacity", [r.work_over_capacity for r in replays], note, bar)

    return measure


def variants(times: float, on_time: float, gap: float | None, kind: str = "poisson") -> Callable[[Options], Sequence[Row]]:
    """Three variants, more requests than the best can do."""
    id = f"sim/{'variants' if kind == 'poisson' else kind}/{times:g}x"

    def measure(options: Options) -> Sequence[Row]:
        seconds = 1.0 if options.quick else 8.0
        replays = [simulate(CPU, offered(CPU, times, seconds, s, kind=kind), FLEET, seed=s) for s in seeds(options)]
        note = f"simulated: CPU profile, heavy sizes, SLO 25 ms, {kind}; {told(replays)}"
        ours, best = np.mean([r.quality for r in replays]), np.mean([r.fluid for r in replays])
        against = f"simulated: effective quality {ours:.4f}, {best:.4f} of a fluid that knows the mean rate and every size"
        return (
            spread(id, "on_time", [r.on_time for r in replays], note, on_time if kind == "poisson" else None),
            spread(id, "quality_gap", [r.quality_gap for r in replays], against, gap, most=True),
        )

    return measure


def pulse(options: Options) -> Sequence[Row]:
    """Ten times the load for five seconds: what the top class sees, and the time until all is well again."""
    classes = (Priority("page", share=0.9), Priority("feed", share=0.8), Priority("mail", share=0.7))
    policy = dataclasses.replace(ONE, classes=classes)
    length, shares = (1.0, 4.0) if options.quick else (5.0, 20.0), {"page": 0.1, "feed": 0.3, "mail": 0.6}
    top, after = [], []
    for s in seeds(options):
        trace = offered(policy, 0.6, length[1], s, pulse=10.0, pulse_s=length[0], classes=shares)
        replay = simulate(policy, trace, FLEET, seed=s)
        start, stop = (length[1] - length[0]) / 2, (length[1] + length[0]) / 2
        within = (trace.at >= start) & (trace.at < stop) & (trace.priority == 0)
        top.append(float(replay.in_time[within].mean()))
        after.append(replay.between(stop + 2 * policy.deadline_ms / 1000, length[1]))
    note = f"simulated: one variant, SLO 50 ms, load .6, and 6 for {length[0]:g} s; a tenth is of the top class"
    return (
        spread("sim/pulse", "top_class_on_time", top, note, 0.999),
        spread("sim/pulse", "on_time_after", after, "simulated: all classes, from 2 SLO after the pulse on", 0.99),
    )


def nodes(options: Options) -> Row:
    """Eight machines, two at a third of the speed, load .9: p99 over that of knowing everything."""
    policy = Policy(deadline_ms=1e6, queue=10**6, variants=(Variant("v", costs={"cpu": Curve(0.5, 0.0, 0.066)}),))
    found: dict[str, list[float]] = {"hot-cold": [], "power-of-two": [], "round-robin": []}
    for s in seeds(options):
        trace = offered(policy, 0.9, 4.0 if options.quick else 60.0, s, workers=6 + 2 / 3)
        best = simulate(policy, trace, UNEQUAL, rule="oracle", seed=s).percentile(99)
        for rule, ratios in found.items():
            ratios.append(simulate(policy, trace, UNEQUAL, rule=rule, seed=s).percentile(99) / best)  # type: ignore[arg-type]
    others = ", ".join(f"{rule} {statistics.median(ratios):.3g}" for rule, ratios in found.items() if rule != "hot-cold")
    note = f"simulated: one worker a machine, heavy sizes, probes 0.5 ms old; over the oracle's p99: {others}"
    return spread("nodes", "p99_over_oracle", found["hot-cold"], note, 1.3, most=True)


def tenants(options: Options) -> Row:
    """A tenant at ten times its quota: points of on-time that the others lose against it keeping to it."""
    quota = 0.1 * 1000 * FLEET.workers
    policy = dataclasses.replace(ONE, tenants=(Tenant("greedy", quota, burst_s=0.2), Tenant("*", 1000.0 * FLEET.workers)))
    own, lost = {"a": 0.2, "b": 0.2, "c": 0.2}, []
    for s in seeds(options):
        kept = {}
        for share in (0.1, 1.0):
            trace = offered(policy, 0.6 + share, 2.0 if options.quick else 20.0, s, tenants={**own, "greedy": share})
            replay = simulate(policy, trace, FLEET, seed=s)
            others = trace.tenant != trace.tenants.index("greedy")
            kept[share] = float(replay.in_time[others].mean())
        lost.append(100 * (kept[0.1] - kept[1.0]))
    note = "simulated: one variant, SLO 50 ms; three tenants ask for a fifth of the capacity each, the fourth may have a tenth"
    return spread("sim/tenants", "points_lost", lost, note, 0.5, most=True)


def decision(options: Options) -> Sequence[Row]:
    """Time of one decision with 1,000 requests queued: letting one in, or choosing what a worker does next."""
    classes, tenants = (Priority("page"), Priority("feed"), Priority("mail")), (Tenant("*", quota=1e9),)
    rounds, rows = 500 if options.quick else 20_000, []
    for id, policy, what in (
        ("decision", CPU, "3 variants, nothing joined"),
        ("decision/joined", DEVICE, "16 joined in a forward"),
    ):
        tails, rates = [], []
        for s in seeds(options):
            busy = dataclasses.replace(policy, deadline_ms=6e6, classes=classes, tenants=tenants)
            times = np.array(decisions(busy, 8, 1000, rounds, s))
            tails.append(float(1e6 * np.percentile(times, 99)))
            rates.append(len(times) / times.sum())
        note = f"pure computation: 8 workers, 3 classes, quotas, {what}; `offer` and `dispatch` each, learning apart"
        rows.append(spread(id, "p99_us", tails, note, 50.0, most=True))
        rows.append(spread(id, "per_second", rates, "pure computation: the same decisions in one process", 20_000.0))
    return rows


def decisions(policy: Policy, workers: int, queued: int, rounds: int, seed: int) -> list[float]:
    """Seconds of each decision, a worker being freed and a request coming in turns."""
    now, draw, clock = [0.0], random.Random(seed), time.perf_counter
    scheduler = Scheduler(policy, lambda: now[0])
    for k in range(workers):
        scheduler.join(str(k))
    names, times, running = [c.name for c in policy.classes], list[float](), list[Batch]()
    for _ in range(queued):
        scheduler.offer(None, draw.randint(1, 500), priority=draw.choice(names), tenant="t")
    while len(times) < rounds:
        while len(scheduler.queue) < queued:
            items, name = draw.randint(1, 500), draw.choice(names)
            start = clock()
            scheduler.offer(None, items, priority=name, tenant="t")
            times.append(clock() - start)
        if running:
            scheduler.done(running.pop(0), 0.001)
            now[0] += 1e-5
        start = clock()
        running += scheduler.dispatch()
        times.append(clock() - start)
        scheduler.learn()
    return times


def jobs(options: Options) -> Sequence[Row]:
    """Jobs on four unequal workers, durations 30 % wrong: the makespan over its lower bound."""
    speeds, ours, dealt = (4.0, 2.0, 1.0, 1.0), [], []
    for seed in range(3 if options.quick else 100):
        rng = np.random.default_rng(seed)
        works = rng.lognormal(0, 0.7, 50)
        bound = lower_bound(works.tolist(), speeds)
        ours.append(makespan(works.tolist(), (works * rng.uniform(0.7, 1.3, 50)).tolist(), speeds) / bound)
        dealt.append(max(works[k::4].sum() / speed for k, speed in enumerate(speeds)) / bound)
    note = (
        f"pure computation: 50 jobs, speeds 4, 2, 1, 1, {len(ours)} draws; dealt round and round {statistics.median(dealt):.2f}"
    )
    mean = float(np.mean(ours))
    return (Row("makespan", "over_lower_bound", mean, min(ours), max(ours), len(ours), bar=1.05, note=note, at_most=True),)


ROWS = {
    **live.ROWS,
    **{f"sim/overload/{times:g}x": overload(times, bar) for times, bar in ((2, 0.97), (4, 0.92), (10, 0.90))},
    **{f"sim/variants/{t:g}x": variants(t, bar, gap) for t, bar, gap in ((2, 0.99, 0.01), (4, 0.99, 0.01), (10, 0.95, None))},
    **{f"sim/bursts/{t:g}x": variants(t, 0.0, 0.03, "bursts") for t in (1, 2)},
    "sim/pulse": pulse,
    "nodes": nodes,
    "sim/tenants": tenants,
    "decision": decision,
    "makespan": jobs,
}

if __name__ == "__main__":
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--venvs", type=Path, help="folder of the peers' environments (benchmarks/peers/setup.sh makes them)")
    given, _ = asked.parse_known_args()
    if given.venvs is not None:
        live.VENVS.append(given.venvs.absolute())
    harness.run("serving", {**ROWS, **live.peers()}, timed=True, parents=[asked])
