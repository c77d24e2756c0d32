"""The runtime, chosen by measuring: engines x threads x cuts on a trace of requests.

Thread count is the cheapest speed-up nobody tunes: on two busy cores a second thread made a 0.014 ms lookup take 8 ms, as it
waits at a barrier for a core that somebody else has. No rule predicts this from the machine's description, nor which
engine wins for a shape, so every combination is timed on the user's own requests.

All live candidates are timed in turns on the same request (see ``core.measure``), and after each rung the slower half is
dropped (successive halving, Jamieson and Talwalkar 2016), so the time that is left goes to those that are close. The
alternative, a full grid, gives the hopeless as many calls as the best. What is compared is the geometric mean of p50 and
p99: the tail is what a budget limits, and of a few dozen calls only the middle is certain. Candidates within a few percent of
the best are a tie, and the simplest of them wins: eager before ONNX Runtime before compile, fewer threads, no cut.

Where the settings multiply (engines x precisions x threads x cuts), ``fastest`` measures a fifth of the points instead
(``accelerate.explore``), each in turns with the best so far, so that its time is a ratio and not the hour's weather. What it
found is remembered in the user's cache folder by the machine and the model's shape; what another machine found is not used.

Cost: making an engine takes seconds (ONNX) to a minute (compile); one that would not fit in the time left is not started,
and the trace says so. Whatever fails while it is measured, memory that runs out included, is a point marked in the trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from pennyweight.accelerate import index as index  # its transform is one of this family's
from pennyweight.accelerate.compile import Exported, Maker, Scorer, export, make
from pennyweight.accelerate.explore import SHARE, Measured, Point, explore
from pennyweight.accelerate.runner import Runner
from pennyweight.core import hardware
from pennyweight.core.config import dumps, encode, loads, named, write
from pennyweight.core.errors import ConfigError, DeviceError, PlanError, StorageError
from pennyweight.core.measure import Call, Latency, interleaved, over
from pennyweight.model.bundle import Bucket, Bundle, Engine, Runtime
from pennyweight.model.layers import height
from pennyweight.model.spec import Batch
from pennyweight.model.transform import Env, Transform

log = logging.getLogger(__name__)

ENGINES: tuple[Engine, ...] = get_args(Engine)
"""Simplest first: the order in which ties are decided."""

MAKES_S = {"eager": 0.0, "fused": 2.0, "onnxruntime": 10.0, "openvino": 10.0, "compile": 60.0, "aot": 60.0}
"""Seconds making an engine may take; it is not started with less time left."""

TIE = 1.05
"""Up to this factor of the best is as good as the best."""

HOPELESS = 4.0
"""A fastest call above this factor of the best ends a candidate at once: one can take 100 times the others' time."""

CHOSEN = "chosen"


@named("run")
@dataclasses.dataclass(frozen=True)
class SetRuntime(Transform):
    """Run the model by this engine, with this many threads, in cuts of at most this many rows."""

    engine: Engine = "eager"
    threads: int = 1
    """0 is the engine's own default, which is every core."""
    batch: int = 0
    """0 is no cut."""
    shared: bool = False
    """Compute what depends on the user alone once a request."""
    buckets: tuple[Bucket, ...] = ()
    """Other settings for smaller batches, by rows ascending."""
    machine: str = ""
    """Where this was measured, as ``core.hardware.fingerprint`` names it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What dense arithmetic is done in."""

    family: ClassVar[Literal["accelerate"]] = "accelerate"
    stage: ClassVar[Literal["runtime"]] = "runtime"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine {self.engine!r} is not one of {', '.join(ENGINES)}")
        if self.threads < 0 or self.batch < 0:
            raise ConfigError(f"threads {self.threads} and batch {self.batch} must not be negative; 0 is the default of each")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with this runtime; whether the engine is installed is found by the Runner, on the machine that serves."""
        runtime = Runtime(self.engine, self.threads, self.batch, self.shared, self.buckets, bundle.runtime.index)
        runtime = dataclasses.replace(runtime, precision=self.precision, machine=self.machine)
        return bundle.replace(runtime=dataclasses.replace(runtime, hot_bytes=bundle.runtime.hot_bytes))

    def describe(self) -> str:
        """One plain sentence."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "as many threads as the engine likes"
        parts = [f"run with {self.engine} on {threads}", *([f"{self.batch} rows at a time"] if self.batch else [])]
        parts += [f"{b.engine} up to {b.rows} rows" for b in self.buckets]
        parts += ["in bf16"] if self.precision == "bf16" else []
        return ", ".join([*parts, *(["what candidates share once"] if self.shared else [])])


