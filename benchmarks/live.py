"""Rows of ``serving`` that are measured live: the server that is shipped, over a socket, under an open-loop load.

Each row starts ``pennyweight serve`` with two workers on bundles whose forward sleeps for as long as it should take
(``device``), replays a trace against it, and judges what came back as the simulator judges its own. ``calibration`` replays the
same trace in both: where they differ by more than 3 points of requests on time or 15 % of p99, no simulated figure is quoted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.device import Device
from benchmarks.harness import Options, Row
from benchmarks.load import Live, Process, asks, free, hammer, post, replay, run, serve
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.curve import Curve
from pennyweight.data.catalog import Catalog
from pennyweight.data.requests import Arrivals, Load
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle, Policy, Priority, Runtime, Tenant, Variant, save
from pennyweight.model.ranking import DLRM
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.model.transform import Env, plan
from pennyweight.schedule.simulate import Fleet, Replay, capacity, simulate
from pennyweight.serve import binary
from pennyweight.serve.worker import Query, Worker

ITEMS = 2000
WORKERS = 2
ALLOW = ["benchmarks.device"]


def device(fixed_ms: float, request_ms: float, deadline_ms: float, batch: int = 16, **more: Any) -> Policy:
    """A policy over one device where a request has one item."""
    curve = Curve(fixed_ms, request_ms, 0.0)
    return Policy(batch=batch, queue=10_000, deadline_ms=deadline_ms, variants=(Variant("one", costs={"cpu": curve}),), **more)


SLO50 = device(4.0, 0.5, 50.0)
SLO200 = device(40.0, 2.0, 200.0)
THREE = Policy(
    batch=16,
    queue=10_000,
    deadline_ms=250.0,
    variants=(
        Variant("full", costs={"cpu": Curve(1.2, 0.0, 0.154)}),
        Variant("mid", "../mid", gap=0.005, costs={"cpu": Curve(1.2, 0.0, 0.05)}),
        Variant("small", "../small", gap=0.03, costs={"cpu": Curve(1.2, 0.0, 0.012)}),
    ),
)
"""The measured profile of a DLRM in three sizes, ten times slower, so that ten times its capacity can be sent over a socket."""


Made = Callable[[Variant, Catalog], Bundle]


def asleep(variant: Variant, catalog: Catalog) -> Bundle:
    """What takes as long as the variant's curve says."""
    curve = variant.costs["cpu"]
    return _device(catalog, curve.fixed_ms, curve.request_ms + curve.item_ms)


def idle(variant: Variant, catalog: Catalog) -> Bundle:
    """What takes no time."""
    return _device(catalog, 0.0, 0.0)


def _device(catalog: Catalog, fixed_ms: float, row_ms: float) -> Bundle:
    spec = spec_of(Device, inputs=("item",), fixed_ms=fixed_ms, row_ms=row_ms)
    return Bundle(Model.of(build(spec, ALLOW), spec), catalog)


SIZES = {"full": (32, (512, 256, 128)), "mid": (16, (256, 128)), "small": (8, (64,))}
"""Numbers a row and hidden layers of a real model's variants."""


def computed(variant: Variant, catalog: Catalog) -> Bundle:
    """A real network of the variant's size, tables and layers in int8; its weights are random, which takes as long."""
    dim, hidden = SIZES[variant.name]
    spec = spec_of(DLRM, columns=catalog.schema.columns, dim=dim, bottom=(64, dim), hidden=hidden, norm=False)
    torch.manual_seed(0)
    given = Bundle(Model.of(build(spec).eval(), spec), catalog, runtime=Runtime("eager", 1))
    return plan(QuantizeTables(data_type="int8"), QuantizeDense(data_type="int8")).apply(given, Env())


def deployed(variant: Variant, catalog: Catalog) -> Bundle:
    """The same with what depends on the user computed once a request, where that is faster here: as it would be deployed."""
    plain = computed(variant, catalog)
    shared = plain.replace(runtime=Runtime("eager", 1, shared=True))
    return min((plain, shared), key=_joined_s)


def _joined_s(bundle: Bundle) -> float:
    """Seconds of eight requests of the usual size, joined: the least of ten."""
    worker, none = Worker(bundle), np.empty(0, np.int64)
    queries = [Query(None, none, items=worker.ids[k : k + Load().items]) for k in range(8)]

    def once() -> float:
        began = time.perf_counter()
        worker.answer(queries)
        return time.perf_counter() - began

    return min(once() for _ in range(10))


