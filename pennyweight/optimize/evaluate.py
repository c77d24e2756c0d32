"""What a bundle costs and how good it is, measured.

The one path for every figure: scores come from the same ``Runner`` that serves, and a time is that of a whole request,
features and forward, for one user with N candidates. A bundle without a catalogue of items (an image or a credit model)
is timed on batches of N of its rows.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pennyweight.accelerate.runner import Runner
from pennyweight.compress.rewrite import untouched
from pennyweight.core.measure import Latency, interleaved, latency, peak_memory
from pennyweight.data.catalog import Catalog
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import Trace
from pennyweight.model import metrics
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.onnx import Onnx
from pennyweight.model.spec import Batch, Layer
from pennyweight.model.tables import Table
from pennyweight.model.train import Queries
from pennyweight.optimize.cost import described, operations, positions, uses
from pennyweight.optimize.trial import Cost, Part

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bench:
    """The requests a deployment is timed on."""

    requests: tuple[Callable[[], Batch], ...]
    """Each makes one request's batch, features included, as serving would."""
    candidates: int
    seconds: float = 1.0
    users: bool = False
    """Whether a request is one user's candidates, or just rows."""

    @classmethod
    def replay(cls, trace: Trace, catalog: Catalog, seconds: float = 1.0) -> Bench:
        """The requests of a trace, in order."""
        return cls(tuple(lambda r=r: r.batch(catalog) for r in trace), len(trace.requests[0].items), seconds, True)  # type: ignore[misc]

    @classmethod
    def of(cls, data: Dataset, candidates: int = 500, trace: Trace | None = None, n: int = 64, seed: int = 0) -> Bench:
        """Requests of a trace, or sampled from the data: one user with ``candidates`` items, or that many rows."""
        catalog = data.catalog
        if catalog.items is not None and data.schema.role("user"):
            return cls.replay(trace or Trace.sample(data, n, candidates, seed), catalog)
        labels = {c.name for c in data.schema.role("label", "time")}
        batches = itertools.islice(data.batches(candidates, shuffle=True, seed=seed), n)
        rows = [{k: v for k, v in b.items() if k not in labels} for b in batches]
        return cls(tuple(lambda b=b: b for b in rows), len(next(iter(rows[0].values()))))  # type: ignore[misc]


def scores(bundle: Bundle, data: Dataset, allow: Sequence[str] = (), batch: int = 8192) -> Scores:
    """Logits [rows] (or [rows, classes]) of every row, in order."""
    with Runner(bundle, allow) as runner:
        return np.concatenate([runner.score(b) for b in data.batches(batch)])


def cost(bundle: Bundle, bench: Bench, allow: Sequence[str] = ()) -> Cost:
    """What the bundle costs for one request of the bench."""
    with Runner(bundle, allow, probe=bench.requests[0]()) as runner:
        timing = latency(_calls(runner, bench), rounds=3000, seconds=bench.seconds)
    return _cost(bundle, timing, bench, allow)


def memory(bundle: Bundle, bench: Bench, allow: Sequence[str] = ()) -> int:
    """Peak resident bytes that loading the bundle and answering one request add to a process, measured in a fresh one."""
    with tempfile.TemporaryDirectory(prefix="pennyweight-") as folder:
        path = save(bundle, Path(folder) / "bundle")
        return peak_memory(_answer, str(path), dict(bench.requests[0]()), tuple(allow)).added


def _answer(path: str, batch: dict[str, Tensor], allow: tuple[str, ...]) -> None:
    with Runner(load(path), allow) as runner:
        runner.score(batch)


def race(bundles: Sequence[Bundle], bench: Bench, allow: Sequence[str] = ()) -> list[Cost]:
    """The costs of several bundles timed in turns, so that what else the machine does falls on all alike."""
    runners = [Runner(b, allow, probe=bench.requests[0]()) for b in bundles]
    try:
        timings = interleaved([_calls(r, bench) for r in runners], rounds=3000, seconds=bench.seconds * len(bundles))
    finally:
        for runner in reversed(runners):
            runner.close()
    return [_cost(b, t, bench, allow) for b, t in zip(bundles, timings, strict=True)]


def _calls(runner: Runner, bench: Bench) -> Callable[[], object]:
    requests = itertools.cycle(bench.requests)
    return lambda: runner.score(next(requests)())


def _cost(bundle: Bundle, timing: Latency, bench: Bench, allow: Sequence[str]) -> Cost:
    flops = operations(described(bundle, allow), uses(bundle, bench.requests[0](), allow))
    return Cost(bundle.bytes, timing.p50_ms, timing.p99_ms, bench.candidates, flops)


