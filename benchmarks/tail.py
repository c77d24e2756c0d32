"""How small does a model of five million ids get, most of which come once or never? Generated clicks, shaped like Criteo's.

The set is generated, and every row says so: 26 fields whose sizes span six powers of ten, ids by a power law, 13 numbers, a
planted answer (``data.synthetic``). The model is a DeepFM with a row for each id, trained in one pass, since in a second
one it learns by heart the ids that come once. Rows are drawn independently, so AUC is compared over rows.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row
from benchmarks.judged import Bars, Found, Setting, kept, listed, rows_of, size
from benchmarks.sharing import table_bytes
from pennyweight.compress.bands import DropRows
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.measure import peak_memory
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.synthetic import Clicks, criteo_like
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.ranking import DeepFM
from pennyweight.model.spec import spec_of
from pennyweight.model.train import Fit, Recipe
from pennyweight.model.transform import Env, Transform, plan
from pennyweight.optimize import prove
from pennyweight.optimize.evaluate import scores
from pennyweight.optimize.prove import Comparison

ID = "huge-tail/generated"
RATIO, TABLES, MARGIN, MEMORY = 30.0, 50.0, 0.001, 1.5
"""Times smaller the model and its tables, the drop of AUC, and the peak of compressing as so many models."""
WINDOW = 8 << 20
"""Bytes of rows that are shuffled as one."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """How large the set and the model are."""

    ids: int
    rows: int
    dim: int = 16
    hidden: int = 64


FULL, QUICK = Extent(5_000_000, 2_500_000), Extent(150_000, 20_000, 4)
RECIPE = Recipe(lr=2e-3, batch=4096, epochs=1, tables="lazy-adam")
PLAN: tuple[Transform, ...] = (DropRows(keep=0.02), QuantizeTables("int4"), QuantizeDense("fp16"))
"""Dense layers are a thousandth of the bytes, and as int8 they alone cost more AUC than all of this (``docs/decisions.md``)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """One trained model and the rows."""

    folder: Path
    """Holds ``rows``, and ``seed-N`` with a bundle and what is made of it."""
    clicks: Clicks
    split: Split
    bundle: Bundle
    fit: Fit
    seed: int

    @property
    def own(self) -> Path:
        """The folder of this seed."""
        return self.folder / f"seed-{self.seed}"

    @functools.cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """Logits of the test rows."""
        return scores(self.bundle, self.split.test)

    def compared(self, logits: npt.ArrayLike) -> Comparison:
        """Logits of the test rows against the given model's; rows are independent, as they were drawn."""
        return prove.delong(self.split.test.column("label"), self.scores, logits)

    def planted(self) -> float:
        """AUC of the logits the labels were drawn from, which nothing can pass."""
        test = self.split.test
        return self.compared(self.clicks.logits({n: test.column(n) for n in (*self.clicks.names, "numbers")})).value


def env(split: Split, bundle: Bundle, seed: int) -> Env:
    """What transforms may use."""
    train, valid, _ = split
    return Env(train, valid, train, teachers=(bundle.model,), recipe=RECIPE, seed=seed)


def parts(folder: Path) -> Split:
    """The generated rows of a folder, cut as they lie, and shuffled in windows that are small beside the model."""
    return dataclasses.replace(Dataset.open(folder / "rows"), window=WINDOW).split("order")


@functools.cache
def given(setting: Setting, seed: int) -> Given:
    """The model of a seed, from the cache where it was trained before; all seeds learn from the same rows."""
    extent, folder = QUICK if setting.options.quick else FULL, setting.folder("huge-tail") / "tail"
    clicks = criteo_like(extent.ids)
    if not (folder / "rows").exists():
        clicks.write(extent.rows, folder / "rows")
    split, own = parts(folder), folder / f"seed-{seed}"
    done = kept(
        spec_of(DeepFM, columns=split.train.schema.columns, dim=extent.dim, hidden=[extent.hidden]), split, RECIPE, seed, own
    )
    return Given(folder, clicks, split, load(own / "bundle"), done, seed)


