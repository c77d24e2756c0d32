"""Rows that share their numbers: product quantization of trained tables.

A row is cut into ``parts`` sub-vectors, and each is replaced by the nearest of ``codes`` centres that all rows share, found
by k-means (Jegou et al. 2011). The centres are weighted by how often an id is looked up, sqrt(count) + .1, as the rows that
many requests meet should lose least. After it the centres can be trained (``distill``), the codes are frozen.

Sharing while training (hashing, quotient-remainder, tensor trains) is the known alternative. On ML-1M those lose .04 to .22
AUC at 9.5 times fewer table weights in thomasahle/cce's own runs, while this lost .0004 at 16 times after one epoch of
distillation (measured for this project on another split). They pay where a table cannot be trained whole at all; what this
costs is having trained it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pennyweight.compress.rewrite import finite, rewrite, targets, which
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Model, call, leaves
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform

SAMPLE = 1 << 16
"""Rows that centres are fitted on; the codes of a larger table's rows are found afterwards."""
BATCH, BATCHES = 2048, 100
"""Rows of data, and batches of them, that lookups are counted in."""
_CHUNK = 1 << 10


@named("share-rows")
@dataclasses.dataclass(frozen=True)
class ShareRows(Transform):
    """Full embedding tables to codebooks shared by their rows; the data type stays what it was.

    A table that would not get smaller, or with fewer than two rows for each code, stays as it is. Lookups are counted in
    ``env.train`` or ``env.calib`` by running the model; without data, or where its forward does not reach a table, all rows
    weigh the same.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    parts: int = 4
    """Codes a row; a table with a smaller dim has one for each number."""
    codes: int = 256
    """Centres a part, at most 256; 16 make codes of 4 bits, 4 of 2, 2 of 1."""
    iterations: int = 25
    """Rounds of k-means at most."""
    weigh: Literal["lookups", "evenly"] = "lookups"
    """How much a row counts: by how often it is looked up, or as much as any other."""
    only: tuple[str, ...] = ()
    """Patterns of paths to share; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.parts < 1 or not 2 <= self.codes <= 256 or self.iterations < 1:
            raise ConfigError(
                f"parts = {self.parts}, codes = {self.codes}, iterations = {self.iterations}: "
                "there must be at least 1 part and 1 iteration, and 2 to 256 codes"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables shared."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        new = {p: (m, to) for p, (m, t) in found.items() if (to := self._shared(t)) is not None}
        if not new:
            have = ", ".join(f"{p} ({t.layout}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no table would get smaller by {self.codes} codes in {self.parts} parts; tables: {have}")
        return bundle.replace(model=_shared(bundle.model, new, self.iterations, env, self.weigh))

    def sketch(self) -> ShareRows:
        """One step of k-means: codes and codebooks of the same size."""
        return dataclasses.replace(self, iterations=1, weigh="evenly")

    def describe(self) -> str:
        """What it does."""
        return f"table rows share {self.codes} vectors in each of {self.parts} parts"

    def _shared(self, table: Table) -> Table | None:
        if table.layout != "full" or table.rows < 2 * self.codes:
            return None
        data_type = "int4" if table.data_type == "int2" else table.data_type
        parts = min(self.parts, table.dim)
        new = dataclasses.replace(table, layout="codebook", data_type=data_type, parts=parts, codes=self.codes)
        return new if new.bytes() < table.bytes() else None


@named("code-tables")
@dataclasses.dataclass(frozen=True)
class CodeTables(Transform):
    """Full fp32 tables to codes into a codebook a table has for each place of its rows, after training.

    It is sharing as a data type. At ``width`` 1 a number becomes one of ``2**bits`` levels that its place in the row has,
    where ``QuantizeTables`` gives each row a scale and a bias of its own: 4 bytes a row less, and levels where the numbers
    are (k-means), for ranges that are not the row's. Wider codes are product quantization without the training that
    ``ShareRows`` may be followed by. A table that would not get smaller, or with fewer than two rows for each code, stays.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    bits: Literal[2, 4, 8] = 4
    """Of a code."""
    width: int = 1
    """Numbers of a row that one code stands for."""
    data_type: Literal["fp16", "int8", "int4"] = "fp16"
    """Of the codebooks."""
    iterations: int = 25
    """Rounds of k-means at most."""
    weigh: Literal["lookups", "evenly"] = "lookups"
    """How much a row counts: by how often it is looked up, or as much as any other."""
    only: tuple[str, ...] = ()
    """Patterns of paths to code; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.width < 1 or self.iterations < 1:
            raise ConfigError(
                f"bits = {self.bits}, width = {self.width}, iterations = {self.iterations}: "
                "bits are 2, 4 or 8, the others at least 1"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables coded."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        new = {p: (m, to) for p, (m, t) in found.items() if (to := self._coded(t)) is not None}
        if not new:
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no full fp32 table would get smaller by {self.bits}-bit codes of {self.width}; tables: {have}")
        return bundle.replace(model=_shared(bundle.model, new, self.iterations, env, self.weigh))

    def sketch(self) -> CodeTables:
        """One step of k-means: codes and codebooks of the same size."""
        return dataclasses.replace(self, iterations=1, weigh="evenly")

    def describe(self) -> str:
        """What it does."""
        numbers = "number" if self.width == 1 else f"{self.width} numbers"
        return f"embedding tables{which(self.only)} stored as a {self.bits}-bit code for each {numbers}"

    def _coded(self, table: Table) -> Table | None:
        if table.layout != "full" or table.data_type != "fp32" or table.rows < 2 ** (self.bits + 1):
            return None
        parts = -(-table.dim // self.width)
        new = dataclasses.replace(table, layout="codebook", data_type=self.data_type, parts=parts, codes=2**self.bits)
        return new if new.bytes() < table.bytes() else None


def _shared(model: Model, new: Mapping[str, tuple[nn.Module, Table]], iterations: int, env: Env, weigh: str) -> Model:
    """The model with these tables shared, each as the layer beside it says."""
    counts = lookups(model, env if weigh == "lookups" else Env(allow=env.allow), new)
    changes = {}
    for path, (module, to) in new.items():
        # A generator of its own, so that a table's codes do not depend on which others are shared.
        codes, books = quantize(finite(path, rows_of(module)), to, counts[path].sqrt() + 0.1, iterations, env.seed)
        changes[path] = (to, to.encode_codebook(codes, books))
    return rewrite(model, changes)


_COUNTED: WeakKeyDictionary[Model, dict[tuple[str, int, bool], tuple[Dataset | None, Tensor]]] = WeakKeyDictionary()
"""Lookups by table and seed, with the rows they were counted in: who weighs several ways to share asks again for each."""


def lookups(model: Model, env: Env, paths: Iterable[str]) -> dict[str, Tensor]:
    """How often the model looks up each row of the tables at ``paths``, float [rows], in a sample of the data at hand."""
    data = env.train if env.train is not None else env.calib
    known = _COUNTED.setdefault(model, {})
    asked = {path: (path, env.seed, data is None) for path in paths}
    if any(key not in known or known[key][0] is not data for key in asked.values()):
        # All tables while the rows pass by: whoever weighs choices for one asks for the others next.
        every = dict.fromkeys((*asked, *(p for p, m in leaves(model.build(env.allow)) if Table.of(m) is not None)))
        found = _counted(model, env, data, tuple(every))
        known |= {(path, env.seed, data is None): (data, counts) for path, counts in found.items()}
    return {path: known[key][1] for path, key in asked.items()}


def _counted(model: Model, env: Env, data: Dataset | None, paths: Sequence[str]) -> dict[str, Tensor]:
    module = model.build(env.allow)
    tables = {path: module.get_submodule(path) for path in paths}
    counts = {path: torch.zeros(int(table.num_embeddings)) for path, table in tables.items()}  # type: ignore[arg-type]
    if data is None or not tables:
        return counts
    for path, table in tables.items():
        table.register_forward_pre_hook(_counter(counts[path]), with_kwargs=True)
    with torch.inference_mode():
        for batch in islice(data.batches(BATCH, shuffle=True, seed=env.seed), BATCHES):
            call(module, batch, model.spec.inputs)
    data.release()
    return counts


def _counter(counts: Tensor) -> Any:
    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = (*args, *kwargs.values())[0]
        counts.index_add_(0, ids.reshape(-1), torch.ones(ids.numel()))

    return count


def quantize(rows: Tensor, table: Table, weights: Tensor, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, parts] and codebooks fp32 [parts, codes, width] for rows [rows, dim] weighted by [rows].

    Where the table has a padding row, code 0 of every part is the zero vector and the padding row is made of it.
    """
    generator = torch.Generator().manual_seed(seed)
    points = points_of(rows, table)
    weights = weights.clone()
    if table.padding is not None:
        weights[table.padding] = 0
    sample, weights = _sampled(points, weights, generator)
    books = kmeans(sample, weights, table.codes, iterations, generator, zero=table.padding is not None)
    return coded(rows, table, books), books


def coded(rows: Tensor, table: Table, books: Tensor) -> Tensor:
    """The nearest code of each part, uint8 [rows, parts], for rows [rows, dim] and codebooks [parts, codes, width]."""
    codes = nearest(points_of(rows, table), books).to(torch.uint8).T.contiguous()
    if table.padding is not None:
        codes[table.padding] = 0
    return codes


def points_of(rows: Tensor, table: Table) -> Tensor:
    """The parts of rows [rows, dim], [parts, rows, width]."""
    padded = torch.nn.functional.pad(rows, (0, table.parts * table.width - table.dim))
    return padded.reshape(len(rows), table.parts, table.width).transpose(0, 1).contiguous()


def _sampled(points: Tensor, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All points, or SAMPLE of them drawn in proportion to their weights (which is then in the sample, not in the weights)."""
    if len(weights) <= SAMPLE:
        return points, weights
    ids = drawn(weights, SAMPLE, generator)
    return points[:, ids], torch.ones(SAMPLE)


def drawn(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The places of ``n`` of the weights, drawn in proportion to them without replacement; all, if there are no more."""
    # The smallest of exponential times with these rates are such a draw (Efraimidis & Spirakis 2006).
    times = torch.empty_like(weights).exponential_(generator=generator) / weights
    return times.topk(min(n, len(weights)), largest=False).indices


def kmeans(points: Tensor, weights: Tensor, codes: int, iterations: int, generator: torch.Generator, *, zero: bool) -> Tensor:
    """Centres [parts, codes, width] of points [parts, n, width] weighted by [n], every part on its own.

    Starts with k-means++ (Arthur & Vassilvitskii 2007), but for a single iteration, which starts from the first points; with
    ``zero`` the first centre is held at zero.
    """
    centres = _spread(points, weights, codes, generator, zero) if iterations > 1 else _first(points, codes, zero)
    before = None
    for _ in range(iterations):
        belongs = nearest(points, centres)
        if before is not None and torch.equal(belongs, before):
            break
        before, centres = belongs, means(points, weights, belongs, centres)
        if zero:
            centres[:, 0] = 0
    return centres


def means(points: Tensor, weights: Tensor, belongs: Tensor, centres: Tensor) -> Tensor:
    """Centres [parts, codes, width] moved to the weighted means of the points that belong to them [parts, n]."""
    parts, codes, width = centres.shape
    mass = weights.expand(parts, points.shape[1])
    where = (belongs + torch.arange(parts).unsqueeze(1) * codes).flatten()
    sums = torch.zeros(parts * codes, width).index_add_(0, where, (points * mass.unsqueeze(2)).flatten(0, 1))
    total = torch.zeros(parts * codes).index_add_(0, where, mass.flatten()).unsqueeze(1)
    return torch.where(total > 0, sums / total.clamp(min=1e-12), centres.flatten(0, 1)).reshape(parts, codes, width)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each point, int64 [parts, n]."""
    if centres.shape[2] == 1:  # on a line, the nearest is found by halving
        line, order = centres.squeeze(2).sort(1)
        return order.gather(1, torch.searchsorted((line[:, 1:] + line[:, :-1]) / 2, points.squeeze(2).contiguous()))
    half = centres.square().sum(2).div(2).unsqueeze(1)
    chunks = torch.split(points, _CHUNK, dim=1)
    return torch.cat([torch.baddbmm(half, chunk, centres.transpose(1, 2), alpha=-1).min(2).indices for chunk in chunks], 1)


def _first(points: Tensor, codes: int, zero: bool) -> Tensor:
    """First centres for a sketch, whose size is all that is asked: no search for them."""
    ids = torch.arange(codes) % points.shape[1]
    centres = points[:, ids].clone()
    if zero:
        centres[:, 0] = 0
    return centres


def _spread(points: Tensor, weights: Tensor, codes: int, generator: torch.Generator, zero: bool) -> Tensor:
    """First centres: each a point drawn with a chance proportional to its weight and squared distance to those before it."""
    parts, n, width = points.shape
    if width == 1:
        return _along(points.squeeze(2), weights, codes, zero).unsqueeze(2)
    centres = torch.zeros(parts, codes, width)
    distance = torch.full((parts, n), torch.inf)
    for k in range(codes):
        if not (zero and k == 0):
            chance = weights * distance if k else weights.expand(parts, n)
            chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, 1.0)  # fewer distinct points than centres
            drawn = torch.multinomial(chance, 1, generator=generator)
            centres[:, k] = points.gather(1, drawn.unsqueeze(2).expand(parts, 1, width)).squeeze(1)
        distance = torch.minimum(distance, (points - centres[:, k : k + 1]).square().sum(2))
    return centres


def _along(points: Tensor, weights: Tensor, codes: int, zero: bool) -> Tensor:
    """First levels [parts, codes] of numbers [parts, n]: half-way between steps of equal weight and equal steps.

    Levels of least loss lie denser where there is more weight, yet less so than weight itself (Panter and Dite 1951).
    """
    line, order = points.sort(1)
    passed = weights[order].cumsum(1)
    shares = (torch.arange(codes) + 0.5) / codes
    at = torch.searchsorted(passed, (shares * passed[:, -1:]).contiguous()).clamp(max=points.shape[1] - 1)
    even = line[:, :1] + (line[:, -1:] - line[:, :1]) * shares
    levels = (line.gather(1, at) + even) / 2
    if zero:
        levels[:, 0] = 0
    return levels
