"""Rows by their use: hot rows and cold ones apart, cold rows as one, fields that nobody needs as a constant.

Of the ids of a click log most are seen a few times, and what is learned of those is little. So rows are ranked by their use
(``usage``), those of all tables together, since a share of each table would leave a field of fifty values two rows and a
field of millions thousands that nobody asks for. ``SplitRows`` puts ranks into bands of their own (see ``model.bands``), for
other transforms to treat apart. ``DropRows`` gives the cold ones a single row, the mean of their lookups. ``DropFields`` does
so to whole tables, or bands, where a measurement says that the answers stay (SHARK, CIKM 2023, whose first-order estimate is
the alternative; a forward of some thousand rows is exact and takes milliseconds).

MPE (arXiv 2409.20305) learns which rows get how many bits, zero among them, by training with all widths at once; it ends
where frequency points, and takes a training. What this costs: an id of a table in bands is looked up twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.compress.observe import batches, calibration, divergence
from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.compress.usage import counted, importance, rows_for
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bands import MOST, BandedTable, Bands
from pennyweight.model.bundle import Bundle
from pennyweight.model.hashed import Hashed, like, shared
from pennyweight.model.spec import call, replace
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform

Found = Mapping[str, tuple[nn.Module, Table]]


@named("split-rows")
@dataclasses.dataclass(frozen=True)
class SplitRows(Transform):
    """Full fp32 tables to bands by the use of their rows, each band a table at ``PATH.band0`` (the hottest) and so on.

    No answer changes, and a bit or two an id are added: what is done to the bands makes the model smaller. A table whose rows
    are all in one band stays whole.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    shares: tuple[float, ...] = (0.05, 0.2)
    """Of all tables' numbers, those in the hottest bands; the rest is the last band."""
    min_rows: int = 1000
    """Tables with fewer rows stay whole."""
    only: tuple[str, ...] = ()
    """Patterns of paths to split; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.shares) < MOST or min(self.shares) <= 0 or sum(self.shares) >= 1:
            raise ConfigError(
                f"shares are {list(self.shares)}: give those of 1 to {MOST - 1} bands, above 0 and together below 1; the rest "
                "is the last band"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables in bands."""
        found = _full(bundle, env, self.only, self.skip, self.min_rows)
        used = importance(bundle.model, env, _asked(bundle, env, found, self))
        changes: dict[str, Change] = {}
        for path, bands in _ranked(used, found, self.shares).items():
            module, table = found[path]
            sizes = torch.bincount(bands, minlength=len(self.shares) + 1).tolist()
            if sum(size > 0 for size in sizes) > 1:
                changes[path] = _split(Bands(**like(table), sizes=tuple(sizes)), finite(path, rows_of(module)), bands)
        if not changes:
            raise PlanError(
                f"every table of {self.min_rows} rows or more is in one band as a whole: {_listed(found)}; give other shares"
            )
        return bundle.replace(model=rewrite(bundle.model, changes))

    def describe(self) -> str:
        """What it does."""
        shares = ", ".join(f"{share:.3g}" for share in self.shares)
        return f"table rows in bands by their use: the hottest {shares} of them, and the rest"


@named("drop-rows")
@dataclasses.dataclass(frozen=True)
class DropRows(Transform):
    """The least used rows of full fp32 tables to one row a table, the mean of their lookups.

    A table that would not get smaller stays as it is, and one of which nothing is kept is that row alone.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    keep: float = 0.25
    """Share of all tables' numbers that is kept at most."""
    least: float = 0.0
    """Use of a row that is kept: lookups in the data, each worth its gradient over the usual one."""
    min_rows: int = 1000
    """Tables with fewer rows stay whole."""
    only: tuple[str, ...] = ()
    """Patterns of paths to drop rows of; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.least < 0 or (self.keep == 1 and not self.least):
            raise ConfigError(
                f"keep = {self.keep}, least = {self.least}: keep is above 0 and at most 1, least not negative; keep 1 with "
                "least 0 drops nothing"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its cold rows dropped."""
        found = _full(bundle, env, self.only, self.skip, self.min_rows)
        counts = _asked(bundle, env, found, self)
        used = importance(bundle.model, env, counts)
        changes: dict[str, Change] = {}
        for path, bands in _ranked(used, found, (self.keep,)).items():
            module, table = found[path]
            gone = (bands > 0) | (used[path] < self.least)
            changes |= _dropped(path, table, finite(path, rows_of(module)), gone, counts[path])
        if not changes:
            raise PlanError(f"no table would get smaller by dropping rows ({self.describe()}); tables: {_listed(found)}")
        return bundle.replace(model=rewrite(bundle.model, changes))

    def describe(self) -> str:
        """What it does."""
        least = f", none used below {self.least:g}" if self.least else ""
        return f"the most used {self.keep:.3g} of table rows kept{least}, the others one row a table"


