"""Which table and which layer gets how many bits: one integer programme over what each choice was measured to lose.

Layers differ in what they can bear, and one data type for all of them pays for the most delicate with every other's bytes.
So each table and layer (a *group*) has its choices, and each choice is tried alone: what it saves is counted, and what it
loses is how far the model's own answers move on a few thousand rows (Kullback and Leibler's divergence of its probabilities;
no labels, so no noise of labels). Losses of different groups are added up, which is nearly so while each is small, and HiGHS
finds the choices of least loss that keep a cap of bytes and, where there is one, of milliseconds (as in HAWQ-V3, Yao et al.
2021, and Hubara et al. 2021, whose groups are layers; tables are most of a recommender, so here they are groups as well).

The known alternative is greedy: rank layers by what they lose and give bits back until the test passes (NNCF's accuracy
control). It needs a test a step, and cannot trade one layer's bytes for another's. What this costs is a rounding and a forward
a choice; and a sum of losses is a prediction, which the search therefore verifies, and tightens by bisection where it fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from pennyweight.compress.axes import CodeAxes
from pennyweight.compress.bands import DropFields
from pennyweight.compress.observe import divergence
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.rewrite import chosen
from pennyweight.compress.share import CodeTables
from pennyweight.core.errors import PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense
from pennyweight.model.losses import Items
from pennyweight.model.spec import Layer, Model, call
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform
from pennyweight.optimize.cost import Rates, described

ROWS = 4096
"""Rows that answers are compared on."""
QUERIES = 256
"""Users whose scores of the whole catalogue are compared, for a model that retrieves."""
SMALL = 0.003
"""Share of the bytes below which layers of a kind are one group."""

CODES: tuple[tuple[Literal[2, 4, 8], int], ...] = ((8, 1), (4, 1), (2, 1), (4, 2), (8, 4))
"""Bits of a code, and numbers that it stands for."""

RATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Bits a number of rows that are written along axes."""