@contextmanager
def served(
    policy: Policy, workers: int = WORKERS, *, made: Made = asleep, known: bool = True, fields: int = 0, **options: Any
) -> Iterator[tuple[Process, Path]]:
    """The service over a bundle a variant; ``known`` tells the service the policy's curves, else it measures its own."""
    told_so = (
        policy
        if known
        else dataclasses.replace(policy, variants=tuple(dataclasses.replace(v, costs={}) for v in policy.variants))
    )
    with laid(told_so, made, fields, policy) as folder, serve(folder, workers, **options) as process:
        yield process, folder


@contextmanager
def laid(policy: Policy, made: Made, fields: int = 0, known: Policy | None = None) -> Iterator[Path]:
    """A folder with a bundle a variant, made by the curves of ``known`` if the policy has none; gone afterwards."""
    catalog = Clicks(sizes=(1000, ITEMS, *[500] * fields)).dataset(50_000).catalog
    with tempfile.TemporaryDirectory(prefix="pennyweight-bench-") as place:
        for variant in (known or policy).variants:
            bundle = made(variant, catalog)
            save(bundle if variant.folder else bundle.replace(policy=policy), Path(place) / variant.name)
        yield Path(place) / policy.variants[0].name


def live(policy: Policy, trace: Arrivals, **options: Any) -> tuple[Live, Replay]:
    """A trace against the service."""
    with served(policy, **options) as (process, _):
        warm(process, policy)
        found: Live = run(replay(process.host, process.port, trace, asks(trace, ITEMS)))
    return found, found.replay(policy, WORKERS)


def warm(process: Process, policy: Policy) -> None:
    """Some requests before those that count."""
    names = dict.fromkeys((c.name for c in policy.classes), 1.0)
    trace = Load(rate=50.0, seconds=0.5, sizes="fixed", items=1, seed=99, classes=names, tenants=_tenants(policy)).draw()
    run(replay(process.host, process.port, trace, asks(trace, ITEMS)))


def _tenants(policy: Policy) -> dict[str, float]:
    return {"warm": 1.0} if policy.tenants else {}


def seeds(options: Options) -> range:
    return range(1, 1 + options.seeds)


def spread(id: str, metric: str, values: Sequence[float], note: str, bar: float | None = None, *, most: bool = False) -> Row:
    """The median and its range."""
    return Row(
        id, metric, statistics.median(values), min(values), max(values), len(values), bar=bar, note=note, at_most=most
    )  # fmt: skip


def told(runs: Sequence[tuple[Live, Replay]]) -> str:
    """What a share on time hides."""
    replays = [r for _, r in runs]
    quartiles = " / ".join(f"{q:.1%}" for q in np.mean([r.by_size() for r in replays], 0))
    items, p99 = np.mean([r.on_time_items for r in replays]), max(r.percentile(99) for r in replays)
    mix = {name: np.mean([r.mix[name] for r in replays]) for name in replays[0].mix}
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mix.items())
    lost, sheds = sum(one.lost for one, _ in runs), np.mean([(one.status == 429).mean() for one, _ in runs])
    return (
        f"weighted by items {items:.2%}, by quartile of size {quartiles}; by {shares}; p99 {p99:.3g} ms; refused {sheds:.1%}, "
        f"lost {lost}"
    )


def single(rate: float, seconds: float, seed: int, **load: Any) -> Arrivals:
    """Requests of one item."""
    return Load(rate=rate, seconds=seconds, sizes="fixed", items=1, seed=seed, **load).draw()


def times(policy: Policy, factor: float, seconds: float, seed: int, **load: Any) -> Arrivals:
    """So many times the capacity of the best variant."""
    probe = Load(rate=200.0, seconds=50.0, **{k: v for k, v in load.items() if k in ("sizes", "items")}).draw()
    most = capacity(policy, [v.costs["cpu"] for v in policy.variants], probe, WORKERS)
    return Load(rate=factor * most, seconds=seconds, seed=seed, **load).draw()


ONE = {"sizes": "fixed", "items": 1}


def slo50(rate: float, bar: float) -> Callable[[Options], Row]:
    def measure(options: Options) -> Row:
        sent = rate / 8 if options.quick else rate
        runs = [live(SLO50, single(sent, 2.0 if options.quick else 15.0, s)) for s in seeds(options)]
        note = f"live: device 4 ms + 0.5 ms a request, two workers, SLO 50 ms, Poisson at {sent:g} a second; {told(runs)}"
        return spread(f"slo50/{rate:g}", "on_time", [r.on_time for _, r in runs], note, bar)

    return measure


def overload(factor: float, bar: float) -> Callable[[Options], Row]:
    def measure(options: Options) -> Row:
        runs = [live(SLO200, times(SLO200, factor, 2.0 if options.quick else 20.0, s, **ONE)) for s in seeds(options)]
        most = runs[0][1].capacity
        note = f"live: device 40 ms + 2 ms a request, SLO 200 ms, Poisson, {most:.0f} requests a second at most; {told(runs)}"
        return spread(f"overload/{factor:g}x", "work_over_capacity", [r.work_over_capacity for _, r in runs], note, bar)

    return measure