@dataclasses.dataclass(frozen=True)
class Timing:
    """One candidate of ``tune`` and what came of it."""

    runtime: Runtime
    latency: Latency | None
    """None where it was not timed."""
    note: str = ""
    """Why it was dropped or never timed; ``chosen`` for the one that was, empty for what it was chosen over at the end."""


def tune(
    bundle: Bundle,
    batches: Sequence[Batch],
    *,
    seconds: float = 20.0,
    engines: Sequence[Engine] = ENGINES,
    threads: Sequence[int] = (),
    cuts: Sequence[int] = (0,),
    allow: Sequence[str] = (),
    maker: Maker | None = None,
) -> tuple[SetRuntime, tuple[Timing, ...]]:
    """The fastest runtime over ``batches`` (one request each), and every candidate in a fixed order.

    ``threads`` default to 1, 2, 4 ... up to the cores this process may use. It ends within ``seconds``, plus a pass over the
    candidates at the least. Applying the result raises PlanError where the bundle runs so already.

    Raises:
        PlanError: there are no batches, or no engine can run this model.
    """
    if not batches:
        raise PlanError("tune needs at least one request to measure with; sample a trace with Trace.sample")
    end = time.monotonic() + seconds
    wanted = threads or _powers(hardware.limits()[0])
    runtimes = sorted((Runtime(e, t, c) for e, t, c in itertools.product(engines, wanted, cuts)), key=_simplicity)
    live, timings = _made(bundle, runtimes, batches[0], allow, end, maker or _sharing())
    if not live:
        raise PlanError("no engine runs this model: " + "; ".join(sorted({t.note for t in timings.values()})))
    timings |= _halved({r: over(runner.score, batches) for r, runner in live.items()}, end)
    for runner in live.values():
        runner.close()
    best = _simplest(timings)
    timings[best] = dataclasses.replace(timings[best], note=CHOSEN)
    return SetRuntime(best.engine, best.threads, best.batch), tuple(timings[r] for r in runtimes)


PRECISE = 0.02
"""Largest mean difference of logits in bf16 from those in fp32, in their standard deviations."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What ``fastest`` found, and how."""

    chosen: SetRuntime
    trace: tuple[Timing, ...] = ()
    """Every point that was measured or failed, in order; ``latency.ratio`` is to the best before it."""
    points: int = 0
    """All points there were."""
    note: str = ""
    """Where it was remembered, or why what was remembered was not used."""


