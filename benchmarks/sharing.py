"""Which table that shares its numbers from the first step is best, for a vocabulary that is not trained whole?

Generated click logs shaped like Criteo's (26 fields, 6 million ids, 13 numbers, 2 million rows), and one model, recipe, seed
and order of rows; only what stands in the place of the tables differs. Each method is given a tenth, a hundredth and a
thousandth of the tables' fp32 bytes and takes the largest setting that fits; where its smallest does not, it has no point.
Bytes are those of the tensors in the weights file, learned maps counted. The full tables are in no memory: the model they
would have been is made of zeros that take none. The best method is the best on validation, and what is printed is its AUC on
the test rows, over seeds.

Three lines to measure by: the AUC of the planted logits, which nothing can pass; of the full tables, trained out of
competition, since ids that are seen a few times nobody can learn; and of a model whose large tables are one row each.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.compress.share import lookups
from pennyweight.compress.substitute import Method, SubstituteTables, recluster
from pennyweight.core.config import write
from pennyweight.core.errors import PlanError
from pennyweight.core.measure import peak_memory
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.synthetic import Clicks, criteo_like
from pennyweight.model.bundle import Bundle
from pennyweight.model.hashed import Clustered, shared
from pennyweight.model.metrics import auc
from pennyweight.model.ranking import DeepFM
from pennyweight.model.spec import seeded, spec_of, untrained
from pennyweight.model.train import Recipe, fit, scores
from pennyweight.model.transform import Env
from pennyweight.report.charts import picture

FULL_TABLES, ROWLESS = "full tables", "large tables of one row"
ID = "training-time-sharing/generated"
METHODS: tuple[Method, ...] = get_args(Method)
RATIOS = (10, 100, 1000)
ROUNDS = 3
"""Parts of the rows between which clustered tables find their clusters anew."""
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "sharing.svg"
STYLE = ("circle", "square", "cross", "diamond", "triangle-up", "triangle-down", "triangle-right", "triangle-left", "stroke")
COLOURS = ("#0068ad", "#b86a00", "#929ca7", "#c3a500", "#bf3a1c", "#00775a", "#b0568c", "#7a62c9", "#14181d")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the set and the model are."""

    ids: int
    rows: int
    dim: int = 16
    batch: int = 4096
    methods: tuple[Method, ...] = METHODS
    ratios: tuple[int, ...] = RATIOS


FULL = Size(6_000_000, 2_000_000)
QUICK = Size(150_000, 20_000, dim=8, batch=1024, methods=("hash", "robe"), ratios=(4, 100))


@dataclasses.dataclass(frozen=True)
class Point:
    """One method at one budget, trained."""

    method: Method
    ratio: float
    """Asked for."""
    bytes: int
    """Of what stands in the place of the tables."""
    valid: float
    """AUC, as is the next."""
    test: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The set and the model that is not there yet."""

    size: Size
    clicks: Clicks
    split: Split

    @classmethod
    def generate(cls, size: Size, out: Path) -> Task:
        """Rows drawn into a folder in chunks, and cut as they lie."""
        clicks = criteo_like(size.ids)
        return cls(size, clicks, clicks.write(size.rows, out).split("order"))

    @property
    def recipe(self) -> Recipe:
        """One pass: in a second, ids that come once are learned by heart."""
        return Recipe(lr=2e-3, batch=self.size.batch, epochs=1)

    def given(self, seed: int) -> Bundle:
        """The model before training, its large tables in no memory."""
        spec = spec_of(DeepFM, columns=self.split.train.schema.columns, dim=self.size.dim, hidden=[64])
        return Bundle(untrained(spec, seed), self.split.train.catalog)

    def trained(self, method: Method, ratio: float, seed: int = 0) -> Point:
        """A method at a budget.

        Raises:
            PlanError: no setting of the method is that small.
        """
        began = time.monotonic()
        env = Env(train=self.split.train, seed=seed)
        made = SubstituteTables(method, ratio).apply(self.given(seed), env).model
        module = made.build(copy=True)
        clustered = [p for p, t in shared(module).items() if isinstance(t.layer, Clustered)]
        train, counts = self.split.train, lookups(made, env, clustered) if clustered else {}
        rounds = ROUNDS if clustered else 1
        for k in range(rounds):
            if k:
                recluster(module, k, counts)
            part = train.take(slice(k * len(train) // rounds, (k + 1) * len(train) // rounds))
            fitted = fit(module, part, self.split.valid, self.recipe, seed=seed + k)
        return Point(method, ratio, table_bytes(made.state), fitted.metric, self.judged(module), time.monotonic() - began)

    def judged(self, module: Any) -> float:
        """AUC on the test rows."""
        test = self.split.test
        return auc(test.column("label"), scores(module, test))

    def full(self) -> float:
        """AUC of the model with its tables whole."""
        module = seeded(self.given(0).model.spec, 0)
        fit(module, self.split.train, self.split.valid, self.recipe)
        return self.judged(module)

    def planted(self) -> float:
        """AUC of the logits the labels were drawn from."""
        test = self.split.test
        return auc(test.column("label"), self.clicks.logits({n: test.column(n) for n in (*self.clicks.names, "numbers")}))

    def rowless(self) -> float:
        """AUC of a model whose large tables hold about one row each."""
        given, large = self.given(0), 10_000
        tables = {name: t for name, t in given.model.state.items() if ".tables." in name}
        left = sum(4 * t.numel() if len(t) < large else 4 * self.size.dim for t in tables.values())
        substitute = SubstituteTables("hash", table_bytes(tables) / left, min_rows=large)
        made = substitute.apply(given, Env()).model.build(copy=True)
        fit(made, self.split.train, self.split.valid, self.recipe)
        return self.judged(made)


def table_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors at and under a model's tables."""
    return sum(t.numel() * t.element_size() for name, t in state.items() if ".tables." in name)