def variants(factor: float, on_time: float, gap: float | None) -> Callable[[Options], Sequence[Row]]:
    def measure(options: Options) -> Sequence[Row]:
        runs = [live(THREE, times(THREE, factor, 2.0 if options.quick else 20.0, s)) for s in seeds(options)]
        replays = [r for _, r in runs]
        note = f"live: three variants (154, 50 and 12 us an item), heavy sizes, SLO 250 ms, Poisson; {told(runs)}"
        ours, best = np.mean([r.quality for r in replays]), np.mean([r.fluid for r in replays])
        against = f"live: effective quality {ours:.4f}, {best:.4f} of a fluid that knows the mean rate and every size"
        id = f"variants/{factor:g}x"
        return (
            spread(id, "on_time", [r.on_time for r in replays], note, on_time),
            spread(id, "quality_gap", [r.quality_gap for r in replays], against, gap, most=True),
        )

    return measure


def kills(options: Options) -> Sequence[Row]:
    """Workers killed in mid-load, one after another."""
    count, every = (2, 8.0) if options.quick else (20, 6.0)
    policy = dataclasses.replace(SLO200, batch=16)
    trace = times(policy, 0.7, every * (count + 1), 1, **ONE)
    moments: list[float] = []

    with served(policy, spares=1) as (process, _):
        warm(process, policy)
        draw = random.Random(1)

        async def kill(begin: float) -> None:
            for k in range(1, count + 1):
                await asyncio.sleep(begin + k * every - time.perf_counter())
                there = await asyncio.to_thread(process.workers)
                victim = draw.choice(there[:WORKERS])
                victim.kill()
                moments.append(time.perf_counter() - begin)

        found: Live = run(replay(process.host, process.port, trace, asks(trace, ITEMS), beside=kill))
    done = found.replay(policy, WORKERS)
    accepted = int((found.status != 429).sum())
    slo = policy.deadline_ms / 1000
    ends = [*(moment - slo for moment in moments[1:]), trace.seconds]
    recovery = [_recovery(done, start, stop) for start, stop in zip(moments, ends, strict=True)]
    refused = int((found.status == 429).sum())
    note = (
        f"live: {len(moments)} kills, one every {every:g} s, at 0.7 of the capacity of two workers (40 ms + 2 ms a request, "
        f"SLO 200 ms), a spare; {accepted} accepted, {refused} refused at once, each answered once; on time {done.on_time:.2%}"
    )
    again = (
        "live: the longest time after a kill from which 99 % were on time of those due until one SLO before the next, which "
        f"harms those due later; median {statistics.median(recovery):.2f} s"
    )
    return (
        Row("kills", "lost", found.lost, found.lost, found.lost, bar=0, note=note, at_most=True),
        Row("kills", "recovery_s", max(recovery), min(recovery), max(recovery), bar=1.0, note=again, at_most=True),
    )


def _recovery(done: Replay, start: float, stop: float) -> float:
    """Seconds after ``start`` from which 99 % of the requests due until ``stop`` were on time."""
    within = np.flatnonzero((done.trace.at >= start) & (done.trace.at < stop))
    for step in np.arange(0.0, stop - start, 0.05):
        left = within[done.trace.at[within] >= start + step]
        if len(left) and done.in_time[left].mean() >= 0.99:
            return float(step)
    return stop - start


def pulse(options: Options) -> Sequence[Row]:
    """Ten times the load for five seconds: what the top class sees, the time until all is well, how soon others are told."""
    classes = (Priority("page", share=0.9), Priority("feed", share=0.8), Priority("mail", share=0.7))
    policy = dataclasses.replace(SLO200, classes=classes)
    length, whole = (1.0, 4.0) if options.quick else (5.0, 20.0)
    shares = {"page": 0.1, "feed": 0.3, "mail": 0.6}
    top, after, told_s = [], [], []
    for s in seeds(options):
        trace = times(policy, 0.6, whole, s, pulse=10.0, pulse_s=length, classes=shares, **ONE)
        found, done = live(policy, trace)
        start, stop = (whole - length) / 2, (whole + length) / 2
        within = (trace.at >= start) & (trace.at < stop) & (trace.priority == 0)
        top.append(float(done.in_time[within].mean()))
        after.append(done.between(stop + 2 * policy.deadline_ms / 1000, whole))
        sheds = found.latency[found.status == 429]
        told_s.append(float(1000 * np.percentile(sheds, 99)) if len(sheds) else 0.0)
    note = f"live: 40 ms + 2 ms a request, SLO 200 ms, load 0.6, and 6 for {length:g} s; a tenth is of the top class"
    return (
        spread("pulse", "top_class_on_time", top, note, 0.999),
        spread("pulse", "on_time_after", after, "live: all classes, from 2 SLO after the pulse on", 0.99),
        spread("pulse", "shed_ms", told_s, "live: p99 of refusals, from when the request was due", 5.0, most=True),
    )