def parts(bundle: Bundle, bench: Bench, allow: Sequence[str] = (), rounds: int = 30) -> tuple[Part, ...]:
    """Where bytes and milliseconds are: one part a table or layer that a request calls or that holds weights.

    Timed with hooks on eager modules, which cost a microsecond each; ``everything else`` is what is left of the forward.
    A layer of a kind that no compression knows is a part too, called ``other``; so is what a layer that has become several
    holds beside them, such as the codes of shared centres.
    """
    with Runner(bundle.replace(runtime=replace(bundle.runtime, engine="eager")), allow) as runner:
        layers: dict[str, Layer | None] = {**described(bundle, allow)}
        strange = {u.path: u for u in untouched(runner.module) if u.path and not isinstance(runner.module, Onnx)}
        layers |= {path: None for path in strange if not any(True for _ in runner.module.get_submodule(path).children())}
        spent = dict.fromkeys(layers, 0.0)
        rows = dict.fromkeys(layers, 0)
        handles = [h for path in layers for h in _timed(runner.module.get_submodule(path), path, layers[path], spent, rows)]
        batch = bench.requests[0]()
        runner.score(batch)
        spent.update(dict.fromkeys(layers, 0.0))
        rows.update(dict.fromkeys(layers, 0))
        start = time.perf_counter()
        for _ in range(rounds):
            runner.score(batch)
        total = (time.perf_counter() - start) * 1e3 / rounds
        for handle in handles:
            handle.remove()
        spec, state = bundle.model.spec.layers, bundle.model.state
        kind = runner.module.kind if isinstance(runner.module, Onnx) else "glue"  # an ONNX graph is one part
    made = [_part(p, layer, spent[p] / rounds, rows[p] // (rounds * bench.candidates)) for p, layer in layers.items() if layer]
    made += [Part(p, f"other {u.kind}", u.bytes, spent.get(p, 0.0) / rounds, 0) for p, u in strange.items()]
    made += [
        Part(p, type(la).__name__.lower(), own, 0.0, 0) for p, la in spec.items() if p not in layers and (own := _own(state, p))
    ]
    rest = bundle.model.bytes - sum(p.bytes for p in made)
    return (*made, Part("everything else", kind, max(0, rest), max(0.0, total - sum(p.ms for p in made)), 0))


def _own(state: Mapping[str, Tensor], path: str) -> int:
    """Bytes of the tensors of a layer itself, without those of the layers in it."""
    return sum(t.nbytes for name, t in state.items() if name.rpartition(".")[0] == path)


def _timed(
    module: nn.Module, path: str, layer: Layer | None, spent: dict[str, float], rows: dict[str, int]
) -> list[torch.utils.hooks.RemovableHandle]:
    begun = [0.0]

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        begun[0] = time.perf_counter()

    def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        spent[path] += (time.perf_counter() - begun[0]) * 1e3
        if isinstance(layer, Table):
            rows[path] += args[0].numel() if args else 0
        elif layer is not None:
            rows[path] += positions(layer, out)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _part(path: str, layer: Layer, ms: float, often: int) -> Part:
    name = type(layer).__name__.lower()
    if isinstance(layer, Table):
        shape = f"{layer.rows}x{layer.dim}"
        form = layer.data_type if layer.layout == "full" else f"{layer.layout} {layer.parts}x{layer.codes} {layer.data_type}"
        form = f"{len(layer.bits)} axes of {sum(layer.bits)} bits" if layer.layout == "axes" else form
        return Part(path, f"{name} {form} {shape}", layer.bytes(), ms, layer.flops(), often)
    shape = f"{getattr(layer, 'inputs', getattr(layer, 'features', ''))}x{getattr(layer, 'outputs', '')}".rstrip("x")
    kind = f"{name} {getattr(layer, 'data_type', '')} {shape}".replace("  ", " ")
    return Part(path, kind, layer.bytes(), ms, layer.flops() * max(1, often), often)


def outcomes(
    bundle: Bundle, data: Dataset, metric: str, seen: Sequence[Dataset] = (), allow: Sequence[str] = ()
) -> npt.NDArray[Any]:
    """What a paired test of ``metric`` compares: logits a row, or for a ranking (``ndcg@10``) its value for each user.

    Users are those with a liked row in ``data``; the whole catalogue is ranked for them but what they have in ``seen``.

    Raises:
        ConfigError: a ranking is asked of a model that cannot rank a catalogue.
    """
    asked = metrics.ranking(metric)
    if asked is None:
        return scores(bundle, data, allow)
    ranked = Queries.of(data, seen).rank(bundle.model.build(allow), asked[1])
    each: npt.NDArray[np.float64] = ranked.each[("recall", "ndcg", "hit_rate").index(asked[0])]
    return each
