"""The runtime, chosen by measuring: engines x threads x cuts on a trace of requests.

Thread count is the cheapest speed-up nobody tunes: on two busy cores a second thread made a 0.014 ms lookup take 8 ms, as it
waits at a barrier for a core that somebody else has. No rule predicts this from the machine's description, nor which
engine wins for a shape, so every combination is timed on the user's own requests.

All live candidates are timed in turns on the same request (see ``core.measure``), and after each rung the slower half at p99
is dropped (successive halving, Jamieson and Talwalkar 2016), so the time that is left goes to those that are close. The
alternative, a full grid, gives the hopeless as many calls as the best. Candidates within a few percent of the best are
a tie, and the simplest of them wins: eager before ONNX Runtime before compile, fewer threads, no cut.

Cost: making an engine takes seconds (ONNX) to a minute (compile); one that would not fit in the time left is not started,
and the trace says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

from torch import nn

from pennyweight.accelerate.compile import Exported, Maker, Scorer, export, make
from pennyweight.accelerate.runner import Runner
from pennyweight.core import hardware
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, DeviceError, PlanError
from pennyweight.core.measure import Call, Latency, interleaved, over
from pennyweight.model.bundle import Bundle, Runtime
from pennyweight.model.spec import Batch
from pennyweight.model.transform import Env, Transform

Engine = Literal["eager", "onnxruntime", "compile"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
"""Simplest first: the order in which ties are decided."""

MAKES_S = {"eager": 0.0, "onnxruntime": 10.0, "compile": 60.0}
"""Seconds making an engine may take; it is not started with less time left."""

TIE = 1.05
"""A p99 up to this factor of the best is as good as the best."""

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

    family: ClassVar[Literal["accelerate"]] = "accelerate"
    stage: ClassVar[Literal["runtime"]] = "runtime"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine {self.engine!r} is not one of {', '.join(ENGINES)}")
        if self.threads < 0 or self.batch < 0:
            raise ConfigError(f"threads {self.threads} and batch {self.batch} must not be negative; 0 is the default of each")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with this runtime; whether the engine is installed is found by the Runner, on the machine that serves."""
        return bundle.replace(runtime=Runtime(self.engine, self.threads, self.batch))

    def describe(self) -> str:
        """One plain sentence."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "as many threads as the engine likes"
        return f"run with {self.engine} on {threads}" + (f", {self.batch} rows at a time" if self.batch else "")


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
) -> tuple[SetRuntime, tuple[Timing, ...]]:
    """The fastest runtime at p99 over ``batches`` (one request each), and every candidate in a fixed order.

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
    live, timings = _made(bundle, runtimes, batches[0], allow, end)
    if not live:
        raise PlanError("no engine runs this model: " + "; ".join(sorted({t.note for t in timings.values()})))
    timings |= _halved({r: over(runner.score, batches) for r, runner in live.items()}, end)
    for runner in live.values():
        runner.close()
    best = _simplest(timings)
    timings[best] = dataclasses.replace(timings[best], note=CHOSEN)
    return SetRuntime(best.engine, best.threads, best.batch), tuple(timings[r] for r in runtimes)


def _powers(cores: int) -> list[int]:
    return [2**k for k in range(cores.bit_length()) if 2**k <= cores]


def _made(
    bundle: Bundle, runtimes: Sequence[Runtime], probe: Batch, allow: Sequence[str], end: float
) -> tuple[dict[Runtime, Runner], dict[Runtime, Timing]]:
    """A runner for every candidate that can be had in time, and the reason for every other; a failure is not tried twice."""
    live: dict[Runtime, Runner] = {}
    reasons: dict[str, str] = {}
    maker = _sharing()
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
    """Successive halving in equal shares of the time: the last one or two are left without a note."""
    timings: dict[Runtime, Timing] = {}
    live = list(calls)
    for rung in range(rungs := max(1, math.ceil(math.log2(len(live))))):
        share = max(0.0, end - time.monotonic()) / (rungs - rung)
        taken = interleaved([calls[r] for r in live], rounds=2000, warmup=3, seconds=share)
        timings |= {r: Timing(r, t) for r, t in zip(live, taken, strict=True)}
        if rung < rungs - 1:
            ranked = sorted(zip(live, taken, strict=True), key=lambda pair: pair[1].p99_ms)
            kept, dropped = ranked[: -(-len(ranked) // 2)], ranked[-(-len(ranked) // 2) :]
            note = f"dropped in rung {rung + 1} of {rungs}: p99 above the {kept[-1][1].p99_ms:.3g} ms of the faster half"
            timings |= {r: Timing(r, t, note) for r, t in dropped}
            live = [r for r in live if r in {k for k, _ in kept}]
    return timings


def _simplest(timings: Mapping[Runtime, Timing]) -> Runtime:
    """The first, in the order of simplicity, of those that are as good as the best."""
    last = {r: t.latency.p99_ms for r, t in timings.items() if t.latency and not t.note}
    best = min(last.values())
    return min((r for r, p99 in last.items() if p99 <= best * TIE), key=_simplicity)


def _simplicity(runtime: Runtime) -> tuple[int, int, int]:
    return ENGINES.index(runtime.engine), runtime.threads, runtime.batch