def tenants(options: Options) -> Row:
    """A tenant at ten times its quota: points of on-time that the others lose against it keeping to it."""
    share = (
        0.1 * 1000 * WORKERS * (16 * 2.0 / (40.0 + 16 * 2.0))
    )  # a tenth of what two devices do beyond their forwards' own cost
    policy = dataclasses.replace(SLO200, tenants=(Tenant("greedy", share, burst_s=0.2), Tenant("*", 1000.0 * WORKERS)))
    own, lost = {"a": 0.2, "b": 0.2, "c": 0.2}, []
    for s in seeds(options):
        kept = {}
        for part in (0.1, 1.0):
            load = {"tenants": {**own, "greedy": part}, **ONE}
            _, done = live(policy, times(policy, 0.6 + part, 2.0 if options.quick else 20.0, s, **load))
            others = done.trace.tenant != done.trace.tenants.index("greedy")
            kept[part] = float(done.in_time[others].mean())
        lost.append(100 * (kept[0.1] - kept[1.0]))
    note = "live: 40 ms + 2 ms a request, SLO 200 ms; three tenants ask for a fifth of the capacity each, one may have a tenth"
    return spread("tenants", "points_lost", lost, note, 0.5, most=True)


def swap(options: Options) -> Sequence[Row]:
    """A bundle exchanged under load: errors, and the p99 of those who asked meanwhile over those before."""
    seconds, token = (16.0 if options.quick else 40.0), "bench"
    trace = times(SLO200, 0.7, seconds, 1, **ONE)
    spans: list[float] = []
    said: list[bytes] = []
    with served(SLO200, token=token) as (process, _):
        warm(process, SLO200)

        async def exchange(begin: float) -> None:
            await asyncio.sleep(begin + seconds / 4 - time.perf_counter())
            spans.append(time.perf_counter() - begin)
            reader, writer = await asyncio.open_connection(process.host, process.port)
            ask = post("/swap", b'{"tolerance": 0, "seconds": 2}', "application/json", authorization=f"Bearer {token}")
            writer.write(ask)
            said.append(await reader.readuntil(b"\r\n"))
            spans.append(time.perf_counter() - begin)
            writer.close()

        found: Live = run(replay(process.host, process.port, trace, asks(trace, ITEMS), beside=exchange))
    done = found.replay(SLO200, WORKERS)
    during = (trace.at >= spans[0]) & (trace.at < spans[1] + 1.0)
    errors = int((~np.isin(found.status, (200, 429))).sum()) + (b" 200 " not in said[0])
    before = trace.at < spans[0]
    ratio = _p99(done, during) / _p99(done, before)
    refused = float((found.status[during] == 429).mean()), float((found.status[before] == 429).mean())
    note = (
        f"live: 0.7 of the capacity (40 ms + 2 ms a request, SLO 200 ms); the exchange took {spans[1] - spans[0]:.1f} s; "
        f"refused {refused[0]:.2%} meanwhile, {refused[1]:.2%} before"
    )
    return (
        Row("swap", "errors", errors, errors, errors, bar=0, note=note, at_most=True),
        Row("swap", "p99_ratio", ratio, ratio, ratio, bar=1.2, note="live: meanwhile over before", at_most=True),
    )


def _p99(done: Replay, which: Any) -> float:
    times = done.latency[which & np.isfinite(done.latency)]
    return float(np.percentile(times, 99))


BARE = """
import asyncio, socket, sys, uvicorn, uvloop
BODY = b"x" * 96
async def app(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"96")]})
    await send({"type": "http.response.body", "body": BODY})
async def main():
    listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(100)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", ws="none")
    await uvicorn.Server(config).serve(sockets=[listener])
uvloop.run(main())
"""
"""What an answer costs that asks nobody: the floor of Uvicorn."""