def fastest(
    bundle: Bundle,
    batches: Sequence[Batch],
    *,
    seconds: float = 60.0,
    engines: Sequence[Engine] = ENGINES,
    threads: Sequence[int] = (),
    cuts: Sequence[int] = (0, 1024, 512, 256, 128, 64),
    precisions: Sequence[Literal["fp32", "bf16"]] = ("fp32",),
    share: float = SHARE,
    allow: Sequence[str] = (),
    memory: Path | None = None,
    maker: Maker | None = None,
) -> Tuning:
    """The fastest runtime over ``batches``, found by measuring at most a share of engine x precision x threads x cut.

    Args:
        bundle: what is tuned; its own runtime counts for nothing but the index, which is kept.
        batches: one request each.
        seconds: making engines included; a point is then not started.
        engines: to choose from, the simplest first.
        threads: to choose from; 1, 2, 4 ... up to the cores by default.
        cuts: rows in one forward; those not below the largest batch are left out.
        precisions: of dense arithmetic; bf16 is dropped where logits move by more than ``PRECISE``.
        share: of all points that may be measured.
        allow: factories the user allows.
        memory: the folder of what was found before (``remembered``); None remembers nothing.
        maker: makes engines in place of ``compile.make``.

    Raises:
        PlanError: there are no batches, or nothing can run this model.
    """
    if not batches:
        raise PlanError("tune needs at least one request to measure with; sample a trace with Trace.sample")
    rows = max(height(b) for b in batches)
    axes: dict[str, Sequence[object]] = {
        "engine": engines,
        "threads": threads or _powers(hardware.limits()[0]),
        "cut": [c for c in cuts if c < rows],
        "precision": precisions,
    }
    key = _key(bundle, rows, axes)
    known, note = remembered(memory, key) if memory else (None, "")
    if known is not None:
        return Tuning(known, note=note)
    with _Bench(bundle, batches, seconds, allow, maker or _sharing()) as bench:
        point, tried = explore(axes, bench.measure, share=share, skip=_senseless)
        finalists = [point, *(p for p in bench.nearest() if p != point)]
        best = bench.final(finalists)
    runtime = _runtime(best)
    chosen = SetRuntime(
        runtime.engine, runtime.threads, runtime.batch, machine=hardware.fingerprint(), precision=runtime.precision
    )
    trace = tuple(Timing(_runtime(t.point), bench.taken.get(t.point), CHOSEN if t.point == best else t.note) for t in tried)
    points = sum(not _senseless(p) for p in itertools.product(*axes.values()))
    if memory:
        remember(memory, key, chosen)
    return Tuning(chosen, trace, points, note)


def sharing(
    bundle: Bundle, chosen: SetRuntime, batches: Sequence[Batch], *, rounds: int = 20, allow: Sequence[str] = ()
) -> SetRuntime:
    """The choice, and that requests share work (``accelerate.factor``) where that is faster here by more than a tie.

    ``batches`` are requests: every user column one row repeated. A model in which nothing can be shared stays as chosen.
    """
    with contextlib.ExitStack() as stack:
        ways = [dataclasses.replace(chosen, shared=way).change(bundle, Env()) for way in (False, True)]
        runners = [stack.enter_context(Runner(way, allow, probe=batches[0], fallback=True)) for way in ways]
        if runners[1].shared is None:
            return chosen
        _, parts = interleaved([over(r.score, batches) for r in runners], rounds=rounds, warmup=2)
    return dataclasses.replace(chosen, shared=parts.ratio * TIE < 1.0)


def _runtime(point: Point) -> Runtime:
    engine, threads, cut, precision = point
    return Runtime(engine, threads, cut, precision=precision)  # type: ignore[arg-type]


def _senseless(point: Point) -> str:
    return "bf16 is PyTorch's" if point[3] != "fp32" and point[0] not in ("eager", "compile") else ""


