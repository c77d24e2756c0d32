"""What a bundle's work takes, as the cost curve that scheduling starts from.

Forwards of one and of several requests, small and large, are timed in turns, so that what else the machine does falls on all
sizes alike. The curve goes through the median of each size; the safety factor is the 95th percentile of all times over it. One
size extrapolated to the others, as a batcher without a profile must do, is wrong by the whole fixed cost on a GPU and right by
luck on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pennyweight.accelerate.runner import Runner
from pennyweight.core.curve import TAIL, Curve
from pennyweight.core.errors import ConfigError, DataError
from pennyweight.core.measure import LOUD, Foreign
from pennyweight.data.requests import Trace
from pennyweight.model.bundle import Policy, Variant, load
from pennyweight.model.layers import height
from pennyweight.model.spec import Batch

ROUNDS = 7
"""Times each size is measured at least."""


def profile(
    runner: Runner,
    requests: Sequence[Batch],
    *,
    joined: Sequence[int] = (1, 2, 4, 8),
    shares: Sequence[float] = (0.05, 0.3, 1.0),
    seconds: float = 1.0,
) -> Curve:
    """The curve of a runner's forwards on this machine.

    Args:
        runner: what is timed.
        requests: batches of rows, each one request; a request's size is its rows.
        joined: how many requests one forward has.
        shares: sizes, as shares of the requests' own.
        seconds: how long to measure; each size is timed 7 times at least.

    Raises:
        ConfigError: there are no requests.
    """
    if not requests:
        raise ConfigError("a profile needs requests to time; sample a trace with Trace.sample(...).batches(catalog)")
    turns = itertools.cycle(requests)
    sizes = [(_joined([_cut(next(turns), share) for _ in range(n)]), n) for n in joined for share in shares]
    times: list[list[float]] = [[] for _ in sizes]
    for batch, _ in sizes:
        runner.score(batch)
    end = time.perf_counter() + seconds
    while len(times[0]) < ROUNDS or time.perf_counter() < end:
        for taken, (batch, _) in zip(times, sizes, strict=True):
            start = time.perf_counter_ns()
            runner.score(batch)
            taken.append((time.perf_counter_ns() - start) / 1e6)
    work = [(n, height(batch)) for batch, n in sizes]
    curve = Curve.fit([(*w, float(np.median(taken))) for w, taken in zip(work, times, strict=True)])
    ratios = np.concatenate([np.array(taken) / curve.ms(*w) for w, taken in zip(work, times, strict=True)])
    return dataclasses.replace(curve, safety=max(1.0, float(np.quantile(ratios, TAIL))))


def profiled(
    folder: Path,
    candidates: int = 500,
    seed: int = 0,
    allow: Sequence[str] = (),
    seconds: float = 1.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Policy:
    """The policy of a bundle on disk, its variants with curves on this machine's device: those it lacks are measured.

    Args:
        folder: of the bundle; its variants' folders are seen from here.
        candidates: items of the largest request.
        seed: of the requests that are timed.
        allow: import paths of factories that may be loaded.
        seconds: how long to measure each variant.
        tell: hears when others used the processor meanwhile, so that the curve is not to be believed.

    Raises:
        BundleError: a variant's bundle cannot be loaded.
        DataError: the bundle has no catalogue of items to make requests of.
    """
    given = load(folder)
    variants = []
    for variant in given.policy.variants or (Variant("the model"),):
        bundle = load(folder / variant.folder) if variant.folder else given
        with Runner(bundle, allow) as runner:
            device = runner.home.partition(":")[0]
            if device not in variant.costs:
                if bundle.catalog is None or bundle.catalog.items is None:
                    raise DataError(
                        f"{folder / variant.folder} has no catalogue of items to make requests of, so its work cannot be "
                        f"timed; give its variant costs, as in Variant({variant.name!r}, costs={{{device!r}: Curve(...)}})"
                    )
                requests = Trace.sample(bundle.catalog, 16, candidates, seed).batches(bundle.catalog)
                with Foreign() as others:
                    curve = profile(runner, requests, seconds=seconds)
                if others.share > LOUD:
                    tell(f"others used {others.share:.0%} of the processor while {variant.name} was timed: repeat it in quiet")
                variant = dataclasses.replace(variant, costs={**variant.costs, device: curve})
        variants.append(variant)
    return dataclasses.replace(given.policy, variants=tuple(variants))


def _cut(batch: Batch, share: float) -> Batch:
    rows = max(1, round(share * height(batch)))
    return {name: column[:rows] for name, column in batch.items()}


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
