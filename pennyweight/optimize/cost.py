"""What a plan will cost, before it is paid for.

Bytes are exact: every transform but training is applied to the real weights (a *sketch*), which takes a second where
recovery takes minutes. Milliseconds are predicted from the layers: each part costs a fixed call plus what it moves or
multiplies, at rates measured on this machine in about a second; what is between the parts (concatenation, activations,
Python) is taken from the baseline's own timing. Fitting a learned cost model over many trials is the known alternative;
it needs the trials that a prediction is there to save. What this cannot see is cache behaviour and operator fusion, so
a prediction only orders and filters plans; a limit is only ever kept by a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from pennyweight.core.measure import latency
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense, Norm
from pennyweight.model.packed import BITS
from pennyweight.model.spec import Batch, Layer, call, leaves
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Plan, Transform
from pennyweight.optimize.trial import Cost, Part, Price

Objective = Literal["cost", "bytes"]
"""What the search makes small: what a request costs, or the weights file alone."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine does, one thread: milliseconds = call + work / rate."""

    call_ms: float
    """One layer called on next to nothing."""
    flops_per_ms: Mapping[str, float]
    """Dense floating point operations by data type."""
    rows_per_ms: Mapping[str, float]
    """Table rows looked up, by layout and data type."""

    def ms(self, layer: Layer, candidates: int, uses: int = 1) -> float:
        """Predicted milliseconds of one layer for a request of this many candidates, each of which uses it so often."""
        if isinstance(layer, Table):
            rate = self.rows_per_ms.get(f"{layer.layout} {layer.data_type}", self.rows_per_ms["full fp32"])
            return self.call_ms + candidates * uses / rate
        kind = layer.data_type if isinstance(layer, (Dense, Conv)) else "fp32"
        rate = self.flops_per_ms.get(kind, self.flops_per_ms["int8" if kind in BITS else "fp32"])
        return self.call_ms + candidates * uses * layer.flops() / rate


def calibrate(candidates: int = 500, seconds: float = 0.05) -> Rates:
    """Measure this machine with small layers of the kinds a plan may use; under a second in all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 2000, (candidates,), generator=generator)
        x = torch.randn(candidates, 256, generator=generator)
        dense = {kind: Dense(256, 256, data_type=kind) for kind in ("fp32", "int8")}
        tables = [
            Table(2000, 16),
            Table(2000, 16, data_type="int8"),
            Table(2000, 16, data_type="int4"),
            Table(2000, 16, "codebook", parts=4, codes=256),
        ]
        call = _time(Dense(8, 8), x[:1, :8], seconds)
        flops = {kind: candidates * layer.flops() / max(_time(layer, x, seconds) - call, 1e-6) for kind, layer in dense.items()}
        rows = {f"{t.layout} {t.data_type}": candidates / max(_time(t, ids, seconds) - call, 1e-6) for t in tables}
        return Rates(call, flops, rows)
    finally:
        torch.set_num_threads(threads)


def _time(layer: Layer, given: torch.Tensor, seconds: float) -> float:
    module = layer.build().eval().requires_grad_(False)
    with torch.inference_mode():
        return latency(lambda: module(given), seconds=seconds).p50_ms


def described(bundle: Bundle, allow: Sequence[str] = ()) -> dict[str, Layer]:
    """What each table, dense layer, convolution and norm of a bundle is now, by path."""
    module = bundle.model.build(allow)
    found = {
        path: bundle.model.spec.layers.get(path) or Table.of(child) or Dense.of(child) or Conv.of(child) or Norm.of(child)
        for path, child in leaves(module)
    }
    return {path: layer for path, layer in found.items() if layer is not None}


def positions(layer: Layer, output: torch.Tensor) -> int:
    """How often a layer that is no table was used for an output: once for all its numbers at a place."""
    return output.numel() // max(1, getattr(layer, "outputs", 0) or getattr(layer, "features", 0))


def uses(bundle: Bundle, batch: Batch, allow: Sequence[str] = ()) -> dict[str, int]:
    """Positions of a row in each layer of a model with convolutions, found by scoring a batch; elsewhere it is one."""
    layers = {p: la for p, la in described(bundle, allow).items() if not isinstance(la, Table)}
    if not any(isinstance(layer, Conv) for layer in layers.values()):
        return {}
    module, found = bundle.model.build(allow), dict.fromkeys(layers, 0)

    def counter(path: str) -> Callable[..., None]:
        def count(_: torch.nn.Module, args: object, output: torch.Tensor) -> None:
            found[path] += positions(layers[path], output)

        return count

    for path in layers:
        module.get_submodule(path).register_forward_hook(counter(path))
    with torch.inference_mode():
        rows = len(call(module, batch, bundle.model.spec.inputs))
    return {path: count // rows for path, count in found.items()}


def operations(layers: Mapping[str, Layer], often: Mapping[str, int]) -> int:
    """Floating point operations for one row: what each layer needs, times its positions in a row (tables by one lookup)."""
    return sum(la.flops() * (1 if isinstance(la, Table) else max(1, often.get(path, 1))) for path, la in layers.items())


def sketch(bundle: Bundle, transforms: Sequence[Transform], env: Env) -> Bundle:
    """The bundle after a plan without its training: right bytes and shapes, weights not yet recovered."""
    return Plan(tuple(t.sketch() for t in transforms if t.stage != "training")).apply(bundle, env)


def predict(bundle: Bundle, rates: Rates, baseline: Cost, before: Sequence[Part], allow: Sequence[str] = ()) -> Cost:
    """The cost of a sketch: its bytes, and milliseconds scaled from the baseline's by what its layers need."""
    layers = described(bundle, allow)
    glue = sum(p.ms for p in before if p.name == "everything else" or p.kind.startswith("other "))
    often = {p.name: max(1, p.lookups) for p in before}
    ms = glue + sum(rates.ms(layer, baseline.candidates, often.get(path, 1)) for path, layer in layers.items())
    tail = baseline.p99_ms / baseline.p50_ms if baseline.p50_ms else 1.0
    return Cost(bundle.bytes, ms, ms * tail, baseline.candidates, operations(layers, often))


def money(cost: Cost, threads: int, price: Price) -> float:
    """Money for a million requests: cores for as long as a request takes, and memory for a month spread over its requests.

    Memory is priced as if the deployment answered one request after another all month, the fullest use there is; an idle
    deployment pays more per request, and its saving is larger.
    """
    hours = cost.p50_ms * 1e6 / 3.6e6
    return hours * max(1, threads) * price.core_hour + cost.bytes / 1e9 * price.gb_month * hours / 730


def objective(cost: Cost, baseline: Cost, price: Price | None = None, threads: int = 1, of: Objective = "cost") -> float:
    """What the search makes small: money where there is a price, else bytes times milliseconds over the baseline's.

    Milliseconds are the geometric mean of p50 and p99: the one is steady, the other is what is asked for. ``of`` bytes
    looks at nothing else.
    """
    if of == "bytes":
        return cost.bytes / baseline.bytes
    if price is not None and (price.core_hour or price.gb_month):
        return money(cost, threads, price) / max(money(baseline, threads, price), 1e-12)
    slow = max(baseline.p50_ms * baseline.p99_ms, 1e-12)
    return cost.bytes / baseline.bytes * math.sqrt(cost.p50_ms * cost.p99_ms / slow)