def compress(folder: Path, seed: int) -> None:
    """The whole of it, as it runs in a process of its own: open the rows, load the model, compress it, write what came out."""
    own, (train, valid, _) = folder / f"seed-{seed}", parts(folder)
    env = Env(train, valid, train, recipe=RECIPE, seed=seed)
    bundle = load(own / "bundle", mapped=True)
    for transform in PLAN:  # a plan would hold on to what it was given
        bundle = transform.apply(bundle, env)
    save(bundle, own / "made")


def compressed(setting: Setting) -> list[Row]:
    """The plan on every seed; it trains nothing, so the given model is its own control."""
    each, tables, peaks = [], [], []
    opened = peak_memory(parts, given(setting, 0).folder).added
    for seed in range(setting.options.seeds):
        model = given(setting, seed)
        shutil.rmtree(model.own / "made", ignore_errors=True)
        began = time.monotonic()
        peak = peak_memory(compress, model.folder, seed).added - opened
        seconds, made = time.monotonic() - began, load(model.own / "made")
        c = model.compared(scores(made, model.split.test))
        before, after = size(model.own / "bundle"), size(model.own / "made")
        what = f"{before:,} to {after:,} bytes, AUC {c.baseline:.4f} to {c.value:.4f}, planted logits {model.planted():.4f}"
        each.append(Found(before / after, c.drop, c.upper, seconds, what, c.drop / c.se))
        tables.append(table_bytes(model.bundle.model.state) / table_bytes(made.model.state))
        peaks.append(peak / before)
    extent = QUICK if setting.options.quick else FULL
    times = listed((given(setting, seed).fit.seconds for seed in range(len(each))), ".0f")
    note = (
        f"GENERATED clicks shaped like Criteo's: {extent.ids:,} ids in 26 fields, {extent.rows:,} rows of which 80 % train, "
        f"power law; DeepFM of dim {extent.dim}, trained in {times} s; a plan by hand, no training: "
        f"{plan(*PLAN).describe()}"
    )
    more = [
        Row(ID, "table_ratio", min(tables), min(tables), max(tables), len(each), TABLES),
        Row(
            ID, "peak_memory_ratio", max(peaks), min(peaks), max(peaks), len(each), MEMORY, at_most=True,
            note="resident memory of a process that loads the model, compresses it and writes it, beyond one "
            "that has opened the rows, as so many times the model's bytes",
        ),
    ]  # fmt: skip
    return [*rows_of(ID, each, Bars(RATIO, MARGIN), note), *more]


def rounded(id: str, data_type: Literal["int8", "int4"], setting: Setting) -> list[Row]:
    """Every table and layer rounded row by row, without training: what the tools that can be installed do."""

    def one(model: Given) -> Found:
        began = time.monotonic()
        both = plan(QuantizeTables(data_type), QuantizeDense(data_type))
        folder = save(both.apply(model.bundle, env(model.split, model.bundle, model.seed)), model.own / data_type)
        c, ratio = model.compared(scores(load(folder), model.split.test)), size(model.own / "bundle") / size(folder)
        return Found(ratio, c.drop, c.upper, time.monotonic() - began, f"{size(folder):,} bytes", c.drop / c.se)

    each = [one(given(setting, seed)) for seed in range(setting.options.seeds)]
    return rows_of(id, each, note=f"GENERATED; row-wise {data_type} tables and layers, no training, for comparison")


def measures() -> dict[str, Callable[[Setting], list[Row]]]:
    """How to measure each id."""
    peers = {f"{ID}/row-wise-{t}": t for t in ("int8", "int4")}
    return {ID: compressed, **{id: functools.partial(rounded, id, t) for id, t in peers.items()}}  # type: ignore[arg-type]