def noop(options: Options) -> Sequence[Row]:
    """Answers a second where the model does nothing, 32 connections, beside a bare ASGI answer in the same run."""
    seconds = 1.0 if options.quick else 8.0
    ask = post("/score", binary.ask([1]))
    policy = device(0.3, 0.05, 1000.0)  # what a batch takes beyond the model; the model itself takes nothing
    rates: dict[str, list[float]] = {"bare": [], "workers": [], "thread": []}
    for _ in seeds(options):
        with Process([sys.executable, "-c", BARE]) as bare:
            rates["bare"].append(run(hammer(bare.host, bare.port, ask, 32, seconds))[0])
        for name, workers in (("workers", WORKERS), ("thread", 0)):
            with served(policy, workers, made=idle) as (process, _):
                run(hammer(process.host, process.port, ask, 32, min(1.0, seconds)))
                rates[name].append(run(hammer(process.host, process.port, ask, 32, seconds))[0])
        for name in installed():
            rates.setdefault(name, []).append(hammered(name, PEERS[name].settings["noop"]["tuned"], seconds))
        if "mosec" in installed():
            rates.setdefault("engine", []).append(scored("mosec", policy, seconds))
    bare_rate, workers, thread = (statistics.median(rates[n]) for n in ("bare", "workers", "thread"))
    best = "workers" if workers >= thread else "thread"
    note = (
        f"live: closed loop, 32 connections, one item, binary; two workers {workers:.0f}, in the front's own process "
        f"{thread:.0f}, a bare ASGI answer of one process {bare_rate:.0f} a second; {psutil.cpu_count()} cores for both sides"
    )

    def over(name: str) -> list[float]:
        return [ours / theirs for ours, theirs in zip(rates[best], rates[name], strict=True)]

    rows = [
        spread("noop", "rate", rates[best], note),
        spread("noop", "rate_over_bare", over("bare"), "live: over a bare ASGI answer of one process", 0.6),
    ]
    if installed():
        rival = max(installed(), key=lambda name: statistics.median(rates[name]))
        said = ", ".join(f"{name} {statistics.median(rates[name]):.0f}" for name in installed())
        rows.append(
            spread("noop", "rate_over_best_peer", over(rival), f"live: over {rival}, each tuned, in the same run: {said}", 1.2)
        )
    if "engine" in rates:
        alike = "live: mosec's workers read the same body, look its item up and score it by the same model that does nothing"
        rows.append(spread("noop", "rate_over_same_engine", over("engine"), alike))
        rows.append(spread("noop/mosec/engine", "rate", rates["engine"], alike))
    return rows


def scored(name: str, policy: Policy, seconds: float) -> float:
    """A peer's answers a second where its workers do what ours do for the same body, and the model does nothing."""
    peer = PEERS[name]
    ask = post(peer.path, binary.ask([1]))
    with laid(policy, idle) as folder, scoring(name, folder, peer.settings["noop"]["tuned"], policy.batch) as process:
        rate: float = run(hammer(process.host, process.port, ask, 32, seconds, FAILING))[0]
        return rate


def calibration(options: Options) -> Sequence[Row]:
    """The same traces live and simulated: points of on-time, and p99, apart.

    For 40 s each: of 15 s of the same trace the live p99 alone differs by a tenth from run to run.
    """
    seconds = 2.0 if options.quick else 40.0
    cases = {
        "slo50/1600": (SLO50, lambda s: single(1600.0, seconds, s)),
        "overload/2x": (SLO200, lambda s: times(SLO200, 2.0, seconds, s, **ONE)),
        "variants/2x": (THREE, lambda s: times(THREE, 2.0, seconds, s)),
    }
    points, tails, notes = [], [], []
    for name, (policy, draw) in cases.items():
        fleet = alone(policy, round(float(draw(7).items.mean())))
        for s in seeds(options):
            trace = draw(s)
            found, done = live(policy, trace)
            guess = simulate(policy, trace, fleet, seed=s)
            points.append(100 * abs(done.on_time - guess.on_time))
            tails.append(abs(guess.percentile(99) / done.percentile(99) - 1))
            notes.append(
                f"{name} live {done.on_time:.2%}, p99 {done.percentile(99):.3g} ms, simulated {guess.on_time:.2%}, "
                f"{guess.percentile(99):.3g} ms (lost {found.lost})"
            )
    note = "live and simulated, the same trace: " + "; ".join(notes)
    return (
        Row("calibration", "points", max(points), min(points), max(points), len(points), bar=3.0, note=note, at_most=True),
        Row("calibration", "p99", max(tails), min(tails), max(tails), len(tails), bar=0.15, note=note, at_most=True),
    )


def alone(policy: Policy, items: int) -> Fleet:
    """The workers as they are where nothing waits, asked for so many items ten times a second.

    What the simulator does not know by itself: what a batch takes on its worker beyond the forward, as the service says of it,
    and an answer beyond that, as its client sees it.
    """
    trace = Load(rate=10.0, seconds=15.0, sizes="fixed", items=items, seed=7).draw()
    with served(policy) as (process, _):
        warm(process, policy)
        before = _batches(process)
        found: Live = run(replay(process.host, process.port, trace, asks(trace, ITEMS)))
        count, seconds = (now - then for now, then in zip(_batches(process), before, strict=True))
    curves = [v.costs["cpu"] for v in policy.variants]
    forward = curves[0].ms(1, items) / 1000
    more = max(0.0, seconds / count - forward)
    way = max(0.0, float(np.median(found.latency[found.status == 200])) - forward - more)
    slower = tuple(dataclasses.replace(c, fixed_ms=c.fixed_ms + 1000 * more) for c in curves)
    return Fleet(workers=WORKERS, curves=slower, noise=0.02, overhead_s=way)