@named("drop-fields")
@dataclasses.dataclass(frozen=True)
class DropFields(Transform):
    """Tables (and bands of tables) to one row, the mean of their lookups, where the model's answers hardly change.

    Measured on ``env.calib`` (or else ``env.train``): the mean divergence of the answers, with all that were dropped so far.
    Those that alone change least go first.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    most: float | None = 1e-5
    """Divergence allowed (nats for click rates and classes, squared difference otherwise); None drops whatever is named."""
    only: tuple[str, ...] = ()
    """Patterns of paths to drop; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if (self.most is None and not self.only) or (self.most is not None and not self.most > 0):
            raise ConfigError(f"most = {self.most}, only = {list(self.only)}: most is above 0, or else only says which to drop")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with tables replaced by constants."""
        module = bundle.model.build(env.allow)
        inside = tuple(f"{path}." for path, table in shared(module).items() if not isinstance(table, BandedTable))
        every = targets(module, Table.of, self.only, self.skip)
        found = {p: (m, t) for p, (m, t) in every.items() if t.rows > 1 and not p.startswith(inside)}
        if not found:
            raise PlanError(f"no table has rows of its own to drop; tables: {_listed(every)}")
        counts = (
            counted(bundle.model, env, found, rows_for(env, self)) if self.most is None else _asked(bundle, env, found, self)
        )
        made = {p: _constant(t, finite(p, rows_of(m)), counts[p]) for p, (m, t) in found.items() if p in counts}
        gone = made if self.most is None else self._harmless(bundle, env, made)
        return bundle.replace(model=rewrite(bundle.model, {p: made[p] for p in gone}))

    def _harmless(self, bundle: Bundle, env: Env, made: Mapping[str, Change]) -> Sequence[str]:
        """Which tables can be constants all at once."""
        judge = _Judge(bundle, env, calibration(bundle, env, self))
        alone = {path: judge.loss({path: change}) for path, change in made.items()}
        gone: dict[str, Change] = {}
        for path in sorted(made, key=lambda p: (alone[p], p)):
            if alone[path] <= self.most and judge.loss({**gone, path: made[path]}) <= self.most:  # type: ignore[operator]
                gone[path] = made[path]
        if not gone:
            path = min(alone, key=lambda p: (alone[p], p))
            raise PlanError(
                f"every table is needed: without {path}, the least of them, answers diverge by {alone[path]:.2g}, and "
                f"{self.most:.2g} is allowed"
            )
        return list(gone)

    def describe(self) -> str:
        """What it does."""
        if self.most is None:
            return f"tables as a constant: {', '.join(self.only)}"[:120]
        return f"tables as a constant where answers diverge by no more than {self.most:g}"


class _Judge:
    """How far a model's answers are from its first ones, with some of its layers changed."""

    def __init__(self, bundle: Bundle, env: Env, rows: Dataset) -> None:
        self.module, self.inputs, self.rows = bundle.model.build(env.allow), bundle.model.spec.inputs, rows
        self.by = env.recipe.loss if env.recipe is not None else "bce"
        self.before = self._answers()

    def loss(self, changes: Mapping[str, Change]) -> float:
        """The mean divergence, the changes undone again."""
        given = {path: self.module.get_submodule(path) for path in changes}
        for path, (layer, state) in changes.items():
            new = layer.build()
            new.load_state_dict(state, assign=True)
            replace(self.module, path, new.requires_grad_(False).eval())
        after = self._answers()
        for path, old in given.items():
            replace(self.module, path, old)
        return divergence(self.before, after, self.by)

    def _answers(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([call(self.module, batch, self.inputs) for batch in batches(self.module, self.rows)])


def _full(bundle: Bundle, env: Env, only: Sequence[str], skip: Sequence[str], rows: int) -> Found:
    """Full fp32 tables of so many rows, and no parts of tables that share or are in bands.

    Raises:
        PlanError: there is none.
    """
    module = bundle.model.build(env.allow)
    inside = tuple(f"{path}." for path in shared(module))
    every = targets(module, Table.of, only, skip)
    found = {
        p: (m, t)
        for p, (m, t) in every.items()
        if t.layout == "full" and t.data_type == "fp32" and t.rows >= max(2, rows) and not p.startswith(inside)
    }
    if not found:
        raise PlanError(f"no full fp32 table of its own has {max(2, rows)} rows or more; tables: {_listed(every)}")
    return found


def _asked(bundle: Bundle, env: Env, found: Found, by: Transform) -> dict[str, Tensor]:
    """How often each row is looked up, of tables that are: where the forward does not lead (to a retrieval stage) none is cold.

    A band that is not looked up is one of a table that is, if another one is.

    Raises:
        PlanError: there are no data, or they ask for no row.
    """
    tables = {p: t for p, t in shared(bundle.model.build(env.allow)).items() if isinstance(t, BandedTable)}
    beside = {
        f"{p}.{name}": p for p, t in tables.items() for name in t.layer.parts() if Table.of(t.get_submodule(name)) is not None
    }
    counts = counted(bundle.model, env, dict.fromkeys((*found, *beside)), rows_for(env, by))
    reached = {beside.get(path, path) for path, count in counts.items() if count.any()}
    asked = {path: counts[path] for path in found if beside.get(path, path) in reached}
    if not asked:
        raise PlanError(f"the model's forward looks nothing up in {', '.join(found)}, so nothing tells how its rows are used")
    return asked


def _listed(found: Found) -> str:
    return ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"


def _ranked(used: Mapping[str, Tensor], found: Found, shares: Sequence[float]) -> dict[str, Tensor]:
    """The band of each row, uint8 by path: rows of all tables in the order of their use for a number, cut by ``shares``.

    The row of padding is in the last.
    """
    keys: dict[str, Tensor] = {}
    for path, rows in used.items():
        table = found[path][1]
        use = rows / table.dim
        if table.padding is not None:
            use[table.padding] = -1
        keys[path] = use.view(torch.int32)  # floats of 0 and more are in the order of their bits, and -1 is below them
    dims = {path: found[path][1].dim for path in used}
    total = sum(dims[path] * len(key) for path, key in keys.items())
    bands = {path: torch.full((len(key),), len(shares), dtype=torch.uint8) for path, key in keys.items()}
    for band, share in reversed(list(enumerate(itertools.accumulate(shares)))):
        for path, hot in _hottest(keys, dims, share * total * (1 + 1e-12)).items():
            bands[path][hot] = band
    return bands


def _hottest(keys: Mapping[str, Tensor], dims: Mapping[str, int], room: float) -> dict[str, Tensor]:
    """Which rows have the largest keys, bool [rows] by path: as many as have ``room`` numbers; of rows alike the first.

    The least key is found by halving, since an order of millions of rows takes as much memory as they do.
    """

    def numbers(above: int) -> int:
        return sum(dims[path] * int((key > above).sum()) for path, key in keys.items())

    low, high = -(1 << 31), (1 << 31) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if numbers(middle) > room else (low, middle)
    room -= numbers(high)
    hot = {}
    for path, key in keys.items():
        alike = (key == high).nonzero().squeeze(1)
        first = alike[: int(room // dims[path])]
        room = room - dims[path] * len(first) if len(first) == len(alike) else 0
        hot[path] = (key > high).index_fill(0, first, True)
    return hot


def _split(layer: Bands, rows: Tensor, bands: Tensor) -> tuple[Bands, dict[str, Tensor]]:
    weights = {f"{name}.weight": rows[bands == int(name.removeprefix("band"))] for name in layer.parts()}
    return layer, {**layer.coded(bands), **weights}


def _dropped(path: str, table: Table, rows: Tensor, gone: Tensor, counts: Tensor) -> dict[str, Change]:
    """What a table becomes without the rows that are ``gone`` [rows]; nothing where that is no smaller."""
    lost = int(gone.sum())
    if lost == table.rows:
        return {path: _constant(table, rows, counts)}
    if not lost:
        return {}
    if table.padding is not None:
        counts = counts.index_fill(0, torch.tensor([table.padding]), 0.0)
    cold = torch.where(gone, counts, 0.0)
    one = _constant(Table(lost, table.dim), rows, cold if cold.any() else gone.float())
    layer = Bands(**like(table), sizes=(table.rows - lost, lost))
    state = {**layer.coded(gone.to(torch.uint8)), "band0.weight": rows[~gone]}
    if sum(t.nbytes for t in state.values()) + one[0].bytes() >= table.bytes():
        return {}
    return {path: (layer, state), f"{path}.band1": one}


def _constant(table: Table, rows: Tensor, counts: Tensor) -> tuple[Hashed, dict[str, Tensor]]:
    """One row for all ids, the mean of what is looked up; of all rows, where nothing is."""
    weights = counts if table.padding is None else counts.index_fill(0, torch.tensor([table.padding]), 0.0)
    if not weights.any():
        weights = torch.ones_like(weights)
    return Hashed(**like(table), size=1), {"shared.weight": (weights / weights.sum()).unsqueeze(0) @ rows}