class _Bench:
    """Measures one point at a time, in turns with the fastest so far; engines are made once for each number of threads."""

    def __init__(self, bundle: Bundle, batches: Sequence[Batch], seconds: float, allow: Sequence[str], maker: Maker) -> None:
        self.bundle, self.batches, self.allow, self.maker = bundle, batches, allow, maker
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.scorers: dict[tuple[str, int, str], Scorer] = {}
        self.live: dict[Point, Runner] = {}
        self.taken: dict[Point, Latency] = {}
        self.ms: dict[Point, float] = {}
        self.spent: dict[str, int] = {}

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for runner in self.live.values():
            runner.close()

    def measure(self, point: Point) -> Measured:
        """Milliseconds of a point, or the reason there are none."""
        runtime, left = _runtime(point), self.end - time.monotonic()
        making = 0.0 if any(k[0] == runtime.engine for k in self.scorers) else MAKES_S[runtime.engine]
        if self.ms and (left <= 0 or making > left):
            return None, f"not tried: making it may take {making:g} s and {max(0, left):.0f} s were left"
        if (bound := self.spent.get(runtime.engine)) is not None and not 0 < runtime.batch < bound:
            return None, f"not tried: {runtime.engine} ran out of memory in cuts of {bound if bound < ALL else 'all'} rows"
        try:
            return self._timed(point, self._runner(runtime))
        except DeviceError as error:
            return None, str(error)
        except Exception as error:  # an engine's own machinery fails in its own ways, and the search goes on
            if _out_of_memory(error):
                self.spent[runtime.engine] = min(self.spent.get(runtime.engine, ALL), runtime.batch or ALL)
                return None, f"out of memory in cuts of {runtime.batch or 'all'} rows"
            reason = " ".join(str(error).split())[:160]
            return None, f"engine {runtime.engine!r} failed while it ran: {type(error).__name__}: {reason}"

    def _runner(self, runtime: Runtime) -> Runner:
        return Runner(self.bundle.replace(runtime=runtime), self.allow, probe=self.batches[0], maker=self._once(runtime))

    def _once(self, runtime: Runtime) -> Maker:
        key = (runtime.engine, runtime.threads, runtime.precision)

        def made(module: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Scorer:
            if key not in self.scorers:
                self.scorers[key] = self.maker(module, runtime, probe, inputs)
            return self.scorers[key]

        return made

    def _timed(self, point: Point, runner: Runner) -> Measured:
        runner.score(self.batches[0])  # what fails, fails before the best is timed again
        if point[3] != "fp32" and (far := self._far(point, runner)):
            runner.close()
            return None, far
        best = min(self.ms, key=self.ms.__getitem__) if self.ms else point
        self.live[point] = runner
        calls = [over(self.live[p].score, self.batches) for p in (best, point)]
        taken = interleaved(calls, rounds=200, warmup=2, seconds=self.seconds / 60)
        self.taken[point] = taken[1]
        # A ratio to the best so far: both met the same weather, and the best's own time is that of its first turn.
        self.ms[point] = taken[1].p50_ms if best == point else self.ms[best] * taken[1].ratio
        return self.ms[point], ""

    def _far(self, point: Point, runner: Runner) -> str:
        exact = self.live.get((*point[:3], "fp32")) or next(iter(self.live.values()), None)
        if exact is None:
            return "not tried: nothing in fp32 to compare with"
        want, got = exact.score(self.batches[0]), runner.score(self.batches[0])
        moved = float(abs(got - want).mean() / max(float(want.std()), 1e-9))
        return f"bf16 moves logits by {moved:.3f} of their deviation, more than {PRECISE:g}" if moved > PRECISE else ""

    def nearest(self, count: int = 3) -> list[Point]:
        """The fastest points so far."""
        return sorted(self.ms, key=self.ms.__getitem__)[:count]

    def final(self, points: Sequence[Point]) -> Point:
        """The simplest of those that, timed at length beside each other, are as good as the best."""
        taken = interleaved([over(self.live[p].score, self.batches) for p in points], rounds=500, seconds=self.seconds / 10)
        cost = {p: t.ratio for p, t in zip(points, taken, strict=True)}
        return min((p for p, c in cost.items() if c <= TIE_LAST * min(cost.values())), key=lambda p: _simplicity(_runtime(p)))


ALL = 1 << 62
"""A cut of all rows, as a number of rows."""
TIE_LAST = 1.02
"""Up to this factor of the best the simplest of the last few wins."""


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to allocate")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error).lower() for w in words)


# -- what was found before ----------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where what was found is kept: ``PENNYWEIGHT_CACHE``, or ``pennyweight`` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("PENNYWEIGHT_CACHE") or Path(cache) / "pennyweight")


@dataclasses.dataclass(frozen=True)
class Remembered:
    """One finding on disk."""

    machine: str
    chosen: SetRuntime


def remember(memory: Path, key: str, chosen: SetRuntime) -> None:
    """Keep a finding; a folder that cannot be written is no reason to fail."""
    try:
        write(memory / f"{key}.json", dumps(Remembered(hardware.fingerprint(), chosen)))
    except StorageError as error:
        log.warning("the tuning is not remembered: %s", error)


def remembered(memory: Path, key: str) -> tuple[SetRuntime | None, str]:
    """What was found for this machine and shape, and a note; None where there is nothing, or nothing of use."""
    file = memory / f"{key}.json"
    if not file.is_file():
        return None, ""
    try:
        found = loads(Remembered, file.read_bytes(), str(file))
    except (ConfigError, OSError) as error:
        return None, f"what was remembered cannot be read and is measured again: {error}"
    if found.machine != (here := hardware.fingerprint()):
        return None, f"what was remembered is of {found.machine!r} and this is {here!r}; measured again"
    return found.chosen, f"remembered from {file}; remove it to measure again"


def _key(bundle: Bundle, rows: int, axes: Mapping[str, Sequence[object]]) -> str:
    """The model's shape (its spec, not its weights), the size of a request, and what there was to choose from."""
    given = [encode(bundle.model.spec), encode(bundle.placement), rows, encode({k: list(v) for k, v in axes.items()})]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


SIZES = (1, 16, 256, 4096)
"""Rows of the batches that engines are chosen for: a bucket ends at each."""


def tune_sizes(
    bundle: Bundle,
    batches: Sequence[Batch],
    *,
    seconds: float = 60.0,
    sizes: Sequence[int] = SIZES,
    shared: bool = False,
    **settings: Any,
) -> tuple[SetRuntime, dict[int, tuple[Timing, ...]]]:
    """The fastest runtime for each size of batch, measured on this machine and marked with it, and what was tried for each.

    Rows are those of ``batches``, repeated where they are too few; ``seconds`` are spread evenly and ``settings`` are those of
    ``tune``. ``shared`` is carried into the runtime: requests then run in parts, other batches by these engines.

    Raises:
        PlanError: there are no batches, or no engine can run this model.
    """
    if not batches or not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise PlanError(
            f"tune_sizes needs batches, and sizes from 1 that grow; got {len(batches)} batches, sizes {list(sizes)}"
        )
    rows = {n: torch.cat([b[n] for b in batches]) for n in batches[0]}
    count = height(rows)
    maker, plain = settings.pop("maker", None) or _sharing(), bundle.replace(runtime=Runtime())
    best: dict[int, SetRuntime] = {}
    traces: dict[int, tuple[Timing, ...]] = {}
    end = time.monotonic() + seconds
    for done, size in enumerate(sizes):
        given = [_of_size(rows, count, size, at) for at in range(3)]
        left = max(0.0, end - time.monotonic()) / (len(sizes) - done)
        settings["cuts"] = (
            [c for c in wanted if c < size] if (wanted := settings.get("cuts")) else (0, *([512] if size > 512 else []))
        )
        best[size], traces[size] = tune(plain, given, seconds=left, maker=maker, **settings)
        settings["cuts"] = wanted
    last = best[sizes[-1]]
    smaller = tuple(Bucket(n, b.engine, b.threads, b.batch) for n, b in list(best.items())[:-1])
    machine = hardware.fingerprint()
    return SetRuntime(last.engine, last.threads, last.batch, shared=shared, buckets=smaller, machine=machine), traces


def _of_size(rows: Batch, count: int, size: int, at: int) -> dict[str, torch.Tensor]:
    """So many rows, the ``at``-th such batch."""
    index = (torch.arange(size) + at * size) % count
    return {n: t[index] for n, t in rows.items()}


def _powers(cores: int) -> list[int]:
    return [2**k for k in range(cores.bit_length()) if 2**k <= cores]


def _made(
    bundle: Bundle, runtimes: Sequence[Runtime], probe: Batch, allow: Sequence[str], end: float, maker: Maker
) -> tuple[dict[Runtime, Runner], dict[Runtime, Timing]]:
    """A runner for every candidate that can be had in time, and the reason for every other; a failure is not tried twice."""
    live: dict[Runtime, Runner] = {}
    reasons: dict[str, str] = {}
    for runtime in runtimes:
        engine, left = runtime.engine, end - time.monotonic()
        known = engine == "onnxruntime" and any(r.engine == engine for r in live)
        if not known and 0 < MAKES_S[engine] > left:
            reasons.setdefault(
                engine, f"not tried: making it may take {MAKES_S[engine]:g} s and {max(0, left):.0f} s were left"
            )
        if engine in reasons:
            continue
        try:
            live[runtime] = Runner(bundle.replace(runtime=runtime), allow, probe=probe, maker=maker)
        except DeviceError as error:
            reasons[engine] = str(error)
    return live, {r: Timing(r, None, reasons[r.engine]) for r in runtimes if r not in live}


def _sharing() -> Maker:
    """``make`` that exports to ONNX once and opens the graph with each number of threads."""
    graphs: list[Exported] = []

    def shared(module: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Scorer:
        if runtime.engine != "onnxruntime":
            return make(module, runtime, probe, inputs)
        if not graphs:
            graphs.append(export(module, probe, inputs))
        return graphs[0].scorer(runtime.threads)

    return shared


def _halved(calls: Mapping[Runtime, Call], end: float) -> dict[Runtime, Timing]:
    """Three calls each to drop the hopeless, then successive halving in equal shares of the time that is left."""
    taken = _timed(calls, list(calls), None)
    bound = HOPELESS * min(t.best_ms for t in taken.values())
    live = [r for r in calls if taken[r].best_ms <= bound]
    timings = {r: Timing(r, t, f"dropped after three calls, all slower than {bound:.3g} ms") for r, t in taken.items()}
    rungs = max(1, math.ceil(math.log2(len(live))))
    for left in range(rungs, 0, -1):
        taken = _timed(calls, live, max(0.0, end - time.monotonic()) / left)
        kept = sorted(live, key=lambda r: _cost(taken[r]))[: -(-len(live) // 2)] if left > 1 else live
        rung = f"dropped in rung {rungs - left + 1} of {rungs}"
        note = f"{rung}: not in the faster half, which ends at {_cost(taken[kept[-1]]):.3g} ms (geometric mean of p50 and p99)"
        timings |= {r: Timing(r, t, "" if r in kept else note) for r, t in taken.items()}
        live = [r for r in live if r in kept]
    return timings


def _timed(calls: Mapping[Runtime, Call], live: Sequence[Runtime], seconds: float | None) -> dict[Runtime, Latency]:
    few = seconds is None
    taken = interleaved([calls[r] for r in live], rounds=3 if few else 2000, warmup=1 if few else 3, seconds=seconds)
    return dict(zip(live, taken, strict=True))


def _simplest(timings: Mapping[Runtime, Timing]) -> Runtime:
    """The first, in the order of simplicity, of those that are as good as the best."""
    last = {r: _cost(t.latency) for r, t in timings.items() if t.latency and not t.note}
    best = min(last.values())
    return min((r for r, cost in last.items() if cost <= best * TIE), key=_simplicity)


def _cost(taken: Latency) -> float:
    return math.sqrt(taken.p50_ms * taken.p99_ms)


def _simplicity(runtime: Runtime) -> tuple[int, int, int]:
    return ENGINES.index(runtime.engine), runtime.threads, runtime.batch