def _batches(process: Process) -> tuple[float, float]:
    """How many batches there were, and their workers' seconds."""
    with urllib.request.urlopen(f"http://{process.host}:{process.port}/metrics") as answer:
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    samples = families["pennyweight_batch_seconds"].samples
    return (
        sum(s.value for s in samples if s.name.endswith("_count")),
        sum(s.value for s in samples if s.name.endswith("_sum")),
    )


# -- peers -----------------------------------------------------------------------------------------------------------------

VENVS: list[Path] = []
"""The folder of the peers' environments, where one was named (``--venvs``)."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A peer as it is run: at its defaults, or as tuned for a row."""

    wait_ms: int = 10
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server that can be installed, and how it is run for each kind of row."""

    path: str
    """Where it takes requests."""
    body: bytes
    settings: Mapping[str, Mapping[str, Setting]]
    """By kind of row, then ``default`` and ``tuned``."""
    told: Callable[[Setting, int], Sequence[str]] = lambda setting, port: [str(port), *setting.options]
    """The end of its command line: a port, and options."""
    kind: str = "application/json"
    ready_s: float = 2.0
    """Its front listens before its workers are there."""


def _alike(default: Setting, tuned: Setting, overload: Setting | None = None) -> dict[str, dict[str, Setting]]:
    return {
        "noop": {"default": default, "tuned": tuned},
        "slo50": {"default": default, "tuned": tuned},
        "overload": {"default": default, "tuned": overload or tuned},
    }


PEERS = {
    "mosec": Peer(
        "/inference", b"1", _alike(Setting(), Setting(2), Setting(2, ("--capacity", "40"))),
        lambda setting, port: ["--address", "127.0.0.1", "--port", str(port), "--timeout", "10000", *setting.options],
        binary.KIND,
    ),
    "litserve": Peer("/predict", b'{"input": 1}', _alike(Setting(10, ("1",)), Setting(2, ("1",))), ready_s=6.0),
    "bento": Peer("/predict", b'{"inputs": [1]}', _alike(Setting(60_000), Setting(50), Setting(200)), ready_s=10.0),
    "rayserve": Peer("/", b"1", _alike(Setting(10, ("5",)), Setting(2, ("64",))), ready_s=2.0),
    "triton": Peer(
        "/v2/models/device/infer", b'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "INT32", "data": [1]}]}',
        _alike(Setting(0, ("0",)), Setting(2, ("0",)), Setting(2, ("120",))), ready_s=5.0,
    ),
}  # fmt: skip
"""mosec's wait is 10 ms unless told otherwise; 2 ms and, under overload, a queue of 40 were the best of what was tried.
LitServe and Ray Serve wait as long as they are told (their own default is to join nothing, with which they answer a tenth of
it); Ray Serve lets 5 requests into a replica unless told otherwise. BentoML's number is the latency it aims at. Triton
joins what waits when a worker is free; told so, it refuses what waited longer than its last number."""


@contextmanager
def beside(name: str, policy: Policy, setting: Setting) -> Iterator[Process]:
    """A peer over the device that the policy's curve says."""
    curve = policy.variants[0].costs["cpu"]
    with started(name, setting, curve.fixed_ms, curve.request_ms, policy.batch) as process:
        yield process


@contextmanager
def started(name: str, setting: Setting, fixed_ms: float, request_ms: float, batch: int, **env: str) -> Iterator[Process]:
    """A peer's script in the peer's environment, with more variables."""
    peer, port = PEERS[name], free()
    what = [fixed_ms, request_ms, WORKERS, batch, setting.wait_ms]
    command = [str(python(name)), "-m", f"benchmarks.peers.{name}", *map(str, what), *peer.told(setting, port)]
    with Process(command, port=port, cwd=Path(__file__).parents[1], env=os.environ | env) as process:
        time.sleep(peer.ready_s)
        yield process


def replayed(name: str, policy: Policy, setting: Setting, trace: Arrivals) -> tuple[Live, Replay]:
    """A trace against a peer."""
    peer = PEERS[name]
    with beside(name, policy, setting) as process:
        ask = [post(peer.path, peer.body, peer.kind)] * len(trace)
        few = single(50.0, 0.5, 99)
        run(replay(process.host, process.port, few, ask[:1] * len(few)))
        found: Live = run(replay(process.host, process.port, trace, ask))
    return found, found.replay(policy, WORKERS, ours=False)


