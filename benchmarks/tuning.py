"""Does tuning find the best runtime? Against every point measured, in a fifth of the trials.

Three models, each with every engine that is installed, threads and cuts: ``fastest`` measures its share, then all points are
measured in turns, and what it chose is timed once more beside the best of those. Both figures are the worst of the models.
A distance below 0 would be noise and counts as 0.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.accelerate.runner import Runner
from pennyweight.accelerate.tune import _sharing, fastest
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core import hardware
from pennyweight.core.errors import DeviceError
from pennyweight.core.measure import interleaved, over
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Engine, Runtime
from pennyweight.model.ranking import DNN, DeepFM
from pennyweight.model.spec import Batch, Model, build, spec_of
from pennyweight.model.transform import Env, plan

NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
CUTS, SECONDS = (0, 1024, 512, 256, 128, 64, 32), 240.0
ENGINES: tuple[Engine, ...] = ("eager", "fused", "onnxruntime", "openvino", "compile")


def models() -> dict[str, tuple[Bundle, int]]:
    """Bundles with random weights and the rows of a request."""
    torch.manual_seed(0)
    frappe = _columns(10, 540)
    wide = _columns(26, 20_000)
    dnn = spec_of(DNN, columns=frappe, dim=10, hidden=(400, 400, 400))
    deep = spec_of(DeepFM, columns=wide, dim=16, hidden=(400, 400, 400))
    made = {"DNN, 10 x 540 x 10": (_bundle(dnn), 2000), "DeepFM, 26 x 20,000 x 16": (_bundle(deep), 500)}
    small = plan(QuantizeTables("int8"), QuantizeDense("int8")).apply(made["DeepFM, 26 x 20,000 x 16"][0], Env())
    return {**made, "the same in int8": (small, 2000)}


def _columns(count: int, size: int) -> tuple[Column, ...]:
    roles = ["user", "item", *["context"] * (count - 2)]
    return tuple(Column(f"c{k}", role, "categorical", size) for k, role in enumerate(roles))  # type: ignore[arg-type]


def _bundle(spec: object) -> Bundle:
    return Bundle(Model.of(build(spec).eval(), spec))  # type: ignore[arg-type]


def batches(bundle: Bundle, rows: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    sizes = {c["name"]: c["size"] for c in _given(bundle)}
    return [{n: torch.randint(2, s, (rows,), generator=draw) for n, s in sizes.items()} for _ in range(8)]


def _given(bundle: Bundle) -> Sequence[dict[str, object]]:
    from pennyweight.core.config import encode

    return encode(bundle.model.spec)["args"]["columns"]  # type: ignore[no-any-return]


def engines(quick: bool) -> tuple[Engine, ...]:
    """Those that are installed; ``compile`` needs a compiler, and takes a minute to make for each number of threads."""
    found = [e for e in ENGINES if e not in NEEDS or importlib.util.find_spec(NEEDS[e])]
    return tuple(e for e in found if e != "compile" or (hardware.compiler() and not quick))


def measured(options: Options) -> list[Row]:
    """The worst share of trials and the worst distance to the best."""
    given = dict(itertools.islice(models().items(), 1 if options.quick else None))
    shares, distances, notes = [], [], []
    for name, (bundle, rows) in given.items():
        share, distance, note = judged(bundle, batches(bundle, rows), options.quick)
        shares.append(share)
        distances.append(distance)
        notes.append(f"{name}, {rows} rows: {note}")
    low = min(distances)
    text = "; ".join(notes)
    return [
        Row("tuning", "share_of_trials", max(shares), min(shares), max(shares), 1, bar=0.2, note=text, at_most=True),
        Row(
            "tuning",
            "distance_to_best",
            max(distances),
            low,
            max(distances),
            1,
            bar=0.05,
            note="range over models",
            at_most=True,
        ),
    ]


def judged(bundle: Bundle, requests: Sequence[Batch], quick: bool) -> tuple[float, float, str]:
    """Share of trials, distance to the best of all points, and both points in words."""
    names, maker = engines(quick), _remembering()
    seconds = 10.0 if quick else SECONDS
    found = fastest(bundle, requests, seconds=seconds, engines=names, cuts=CUTS, maker=maker)
    rows = len(next(iter(requests[0].values())))
    threads = sorted({1, *(2**k for k in range(6) if 2**k <= hardware.limits()[0])})
    every = [Runtime(e, t, c) for e, t, c in itertools.product(names, threads, (c for c in CUTS if c < rows))]
    live = {}
    for runtime in every:
        try:
            live[runtime] = Runner(bundle.replace(runtime=runtime), probe=requests[0], maker=maker)
        except DeviceError:
            continue
    calls = [over(runner.score, requests) for runner in live.values()]
    taken = dict(zip(live, interleaved(calls, rounds=15 if quick else 60, warmup=2), strict=True))
    best = min(taken, key=lambda r: taken[r].p50_ms)
    chosen = Runtime(found.chosen.engine, found.chosen.threads, found.chosen.batch)
    pair = [over(live[r].score, requests) for r in (best, chosen)]
    last = interleaved(pair, rounds=100 if quick else 400, warmup=5)[1]
    for runner in live.values():
        runner.close()
    words = (
        f"{len(found.trace)} of {found.points} points; chose {_said(chosen)}, the best of all {_said(best)} at "
        f"{taken[best].p50_ms:.3g} ms, eager on one thread {taken[Runtime('eager', 1, 0)].p50_ms:.3g} ms"
    )
    return len(found.trace) / found.points, max(0.0, last.ratio - 1.0), words


def _said(runtime: Runtime) -> str:
    return f"{runtime.engine} x{runtime.threads} cut {runtime.batch or 'none'}"


def _remembering():  # type: ignore[no-untyped-def]
    """A maker that makes each engine once for a number of threads: tuning and the grid share them."""
    make, held = _sharing(), {}

    def made(module, runtime, probe, inputs):  # type: ignore[no-untyped-def]
        key = runtime.engine, runtime.threads
        if key not in held:
            held[key] = make(module, runtime, probe, inputs)
        return held[key]

    return made


if __name__ == "__main__":
    harness.run("tuning", {"tuning": measured}, timed=True, seeds=1)