def points(task: Task, hear: Callable[[Point], None]) -> list[Point]:
    """Every method at every budget it reaches."""
    found = []
    for ratio in task.size.ratios:
        for method in task.size.methods:
            try:
                found.append(task.trained(method, ratio))
            except PlanError:
                continue
            hear(found[-1])
    return found


def rows(found: Sequence[Point], more: Mapping[float, Sequence[Point]], limits: Mapping[str, float]) -> list[Row]:
    """The best of each budget over seeds, then every point."""
    made = []
    for ratio, seeds in more.items():
        tests, best = [p.test for p in seeds], seeds[0]
        rest = ", ".join(f"{p.method} {p.test:.4f}" for p in found if p.ratio == ratio and p.method != best.method)
        note = f"{best.method}, {best.bytes:,} bytes; others: {rest}; {', '.join(f'{n} {v:.4f}' for n, v in limits.items())}"
        mean = float(np.mean(tests))
        made.append(
            Row(ID, f"auc at {ratio:g}x", mean, min(tests), max(tests), len(tests), baseline=limits[FULL_TABLES], note=note)
        )
    for p in found:
        note = f"{p.bytes:,} bytes, {p.seconds:.0f} s with validation and test"
        made.append(
            Row(f"{ID}/{p.method}", f"auc at {p.ratio:g}x", p.test, p.test, p.test, baseline=limits[FULL_TABLES], note=note)
        )
    return made


def chart(found: Sequence[Point], limits: Mapping[str, float]) -> str:
    """AUC against bytes, a line for each method, as an SVG file."""
    values = [{"method": p.method, "kB": p.bytes / 1e3, "auc": p.test} for p in found]
    ends = [{"text": name, "auc": value} for name, value in limits.items()]

    def draw(alt: Any) -> Any:
        methods = list(dict.fromkeys(p.method for p in found))
        legend = alt.Legend(title=None, orient="right", symbolSize=80)
        colour = alt.Color("method:N", scale=alt.Scale(domain=methods, range=list(COLOURS)), legend=legend)
        shape = alt.Shape("method:N", scale=alt.Scale(domain=methods, range=list(STYLE)), legend=legend)
        x = alt.X("kB:Q", title="tables, kB", scale=alt.Scale(type="log", padding=16), axis=alt.Axis(grid=False))
        y = alt.Y("auc:Q", title="AUC on the test rows", scale=alt.Scale(zero=False))
        shown = alt.Chart(alt.Data(values=values)).encode(x=x, y=y, color=colour)
        lines = alt.Chart(alt.Data(values=ends)).encode(y=y)
        rules = lines.mark_rule(color="var(--line)", strokeDash=[5, 4])
        words = lines.mark_text(align="left", dx=4, dy=-7, color="var(--soft)").encode(x=alt.value(0), text="text:N")
        return (
            rules + words + shown.mark_line() + shown.mark_point(filled=True, size=80, opacity=1).encode(shape=shape)
        ).properties(height=360)

    return picture(draw, 720)


def brief(folder: Path, size: Size, clicks: Clicks, method: Method | None, ratio: float) -> None:
    """The first rows of the set and one method, or the full tables, for the memory it needs."""
    task = Task(size, clicks, Dataset.open(folder).head(size.rows).split("order"))
    task.trained(method, ratio) if method else task.full()


def measured(options: Options) -> list[Row]:
    """All of it; the picture is written by a full run."""
    size = QUICK if options.quick else FULL
    folder = Path(tempfile.mkdtemp(prefix="pennyweight-sharing-"))
    try:
        task = Task.generate(size, folder / "rows")
        limits = {"planted logits": task.planted(), FULL_TABLES: task.full(), ROWLESS: task.rowless()}
        found = points(task, lambda p: print(f"{p.method} at {p.ratio:g}x: {p.test:.4f} in {p.seconds:.0f} s", flush=True))
        more = {ratio: best(task, found, ratio, options.seeds) for ratio in size.ratios}
        least = min(size.ratios)
        part = Size(size.ids, min(size.rows, 100_000), size.dim, size.batch)
        winner = more[least][0].method
        used, full = (
            peak_memory(brief, folder / "rows", part, dataclasses.replace(task.clicks), m, least) for m in (winner, None)
        )
        drawn = chart(found, {name: limits[name] for name in (FULL_TABLES, ROWLESS)})
        if not options.quick:
            write(PICTURE, drawn)
        note = (
            f"training {winner} at {least}x against the full tables, beyond the {used.before:,} bytes of a process that has "
            f"loaded PyTorch; the tables themselves are {table_bytes(task.given(0).model.state):,}"
        )
        peak = float(used.added)
        memory = Row(ID, "peak_memory_bytes", peak, peak, peak, baseline=float(full.added), note=note)
        return [*rows(found, more, limits), memory]
    finally:
        shutil.rmtree(folder)


def best(task: Task, found: Sequence[Point], ratio: float, seeds: int) -> list[Point]:
    """The method that is best on validation at a ratio, over seeds."""
    first = max((p for p in found if p.ratio == ratio), key=lambda p: p.valid)
    return [first, *(task.trained(first.method, ratio, seed) for seed in range(1, seeds))]


ROWS = {ID: measured}

if __name__ == "__main__":
    harness.run("sharing", ROWS, timed=False)