FAILING = 0.5
"""Share of a peer's answers that may be refusals; they count for nothing."""


def hammered(name: str, setting: Setting, seconds: float) -> float:
    """A peer's answers a second where the device does nothing."""
    peer, nothing = PEERS[name], device(0.0001, 0.0, 1000.0)
    with beside(name, nothing, setting) as process:
        ask = post(peer.path, peer.body, peer.kind)
        run(hammer(process.host, process.port, ask, 32, min(1.0, seconds), FAILING))
        rate: float = run(hammer(process.host, process.port, ask, 32, seconds, FAILING))[0]
        return rate


def peer(id: str, name: str, how: str) -> Callable[[Options], Row]:
    """A peer's row beside one of ours: the same device, the same trace, the same judge."""
    family, _, size = id.partition("/")

    def measure(options: Options) -> Row:
        setting = PEERS[name].settings[family][how]
        so = f"{name} {version(name)}, {setting.wait_ms} ms {' '.join(setting.options)}".rstrip()
        seconds = 2.0 if options.quick else 15.0
        if family == "noop":
            rates = [hammered(name, setting, seconds / 2) for _ in seeds(options)]
            return spread(f"{id}/{name}/{how}", "rate", rates, f"live: closed loop, 32 connections; {so}")
        if family == "slo50":
            rate = float(size) / (8 if options.quick else 1)
            runs = [replayed(name, SLO50, setting, single(rate, seconds, s)) for s in seeds(options)]
            note = f"live: as {id}; {so}; {told(runs)}"
            return spread(f"{id}/{name}/{how}", "on_time", [r.on_time for _, r in runs], note)
        factor = float(size.rstrip("x"))
        runs = [replayed(name, SLO200, setting, times(SLO200, factor, seconds, s, **ONE)) for s in seeds(options)]
        note = f"live: as {id}; {so}; {told(runs)}"
        return spread(f"{id}/{name}/{how}", "work_over_capacity", [r.work_over_capacity for _, r in runs], note)

    return measure


