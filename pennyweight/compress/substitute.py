"""Tables that share from the first step: put in the place of full ones before any training, to a budget of bytes.

Whatever the method, what it costs is one number a table (rows kept, the length of an array, a rank, a width), and one knob
turns them all: a cap on the bytes of any one table, found by bisection so that all of them together meet the budget. So
small tables stay whole and the largest give most. The same share of every table was the alternative, and is what a single
ratio seems to say; at a hundredth it leaves a field of fifty values half a row. What whole rows leave of the budget goes to
the largest tables.

The two methods that keep a row for every id have knobs of their own. ``narrow`` gives all tables one width. ``mixed`` gives
a table of n rows dim * (least n / n) ** alpha numbers a row (Ginart et al. 2019), alpha found by bisection.

The numbers the tables held are forgotten: whoever has them trained should share them afterwards (``share``), which loses
less. This is for what cannot be trained whole; until the training that follows, the model knows nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.compress.share import SAMPLE, drawn, kmeans, lookups, nearest
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle
from pennyweight.model.hashed import (
    PRIME,
    Clustered,
    Hashed,
    HotRows,
    Narrow,
    Quotient,
    Robe,
    Shared,
    SharedTable,
    TensorTrain,
    like,
    shared,
)
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform

Method = Literal["hash", "hot", "quotient", "quotient-add", "robe", "tensor-train", "clustered", "narrow", "mixed"]
STD = 0.01
"""Deviation of the first numbers where the table in place has none."""
RANK = 16
"""Of a tensor train, at most: an id costs a product with rank**2 times some numbers, read from memory."""
STEEPEST = 2.0
"""Alpha of ``mixed``, at most."""
POINTS = 64
"""Rows for each centre that clusters are found on."""
_CHUNK = 1 << 16


@named("substitute-tables")
@dataclasses.dataclass(frozen=True)
class SubstituteTables(Transform):
    """Full embedding tables to untrained ones that share their numbers, ``ratio`` times smaller all together in fp32.

    Tables of fewer than ``min_rows`` rows, and those that would not get smaller, stay and count. ``hot`` counts lookups in
    ``env.train`` to learn which ids are.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    method: Method = "robe"
    ratio: float = 10.0
    """The fp32 bytes of the tables over what may be left of them."""
    min_rows: int = 200
    only: tuple[str, ...] = ()
    """Patterns of paths to replace; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"method is {self.method!r}; it must be one of {', '.join(get_args(Method))}")
        if not self.ratio > 1:
            raise ConfigError(f"ratio is {self.ratio}; tables get smaller by a ratio above 1")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables replaced."""
        module = bundle.model.build(env.allow)
        inside = tuple(f"{path}." for path in shared(module))
        found = {p: f for p, f in targets(module, Table.of, self.only, self.skip).items() if not p.startswith(inside)}
        full = {p: t for p, (_, t) in found.items() if t.layout == "full"}
        new = self._fitted(full, env.seed)
        counts = lookups(bundle.model, env, new) if self.method == "hot" and env.need("train", self) else {}
        changes = {p: _untrained(p, found[p][0], layer, counts.get(p), env.seed) for p, layer in new.items()}
        return bundle.replace(model=rewrite(bundle.model, changes))

    def describe(self) -> str:
        """What it does."""
        return f"untrained tables that share their numbers ({self.method}), {self.ratio:g}x smaller"

    def _fitted(self, full: Mapping[str, Table], seed: int) -> dict[str, Shared]:
        """What each table becomes; those that stay are left out.

        Raises:
            PlanError: no table is large enough, or no setting of the method is small enough.
        """
        large = {p: t for p, t in full.items() if t.rows >= self.min_rows}
        if not large:
            have = ", ".join(f"{p} ({t.rows} x {t.dim})" for p, t in full.items()) or "none"
            raise PlanError(f"no full table has {self.min_rows} rows or more; tables: {have}")
        whole = sum(_whole(t) for t in full.values())
        budget = math.floor(whole / self.ratio) - sum(t.bytes() for p, t in full.items() if p not in large)
        sized = _sized(self.method, large, seed)
        least = _bytes(large, sized(0.0))
        if least > budget:
            most = math.floor(10 * whole / (least + whole // self.ratio - budget)) / 10
            raise PlanError(
                f"{self.method} cannot make the tables {self.ratio:g}x smaller: beside those of fewer than {self.min_rows} "
                f"rows {max(0, int(budget)):,} of {whole:,} bytes may be left, and its least is {least:,}; ask for at most "
                f"{most:g}x, a smaller min_rows, or a method such as 'hash'"
            )
        low, high = 0.0, 1.0
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (middle, high) if _bytes(large, sized(middle)) <= budget else (low, middle)
        new = sized(low)
        _fill(self.method, large, new, budget - _bytes(large, new), seed)
        return {p: layer for p, layer in new.items() if layer.bytes() < large[p].bytes()}


def _whole(table: Table) -> int:
    return 4 * table.rows * table.dim


def _bytes(large: Mapping[str, Table], new: Mapping[str, Shared]) -> int:
    """Bytes of the tables, each as it is or replaced, whichever is smaller."""
    return sum(min(new[p].bytes(), table.bytes()) for p, table in large.items())


def _sized(method: Method, large: Mapping[str, Table], seed: int) -> Callable[[float], dict[str, Shared]]:
    """From a knob, 0 smallest and 1 largest, to what each table becomes."""
    if method == "narrow":
        return lambda knob: {p: _narrow(t, knob) for p, t in large.items()}
    if method == "mixed":
        fewest = min(t.rows for t in large.values())
        return lambda knob: {p: _narrow(t, (fewest / t.rows) ** (STEEPEST * (1 - knob))) for p, t in large.items()}
    top = max(map(_whole, large.values()))
    return lambda knob: {p: FITTED[method](t, int(knob * top), seed) for p, t in large.items()}


def _fill(method: Method, large: Mapping[str, Table], new: dict[str, Shared], left: int, seed: int) -> None:
    """Give what is left of the budget to the largest tables, in place."""
    for path in sorted(new, key=lambda p: -large[p].bytes()) if method in FITTED else ():
        before = new[path].bytes()
        if before < large[path].bytes():
            more = FITTED[method](large[path], before + left, seed)
            if before < more.bytes() <= before + left:
                new[path], left = more, left - (more.bytes() - before)


# -- the largest setting within a cap of bytes, or the smallest there is ---------------------------------------------------


def _narrow(table: Table, share: float) -> Narrow:
    return Narrow(**like(table), width=max(1, math.floor(share * table.dim)))


def _hash(table: Table, cap: int, seed: int) -> Shared:
    return Hashed(**like(table), size=max(1, cap // (4 * table.dim)), seed=seed)


def _hot(table: Table, cap: int, seed: int) -> Shared:
    """Half of the bytes for each kind of rows."""
    row = 4 * table.dim
    hot = max(1, cap // 2 // (row + 4))
    return HotRows(**like(table), hot=hot, size=max(1, (cap - hot * (row + 4)) // row), seed=seed)


def _quotient(table: Table, cap: int, operation: Literal["multiply", "add"]) -> Shared:
    """As many remainders, and so as few ids that share one, as fit beside the quotients."""
    rows, least = cap // (4 * table.dim), math.isqrt(table.rows - 1) + 1
    size = max(least, (rows + math.isqrt(max(0, rows * rows - 4 * table.rows))) // 2 + 1)
    while size > least and size - (-table.rows // size) > rows:
        size -= 1
    return Quotient(**like(table), size=size, operation=operation)


def _robe(table: Table, cap: int, seed: int) -> Shared:
    return Robe(**like(table), size=max(1, cap // 4), block=min(8, table.dim), seed=seed)


def _train(table: Table, cap: int, seed: int) -> Shared:
    ranks = [TensorTrain(**like(table), rank=r) for r in range(1, RANK + 1)]
    return next((t for t in reversed(ranks) if t.bytes() <= cap), ranks[0])


def _clustered(table: Table, cap: int, seed: int) -> Shared:
    """Four clusters an id where its bytes allow, else two or one of fewer; all that they leave is for hashed pieces."""
    forms = [
        Clustered(**like(table), size=1, codes=min(codes, table.rows), chunks=min(chunks, table.dim), seed=seed)
        for chunks, codes in ((4, 256), (2, 256), (1, 256), (1, 64), (1, 16))
    ]
    form = next((f for f in forms if f.bytes() <= cap), forms[-1])
    piece = 4 * form.chunks * form.width
    return dataclasses.replace(form, size=max(1, (cap - form.bytes()) // piece + 1))


FITTED: Mapping[str, Callable[[Table, int, int], Shared]] = {
    "hash": _hash,
    "hot": _hot,
    "quotient": lambda table, cap, seed: _quotient(table, cap, "multiply"),
    "quotient-add": lambda table, cap, seed: _quotient(table, cap, "add"),
    "robe": _robe,
    "tensor-train": _train,
    "clustered": _clustered,
}


# -- states --------------------------------------------------------------------------------------------------------------


def _untrained(path: str, module: nn.Module, layer: Shared, counts: Tensor | None, seed: int) -> Change:
    """The layer with random numbers as wide as those in place, and its hot ids."""
    weight: Tensor = module.weight[:SAMPLE]  # type: ignore[index]
    state = layer.start(float(finite(path, weight.detach()).std()) or STD, seed)
    return layer, {**state, **(layer.owned(counts) if isinstance(layer, HotRows) and counts is not None else {})}


def recluster(module: nn.Module, round: int, counts: Mapping[str, Tensor] | None = None, iterations: int = 10) -> None:
    """Find the clusters of every clustered table anew, in place: what training calls between epochs.

    Centres become those of k-means over the rows as they are now, and the hashed pieces the mean of what their ids' centres
    leave, under hashes drawn once for the round. An optimizer's memory of these numbers is void after it.

    Args:
        module: any module; without a clustered table nothing happens.
        round: of clustering, from 1: each has hashes of its own.
        counts: how often each row is looked up, float [rows], by path; rows weigh by its square root, alike without.
        iterations: of k-means at most.
    """
    for path, table in shared(module).items():
        if isinstance(table.layer, Clustered):
            weights = None if counts is None else counts[path].sqrt() + 0.1
            with torch.no_grad():
                _clusters(table, table.layer, round, weights, iterations)


def _clusters(table: SharedTable, layer: Clustered, round: int, weights: Tensor | None, iterations: int) -> None:
    generator = torch.Generator().manual_seed(layer.seed * PRIME + round)
    weights = torch.ones(layer.rows) if weights is None else weights
    sample = drawn(weights, POINTS * layer.codes, generator)
    points, even = _pieces(table, layer, sample), torch.ones(len(sample))
    centres = kmeans(points, even, layer.codes, iterations, generator, zero=False)
    codes, salts = torch.empty_like(table.codes), layer.salted(round)  # type: ignore[arg-type]
    sums, mass = torch.zeros(layer.chunks, layer.size, layer.width), torch.zeros(layer.chunks, layer.size)
    for ids in torch.split(torch.arange(layer.rows), _CHUNK):
        pieces = _pieces(table, layer, ids)
        near, places = nearest(pieces, centres), layer.places(ids, salts).T
        codes[ids] = near.T.to(torch.uint8)
        for k in range(layer.chunks):
            sums[k].index_add_(0, places[k], (pieces[k] - centres[k, near[k]]) * weights[ids].unsqueeze(1))
            mass[k].index_add_(0, places[k], weights[ids])
    rest = sums / mass.clamp_min(1e-12).unsqueeze(2)
    new = {"near.weight": centres.flatten(0, 1), "rest.weight": rest.flatten(0, 1), "codes": codes, "salts": salts}
    table.load_state_dict(new)


def _pieces(table: SharedTable, layer: Clustered, ids: Tensor) -> Tensor:
    """The rows of ids by chunk, [chunks, n, width]."""
    rows = nn.functional.pad(table.look(ids), (0, layer.chunks * layer.width - layer.dim))
    return rows.reshape(len(ids), layer.chunks, layer.width).transpose(0, 1).contiguous()