Structure = tuple[Transform, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that can become of a group."""

    transforms: Structure
    """None leaves it as it is."""
    bytes: int
    """Of its tensors."""
    loss: float
    """Divergence of the model's answers, this group alone changed."""
    ms: float = 0.0
    """Predicted for a request, where milliseconds are limited."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that are decided on together."""

    paths: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A choice for every group."""

    transforms: Structure
    bytes: int
    """Of all tensors of the model."""
    loss: float
    """The sum of the choices' losses."""
    ms: float = 0.0
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of each layer that is changed; layers of one group share its loss."""


@dataclasses.dataclass(frozen=True)
class Menu:
    """The groups of a bundle with their choices, measured; ``least`` to ``most`` bytes can be asked for."""

    groups: tuple[Group, ...]
    rest: int
    """Bytes of tensors that nothing here changes."""

    @property
    def least(self) -> int:
        """Bytes of the smallest allocation."""
        return self.rest + sum(min(c.bytes for c in g.choices) for g in self.groups)

    @property
    def most(self) -> int:
        """Bytes with every group as it is."""
        return self.rest + sum(max(c.bytes for c in g.choices) for g in self.groups)

    def within(self, bytes: int, ms: float = math.inf) -> Allocation | None:
        """The choices of least loss within so many bytes of tensors and milliseconds; None where there are none."""
        flat = [(g, c) for g, group in enumerate(self.groups) for c in group.choices]
        if not flat or bytes < self.least:
            return None
        loss = np.array([c.loss for _, c in flat])
        # HiGHS works to 1e-6: losses of 1e-7 count as well. Of equal losses the fewer bytes.
        unit = max(float(loss.max()), 1e-12) / 1e6
        sizes, times = (np.array([getattr(c, name) for _, c in flat], float) for name in ("bytes", "ms"))
        one = np.array([[g == k for g, _ in flat] for k in range(len(self.groups))], float)
        limits = [LinearConstraint(one, 1, 1), LinearConstraint(sizes[None] / bytes, -np.inf, (bytes - self.rest) / bytes)]
        if math.isfinite(ms):
            limits.append(LinearConstraint(times[None], -np.inf, ms))
        goal = loss / unit + 1e-3 * sizes / sizes.max()
        found = milp(goal, constraints=limits, bounds=Bounds(0, 1), integrality=np.ones(len(flat)))
        if found.x is None:
            return None
        chosen = [(self.groups[g].paths, c) for (g, c), x in zip(flat, found.x, strict=True) if x > 0.5]
        picked = [c for _, c in chosen]
        losses = {path: c.loss / len(paths) for paths, c in chosen if c.transforms for path in paths}
        total = self.rest + sum(c.bytes for c in picked)
        return Allocation(_joined(picked), total, sum(c.loss for c in picked), sum(c.ms for c in picked), losses)


def menu(
    bundle: Bundle,
    env: Env,
    *,
    skip: Sequence[str] = (),
    rates: Rates | None = None,
    candidates: int = 1,
    seconds: float = math.inf,
) -> Menu | None:
    """What can become of each table and layer of a bundle, and what each loses alone.

    Args:
        bundle: as it is after its training; layers of fewer bits already stay as they are.
        env: rows to look at: ``calib``, ``valid`` or ``train``, whichever is there.
        skip: patterns of paths to leave alone.
        rates: to predict milliseconds with; without them none are.
        candidates: of the request that milliseconds are for.
        seconds: to spend at most. What there is no time to look at one by one is one group, as it is or in int8; None is
            returned where not even the largest was looked at.
    """
    ends = time.monotonic() + seconds
    layers = {p: la for p, la in described(bundle, env.allow).items() if chosen(p, (), skip)}
    sizes = {p: _bytes(bundle.model, p) for p in layers}
    judge = Judge(bundle, env)
    groups: list[Group] = []
    waiting = list(_grouped(layers, sizes))
    while waiting and time.monotonic() < ends:
        paths = waiting.pop(0)
        before = Choice((), sum(sizes[p] for p in paths), 0.0, _ms(layers, paths, rates, candidates))
        choices = [before, *_tried(bundle, env, paths, layers, judge, rates, candidates, ends)]
        if len(choices) > 1:
            groups.append(Group(tuple(paths), tuple(_undominated(choices))))
    if waiting and not groups:
        return None
    if waiting:
        groups += _together([p for paths in waiting for p in paths], bundle, env, layers, sizes, judge)
    whole = sum(t.nbytes for t in bundle.model.state.values())
    return Menu(tuple(groups), whole - sum(sizes[p] for g in groups for p in g.paths))


def _together(
    paths: Sequence[str], bundle: Bundle, env: Env, layers: Mapping[str, Layer], sizes: Mapping[str, int], judge: Judge
) -> list[Group]:
    """Layers there was no time for, as one group: as they are, or all in int8."""
    tables = tuple(p for p in paths if isinstance(layers[p], Table))
    dense = tuple(p for p in paths if p not in tables)
    changed, made = bundle, []
    for transform in (
        *([QuantizeTables("int8", only=tables)] if tables else []),
        *([QuantizeDense("int8", only=dense)] if dense else []),
    ):
        with contextlib.suppress(PlanError):
            changed = transform.apply(changed, env)
            made.append(transform)
    if not made:
        return []
    before = Choice((), sum(sizes[p] for p in paths), 0.0)
    after = Choice(tuple(made), sum(_bytes(changed.model, p) for p in paths), judge.loss(changed))
    return [Group(tuple(paths), tuple(_undominated([before, after])))]


def _grouped(layers: Mapping[str, Layer], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Tables and layers on their own, and the small ones of a kind together; the largest first."""
    limit, groups = SMALL * sum(sizes.values()), []
    for kinds in ((Table,), (Dense, Conv)):
        of_kind = [p for p, la in layers.items() if isinstance(la, kinds)]
        groups += [[p] for p in of_kind if sizes[p] >= limit]
        groups += [small] if (small := [p for p in of_kind if sizes[p] < limit]) else []
    yield from sorted(groups, key=lambda paths: -sum(sizes[p] for p in paths))


def _options(layer: Layer, paths: tuple[str, ...], rows: bool) -> Iterator[Transform]:
    """Data types a layer may have, its paths named; what is quick to try, or often chosen, comes first."""
    if isinstance(layer, Table):
        yield from (QuantizeTables("int8", only=paths), QuantizeTables("int4", only=paths))
        if layer.layout == "full" and layer.data_type == "fp32":
            for rate in dict.fromkeys(max(1, round(r * layer.dim / 8)) * 8 / layer.dim for r in RATES):
                yield CodeAxes(min(rate, 8.0), only=paths)
        yield DropFields(None, only=paths)
        yield from (QuantizeTables("fp16", only=paths), QuantizeTables("int2", only=paths))
        if layer.layout == "full" and layer.data_type == "fp32":
            for bits, width in CODES:
                if width < layer.dim:
                    yield CodeTables(bits, width, "fp16" if width == 1 else "int8", only=paths)
        return
    for wide in ("int8", "fp16"):
        yield QuantizeDense(wide, only=paths)
    for few in ("int4", "int3", "int2"):
        yield QuantizeDense(few, only=paths, feedback=rows)


def _tried(
    bundle: Bundle,
    env: Env,
    paths: Sequence[str],
    layers: Mapping[str, Layer],
    judge: Judge,
    rates: Rates | None,
    candidates: int,
    ends: float,
) -> Iterator[Choice]:
    """Choices that can be applied, each measured alone; when the time is over, no more than the first."""
    rows = env.calib is not None or env.train is not None
    for number, transform in enumerate(_options(layers[paths[0]], tuple(paths), rows)):
        if number and time.monotonic() > ends:
            return
        with contextlib.suppress(PlanError):
            changed = transform.apply(bundle, env)
            sizes = sum(_bytes(changed.model, p) for p in paths)
            ms = _ms(described(changed, env.allow), paths, rates, candidates) if rates else 0.0
            yield Choice((transform,), sizes, judge.loss(changed), ms)


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices than which none is at most as large, as slow and as lossy."""
    return [c for c in choices if not any(_better(o, c) for o in choices if o is not c)]


def _better(a: Choice, b: Choice) -> bool:
    sides = [(a.bytes, b.bytes), (a.loss, b.loss), (a.ms, b.ms)]
    return all(x <= y for x, y in sides) and any(x < y for x, y in sides)


def _joined(choices: Sequence[Choice]) -> Structure:
    """Transforms of the choices, those that differ in their paths only as one."""
    merged: dict[Transform, tuple[str, ...]] = {}
    for transform in (t for c in choices for t in c.transforms):
        key = _for(transform, ("*",))
        merged[key] = (*merged.get(key, ()), *transform.only)  # type: ignore[attr-defined]  # every option has patterns
    return tuple(_for(t, paths) for t, paths in merged.items())


def _for(transform: Transform, paths: tuple[str, ...]) -> Transform:
    made: Transform = dataclasses.replace(transform, only=paths)  # type: ignore[type-var]
    return made


def _bytes(model: Model, path: str) -> int:
    return sum(t.nbytes for name, t in model.state.items() if name.startswith(f"{path}."))


def _ms(layers: Mapping[str, Layer], paths: Sequence[str], rates: Rates | None, candidates: int) -> float:
    return sum(rates.ms(layers[p], candidates) for p in paths) if rates else 0.0


class Judge:
    """How far a bundle's answers are from those of the one it was made of."""

    def __init__(self, bundle: Bundle, env: Env) -> None:
        data = next((d for d in (env.calib, env.valid, env.train) if d is not None and len(d)), None)
        if data is None:
            raise PlanError("allocating bits needs rows to look at: env.calib, env.valid or env.train")
        self.env, self.inputs = env, bundle.model.spec.inputs
        self.loss_name = env.recipe.loss if env.recipe is not None else "bce"
        module = bundle.model.build(env.allow)
        self.items = Items.of(data).of_ids(torch.arange(len(Items.of(data)))) if _retrieves(module, self.loss_name) else None
        n = ROWS if self.items is None else QUERIES
        self.rows = _spread(data, n)
        self.before = self._answers(module)

    def loss(self, bundle: Bundle) -> float:
        """The mean divergence a row; 0 where nothing moved."""
        before, after = self.before, self._answers(bundle.model.build(self.env.allow))
        if self.items is not None:
            spread = before.std(1, keepdim=True).clamp(min=1e-12)  # a cosine's range is not a dot product's
            return max(0.0, divergence(before / spread, after / spread, "cross-entropy"))
        return max(0.0, divergence(before, after, self.loss_name))

    def _answers(self, module: nn.Module) -> Tensor:
        said = []
        with torch.inference_mode():
            for batch in self.rows.batches(1024):
                if self.items is None:
                    said.append(call(module, batch, self.inputs))
                    continue
                said.append(module.user_vectors(batch) @ module.item_vectors(self.items).T)  # type: ignore[operator]
        return torch.cat(said).double()  # differences of a thousandth of a bit are below what fp32 can tell


def _retrieves(module: nn.Module, loss: str) -> bool:
    return hasattr(module, "item_vectors") and loss not in ("bce", "cross-entropy", "mse")


def _spread(data: Dataset, n: int) -> Dataset:
    """Rows from all over, since they may have an order."""
    return data.take(np.linspace(0, len(data) - 1, min(n, len(data))).astype(np.int64))