def version(name: str) -> str:
    """A peer's, as its environment says."""
    package = {"bento": "bentoml", "rayserve": "ray", "triton": "nvidia-pytriton"}.get(name, name)
    ask = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([str(python(name)), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return VENVS[0] / name / "bin" / "python"


def installed() -> list[str]:
    """The peers there is an environment of."""
    return [name for name in PEERS if VENVS and python(name).exists()]


def peers() -> dict[str, Callable[[Options], Row]]:
    """The peers' rows."""
    ids = ("noop", "slo50/1600", "slo50/2000", "overload/2x", "overload/4x", "overload/10x")
    return {f"{id}/{name}/{how}": peer(id, name, how) for id in ids for name in installed() for how in ("default", "tuned")}


ANY = {"cpu": Curve(0.5, 0.1, 0.01)}
"""Curves for the judge alone, who needs some for the fluid; the service measures its own."""
REAL = dataclasses.replace(
    THREE, deadline_ms=50.0, batch=16, variants=tuple(dataclasses.replace(v, costs=ANY) for v in THREE.variants)
)


def real(kind: str, names: Sequence[str], bar: float) -> Callable[[Options], Sequence[Row]]:
    """The rate that a real model holds at 99 % on time, beside mosec's with the largest of its variants.

    mosec scores the compressed model as its users would (PyTorch, the faster of that and ONNX Runtime here), and, as a
    control, by our engine too, which leaves what the servers differ by.
    """
    id = f"real/{'bursts' if kind == 'bursts' else 'one' if len(names) == 1 else 'three'}"

    def measure(options: Options) -> Sequence[Row]:
        policy = dataclasses.replace(REAL, variants=tuple(v for v in REAL.variants if v.name in names))

        def ours(seed: int) -> tuple[float, str]:
            with served(policy, made=deployed, known=False, fields=FIELDS) as (process, _):
                warm(process, policy)
                return held(process, policy, kind, seed, options.quick)

        found = [ours(s) for s in seeds(options)]
        note = f"live: DLRM of 26 tables in int8, {len(names)} variants, heavy sizes, SLO 50 ms, {kind}; {found[0][1]}"
        rows = [spread(id, "rate", [rate for rate, _ in found], note)]
        if "mosec" not in installed():
            return rows
        tried, tuned = theirs(kind, options.seeds, options.quick)
        said = ", ".join(f"{b} by {w} ms {rate:.0f}" for (b, w), rate in tried.items())
        so = f"live: mosec {version('mosec')}, the largest variant, best of batches of {said} a second"

        def over(others: Sequence[tuple[float, str]]) -> list[float]:
            return [a / b if b else float("inf") for (a, _), (b, _) in zip(found, others, strict=True)]

        rows += [
            spread(id, "rate_over_best_peer", over(tuned), so, bar),
            spread(f"{id}/mosec/tuned", "rate", [rate for rate, _ in tuned], f"{so}; {tuned[0][1]}"),
            spread(f"{id}/mosec/default", "rate", [tried[TUNED[0]]], "live: mosec, batches of 8 and its own 10 ms"),
        ]
        if kind == "poisson":
            _, same = theirs(kind, options.seeds, options.quick, engine=True)
            alike = "live: mosec's workers score by our engine, what depends on the user computed once a request"
            rows.append(spread(id, "rate_over_same_engine", over(same), alike))
            rows.append(spread(f"{id}/mosec/engine", "rate", [rate for rate, _ in same], f"{alike}; {same[0][1]}"))
        return rows

    return measure


@functools.cache
def theirs(
    kind: str, count: int, quick: bool, engine: bool = False
) -> tuple[dict[tuple[int, int], float], list[tuple[float, str]]]:
    """What mosec holds by each setting, and by the best of them for each seed; ``engine`` gives it ours."""
    one = dataclasses.replace(REAL, variants=REAL.variants[:1])

    def at(batch: int, wait: int, seed: int) -> tuple[float, str]:
        with (
            laid(one, deployed if engine else computed, FIELDS) as folder,
            scoring("mosec", folder, Setting(wait), batch) as process,
        ):
            return held(process, one, kind, seed, quick, PEERS["mosec"])

    settings = TUNED[:2] if quick or engine else TUNED
    tried = {(batch, wait): at(batch, wait, 1)[0] for batch, wait in settings}
    best = max(tried, key=lambda k: tried[k])
    return tried, [at(*best, seed) for seed in range(1, 1 + count)]


FIELDS = 24
"""Columns of a real model beside user and item."""
TUNED = ((8, 10), (16, 10), (16, 2), (8, 2), (1, 10))
"""mosec's batch and milliseconds of waiting that are tried; the first is its default."""


def held(process: Process, policy: Policy, kind: str, seed: int, quick: bool, peer: Peer | None = None) -> tuple[float, str]:
    """The largest rate of which 99 % are on time: doubled until it is not, then halved in between, to 9 %; how it was there.

    A rate that is missed is tried once more, so that one hiccup of the machine ends nobody's search.
    """
    best: tuple[float, str] = (0.0, "none was held")

    def well(rate: float) -> bool:
        return once(rate) or once(rate)

    def once(rate: float) -> bool:
        nonlocal best
        trace = Load(kind=kind, rate=rate, seconds=2.0 if quick else 5.0, seed=seed).draw()  # type: ignore[arg-type]
        requests = asks(trace, ITEMS) if peer is None else asks(trace, ITEMS, peer.path)
        found: Live = run(replay(process.host, process.port, trace, requests))
        done = found.replay(policy, WORKERS, ours=peer is None)
        if done.on_time >= 0.99 and rate > best[0]:
            best = rate, told([(found, done)])
        return done.on_time >= 0.99

    rate = 200.0
    while rate < 20_000 and well(rate):
        rate *= 2.0
    low, high = rate / 2, rate
    while high / low > (1.5 if quick else 1.1):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if well(middle) else (low, middle)
    return best


@contextmanager
def scoring(name: str, folder: Path, setting: Setting, batch: int) -> Iterator[Process]:
    """A peer over a real bundle: in its environment, with our packages behind its own."""
    peer = PEERS[name]
    env = {"BENCH_BUNDLE": str(folder), "BENCH_PACKAGES": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    with started(name, setting, 0.0, 0.0, batch, **env) as process:
        time.sleep(2 * peer.ready_s)  # it loads a model
        few = Load(rate=20.0, seconds=1.0, seed=99).draw()
        run(replay(process.host, process.port, few, asks(few, ITEMS, peer.path)))
        yield process


ROWS: dict[str, Callable[[Options], Row | Sequence[Row]]] = {
    "noop": noop,
    "slo50/1600": slo50(1600.0, 0.995),
    "slo50/2000": slo50(2000.0, 0.99),
    **{f"overload/{f:g}x": overload(f, bar) for f, bar in ((2, 0.97), (4, 0.92), (10, 0.90))},
    **{f"variants/{f:g}x": variants(f, bar, gap) for f, bar, gap in ((2, 0.99, 0.01), (4, 0.99, 0.01), (10, 0.95, None))},
    "real/one": real("poisson", ("full",), 1.5),
    "real/three": real("poisson", ("full", "mid", "small"), 4.0),
    "real/bursts": real("bursts", ("full", "mid", "small"), 3.0),
    "kills": kills,
    "pulse": pulse,
    "tenants": tenants,
    "swap": swap,
    "calibration": calibration,
}
